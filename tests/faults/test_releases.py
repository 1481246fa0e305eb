"""Bar R39: the last release on this schema, this one on the last's, both at once, under load.

tests/releases holds the wheels of the releases that an upgrade may come from.
"""

import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from sqlqueue import Queue
from sqlqueue.integrations.alembic import migrate
from tests.faults.checker import assert_nothing_wrong, drained
from tests.faults.history import Enqueuers, request_table
from tests.harness import application_table, value, wait_until, workers

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("release.py")
WHEELS = sorted((ROOT / "tests/releases").glob("*.whl"))


@pytest.fixture
def last(tmp_path: Path) -> Path:
    """The folder of the last release's code."""
    assert WHEELS, "inconclusive: there is no release yet"
    with zipfile.ZipFile(WHEELS[-1]) as wheel:
        wheel.extractall(tmp_path)
    return tmp_path


@pytest.fixture
def url(create_database: Callable[[], str]) -> str:
    """The url of a database with the application's tables, not migrated."""
    url = create_database()
    engine = create_engine(url)
    application_table(engine)
    request_table(engine)
    return url


def run(code: Path, url: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run Python with the code of a release."""
    own = {"PYTHONPATH": str(code), "SQLQUEUE_URL": url}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd="/", env=os.environ | own,
        capture_output=True, text=True,
    )  # fmt: skip


@contextmanager
def worker(code: Path, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """Have a worker with the code of a release; it is told to stop at the end."""
    own = {"PYTHONPATH": str(code), "SQLQUEUE_URL": url}
    process = subprocess.Popen([sys.executable, PROGRAM, "--works"], cwd="/", env=os.environ | own)
    try:
        yield process
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_r39_released_migrations_stay_as_they_were(last) -> None:
    """A database that has them has what they said then: a change takes a new migration."""
    released = sorted(last.glob("sqlqueue/migrations/versions/*.py"))
    assert released
    for then in released:
        now = ROOT / "migrations/versions" / then.name
        assert now.read_text() == then.read_text(), f"{then.name} was released in {WHEELS[-1].name}"


def test_r39_the_last_release_works_on_this_schema(last, url) -> None:
    migrate(create_engine(url))

    done = run(last, url, PROGRAM)

    assert done.returncode == 0, done.stderr
    assert value(create_engine(url), "select count(*) from effect") == 9


def test_r39_this_release_works_on_the_last_schema_or_refuses(last, url) -> None:
    migrated = run(last, url, "-m", "sqlqueue", "migrate")
    assert migrated.returncode == 0, migrated.stderr
    status = run(ROOT, url, "-m", "sqlqueue", "migrate", "status")
    engine = create_engine(url)

    if status.returncode == 0:
        done = run(ROOT, url, PROGRAM)
        assert done.returncode == 0, done.stderr
        assert value(engine, "select count(*) from effect") == 9
    else:
        refused = run(
            ROOT, url, "-m", "sqlqueue", "-A", "tests.faults.release", "worker", "--drain"
        )
        assert refused.returncode != 0
        assert "run sqlqueue migrate" in refused.stderr
        assert value(engine, "select count(*) from sqlqueue.worker") == 0


@pytest.mark.nightly
def test_r39_a_migration_under_load_with_both_releases_at_work_loses_nothing(last, url) -> None:
    run(last, url, "-m", "sqlqueue", "migrate")
    queue = Queue(url)
    done = "select count(*) from effect"
    with Enqueuers(queue, seed=39, rate=60, seconds=0) as enqueuers, worker(last, url):
        wait_until(lambda: value(queue.engine, done) > 60, within=20)
        migrate(queue.engine)
        with worker(ROOT, url):
            wait_until(lambda: len(workers(queue.engine)) == 2, within=20)
            then = value(queue.engine, done)
            wait_until(lambda: value(queue.engine, done) > then + 200, within=20)
    with worker(ROOT, url):
        drained(queue.engine)

    print(f"{len(enqueuers.history.acknowledged)} jobs, from {WHEELS[-1].name}")
    assert_nothing_wrong(queue.engine, enqueuers.history)
