"""The demo, run as people run it: it checks itself, can be interrupted, and leaves nothing."""

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.orm import Session

from sqlqueue import Queue, Task, demo
from sqlqueue.integrations.alembic import migrate
from sqlqueue.store import Lane
from tests.harness import ROOT, rows, wait_until

PROGRAM = "import sys; from pathlib import Path; from sqlqueue.demo import demo; "
PROGRAM += "sys.exit(demo(Path(sys.argv[1])))"
BROKEN = {"latin-2.txt": b"d\xe9j\xe0 vu", "cut.txt": "naïve".encode()[:3]}


@pytest.fixture
def area() -> Iterator[Path]:
    """A folder for all that the demo puts on disk. Every user can enter it, unlike tmp_path."""
    path = Path(tempfile.mkdtemp(prefix="sqlqueue-test-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty text files, two of which do not decode; the demo adds others."""
    for number in range(38):
        (tmp_path / f"{number}.txt").write_text(f"number {number} has some words\n" * number)
    for name, content in BROKEN.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@contextmanager
def running(folder: Path, area: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the demo in a process group of its own, as a shell does."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, folder],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(area)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def left_in(area: Path) -> list[str]:
    """The files in `area`, and the processes whose temporary files belong there."""
    found = [str(path) for path in area.iterdir()]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"TMPDIR={area}\0" in (process / "environ").read_text(errors="replace"):
                found.append((process / "cmdline").read_text())
        except OSError:
            continue  # it has ended
    return [what for what in found if what]  # a process without a command has ended too


def test_the_demo_finds_that_all_its_checks_hold(folder: Path, area: Path) -> None:
    with running(folder, area) as process:
        told, errors = process.communicate(timeout=60)

    assert (process.returncode, errors) == (0, ""), told
    assert "kill -9" in told
    assert "the 4 that do not decode failed, no others" in told
    assert told.count("✓") == len(demo.CHECKS) + 3
    assert "✗" not in told
    assert left_in(area) == []


@pytest.mark.parametrize("moment", ["Starting", "two worker processes", "kill -9"])
def test_a_demo_that_is_interrupted_leaves_nothing_behind(
    folder: Path, area: Path, moment: str
) -> None:
    with running(folder, area) as process:
        assert process.stdout is not None
        assert any(moment in line for line in process.stdout)
        os.killpg(process.pid, signal.SIGINT)
        os.killpg(process.pid, signal.SIGINT)  # impatient
        told, errors = process.communicate(timeout=30)

    assert (process.returncode, errors) == (130, ""), told
    assert "Checks" not in told
    wait_until(lambda: not left_in(area), within=30, what="the end of all processes")


PATHS = "select args ->> 'path' from sqlqueue.jobs where task = 'library.count' order by id"
DAMAGE = {
    "every job has ended": "select sqlqueue.enqueue('library.count', '{}')",
    "each job has exactly one final run": "update sqlqueue.run set is_final = false",
    "each document has its job and each job its document, also after a rollback": (
        "delete from library.document where id = 0"
    ),
    "each document was counted once, by the run that ended its job, or failed": (
        "update library.document set times_counted = times_counted + 1 where id = 0"
    ),
    "what failed did so three times, each with its traceback": (
        "delete from sqlqueue.run where attempt = 2; update sqlqueue.run set attempt = 2"
    ),
    "the kill cut runs short": "update sqlqueue.run set outcome = 'returned' where not is_final",
    "child processes found the same": "update library.document set words = words + 1",
    "nothing ran before its time": "update sqlqueue.run set due_at = now() + interval '1 hour'",
}


@pytest.fixture(scope="module")
def library_url(create_database, tmp_path_factory) -> str:
    """A database with a library of a counted document and one that does not decode."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "7.txt").write_text("some words\n" * 7)
    (folder / "cut.txt").write_bytes(BROKEN["cut.txt"])
    url: str = create_database()
    queue = demo.load(url)
    migrate(queue.engine)
    with queue.engine.begin() as conn:
        conn.execute(text(demo.LIBRARY))
        for number, path in enumerate(sorted(folder.iterdir())):
            demo._add(conn, number, path.name, path)
        demo.recount.using(conn).enqueue(0, str(folder / "7.txt"))
    with queue.worker("default", slots=1):
        wait_until(lambda: rows(queue.engine, "select 1 from sqlqueue.live") == [], within=20)
    queue.engine.dispose()
    return url


@pytest.fixture
def library(library_url: str) -> Iterator[Connection]:
    """That database, in a transaction that is rolled back."""
    engine = create_engine(library_url)
    with engine.connect() as conn:
        yield conn
    engine.dispose()


@pytest.mark.parametrize("claim", demo.CHECKS)
def test_each_check_of_the_demo_can_fail(library: Connection, claim: str) -> None:
    if claim != "the kill cut runs short":
        assert library.execute(text(demo.CHECKS[claim])).all() == []
    library.execute(text(DAMAGE[claim]))
    assert library.execute(text(demo.CHECKS[claim])).all() != []


def test_a_double_effect_shows_in_the_totals_of_the_demo(library: Connection) -> None:
    paths = [Path(path) for path in library.scalars(text(PATHS))]
    assert list(demo._compared(library, paths).values()) == [True, True, True]

    library.execute(text("update library.shelf set words = words + 1 where id = 0"))
    library.execute(text("insert into library.word select * from library.word limit 1"))
    assert list(demo._compared(library, paths).values()) == [False, False, True]
    assert list(demo._compared(library, paths[:1]).values())[2] is False


@pytest.fixture
def slow(queue: Queue) -> Task[[], None]:
    """A task that finishes its job itself, after 50 ms."""

    @queue.task(transactional=True, name="slow")
    def slow(session: Session) -> None:
        threading.Event().wait(0.05)

    return slow


def test_quick_jobs_do_not_make_a_worker_claim_slow_transactional_ones_far_ahead(
    queue: Queue, engine: Engine, slow: Task[[], None]
) -> None:
    quick = queue.task(name="quick")(lambda: None)
    for calls in ([slow.s() for _ in range(6)], [quick.s()], [slow.s() for _ in range(40)]):
        queue.enqueue_many(calls)
    with queue.worker("default", slots=2, drain=True) as worker:
        worker.stopped.wait(20)

    ended = dict(rows(engine, "select outcome, count(*) from sqlqueue.runs group by outcome"))
    assert ended.pop("succeeded") == 47
    assert ended.pop("returned", 0) <= 3  # the one ahead, where the machine stands still
    assert not ended


def test_jobs_handed_back_below_the_floor_are_run_as_fast_as_others(
    queue: Queue, engine: Engine, slow: Task[[], None]
) -> None:
    with engine.begin() as conn:
        ttl = timedelta(seconds=30)
        dead = queue.store.register(conn, ttl, 1, 30, "host", "dead", "0", ["default"], [])
        queue.using(conn).enqueue_many(slow.s() for _ in range(30))
        assert len(queue.store.claim(conn, Lane("default", 0), 0, 30, dead)) == 30

    with queue.worker("default", slots=2):
        for _ in range(10):
            slow.enqueue().wait(timedelta(seconds=5))  # the floor rises
        with engine.begin() as conn:
            assert len(queue.store.rescue(conn, 100, dead)) == 30
        wait_until(lambda: rows(engine, "select 1 from sqlqueue.live") == [], within=6)


def charts(url: str) -> str:
    """The numbers of the charts on the first page, and those on top of it."""
    with urllib.request.urlopen(url, timeout=5) as answer:
        page = answer.read().decode()
    return "".join(re.findall(r'points="[^"]*"|<dd>.*?</dd>', page))


@pytest.mark.alone
def test_m24_on_a_terminal_the_demo_serves_moving_charts_until_ctrl_c(
    folder: Path, area: Path
) -> None:
    ours, theirs = pty.openpty()
    program = PROGRAM.replace("[1])))", "[1]), 0, browses=False))")
    with subprocess.Popen(
        [sys.executable, "-c", program, folder],
        cwd=ROOT, env=os.environ | {"TMPDIR": str(area), "TERM": "xterm", "COLUMNS": "200"},
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    ) as process:  # fmt: skip
        os.close(theirs)
        told = ""
        try:
            while "goes on" not in told:
                told += os.read(ours, 10_000).decode(errors="replace")
            url = re.search(r"http://127\.0\.0\.1:\d+/", told)[0]
            began, first = time.monotonic(), charts(url)
            wait_until(lambda: charts(url) != first, within=10, what="a chart that moves")
            print(f"moved after {time.monotonic() - began:.1f} s")
            os.killpg(process.pid, signal.SIGINT)
            with suppress(OSError):  # the terminal ends with it
                while more := os.read(ours, 10_000):
                    told += more.decode(errors="replace")
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert told.count("✓") == len(demo.CHECKS) + 3
    assert left_in(area) == []
