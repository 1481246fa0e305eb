"""What the tests of running workers share: their clocks, waiting, worker trees, an application.

The clocks of the fault tests are short: beat 0.5 s, self-fence 2 s, ttl 3 s, poll 0.25 s.
"""

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from sqlalchemy import Engine, text

from sqlqueue import Queue

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
TTL = timedelta(seconds=3)
SOON = timedelta(seconds=10)
CLOCKS: dict[str, Any] = {
    "ttl": TTL,
    "poll": timedelta(seconds=0.25),
    "grace": timedelta(seconds=5),
}
POLLING = CLOCKS | {"listen": False}  # where waking does not matter; it stops faster


def wait_until(condition: Callable[[], T], within: float = 10.0, what: str = "") -> T:
    """Return the first value of `condition` that is true; fail after `within` seconds."""
    deadline = time.monotonic() + within
    pause = threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within} s: {what or condition}"
        pause.wait(0.01)
    return value


def rows(engine: Engine, sql: str, **params: Any) -> list[Any]:
    """Run one statement in a transaction of its own; return what it returned."""
    with engine.begin() as conn:
        result = conn.execute(text(sql), params)
        return list(result.all()) if result.returns_rows else []


def value(engine: Engine, sql: str, **params: Any) -> Any:
    """Return the only value that a statement returns; None for no row."""
    found = rows(engine, sql, **params)
    return found[0][0] if found else None


def outcomes(engine: Engine, job_id: object) -> list[str]:
    """Return the outcomes of a job's ended runs, in order."""
    sql = "select outcome from sqlqueue.run where job_id = cast(:id as uuid) order by run"
    return [row[0] for row in rows(engine, sql, id=str(job_id))]


def application_table(engine: Engine) -> None:
    """Make the tables that the tasks of the tests write to, empty."""
    rows(
        engine,
        "create table if not exists effect"
        " (key text not null, run integer, pid integer, at timestamptz default clock_timestamp());"
        "create table if not exists refusal (job_id uuid not null, run integer not null);"
        "delete from effect; delete from refusal",
    )


def effects(engine: Engine, key: str) -> list[int]:
    """Return the numbers of the runs that have written the key."""
    return [row[0] for row in rows(engine, "select run from effect where key = :key", key=key)]


def mark(engine: Engine, key: str) -> None:
    """Write down that it is now, by the database's clock."""
    rows(engine, "insert into effect (key) values (:key)", key=key)


def written_by(engine: Engine, key: str) -> int:
    """Wait until a task has written the key; return its process id."""
    sql = "select pid from effect where key = :key"
    pid: int = wait_until(lambda: value(engine, sql, key=key), within=20, what=f"key {key}")
    return pid


def seconds_from(engine: Engine, key: str, job_id: object) -> float:
    """Return the seconds from the first writing of a key to the end of a job's first run."""
    sql = (
        "select extract(epoch from ended_at - (select min(at) from effect where key = :key))"
        " from sqlqueue.run where job_id = cast(:id as uuid) and run = 1"
    )
    return float(value(engine, sql, id=str(job_id), key=key))


def load_app(url: str) -> ModuleType:
    """Import tests.app, whose queue is in this database; child processes do the same."""
    os.environ["SQLQUEUE_TEST_APP"] = url
    return importlib.import_module("tests.app")


@contextmanager
def program(
    url: str, code: str, env: Mapping[str, str] | None = None, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Python program in a session of its own; it is killed at the end, with its children."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import datetime; from tests import app; {code}"],
        cwd=ROOT,
        env=os.environ | {"SQLQUEUE_TEST_APP": url} | dict(env or {}),
        start_new_session=True,
        **options,
    )
    try:
        yield process
    finally:
        wait_until(lambda: not _killed(process.pid), what="the end of the program's processes")
        process.wait()


@contextmanager
def tree(url: str, processes: Any = 1, *names: str, **options: Any) -> Iterator[int]:
    """Run a supervisor with worker processes; return its pid once all have registered."""
    code = f"app.supervise({processes}, {names or ('default',)!r}, {CLOCKS | options!r})"
    with program(url, code) as process:
        yield process.pid


def work(queue: Queue) -> None:
    """Run all that is due, in this process."""
    queue.worker(drain=True, **POLLING).run()


def workers(engine: Engine) -> dict[int, int]:
    """Return the process ids of the workers not known to be dead, by worker id."""
    found = rows(engine, "select id, pid from sqlqueue.worker where died_at is null")
    return {row[0]: row[1] for row in found}


def members(session: int) -> list[int]:
    """Return the processes of a session, such as a tree's, whatever their group."""
    return [pid for pid, state, number in _processes() if number == session and state != "Z"]


def sleeps(engine: Engine) -> None:
    """Wait until a worker has hung its bell, and has had the time to fall asleep."""
    wait_until(lambda: value(engine, "select count(*) from sqlqueue.doorbell"), what="a bell")
    threading.Event().wait(0.1)


def _killed(session: int) -> list[int]:
    """Kill the processes of a session; return which there were."""
    killed = members(session)
    for pid in killed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return killed


def is_alive(pid: int) -> bool:
    """Say whether a process exists; one that has ended, and nobody has waited for, does not."""
    return any(found == pid and state != "Z" for found, state, _ in _processes())


def is_stopped(pid: int) -> bool:
    """Say whether a process is stopped, as by SIGSTOP."""
    return any(found == pid and state == "T" for found, state, _ in _processes())


def _processes() -> Iterator[tuple[int, str, int]]:
    """List (pid, state, session), as proc(5) gives them."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue  # it has ended
        yield int(folder.name), state, int(session)


@contextmanager
def serving(url: str) -> Iterator[str]:
    """A dashboard of the database at `url`, in a process of its own: lends its address."""
    command = [sys.executable, "-m", "sqlqueue", "--url", url, "dashboard", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        yield process.stderr.readline().strip().rstrip("/")
        process.terminate()
