"""An application for worker processes of the tests: its queue, its tasks and how it is run.

The environment variable SQLQUEUE_TEST_APP names the database; tests/harness.py sets it.
"""

import asyncio
import ctypes
import logging
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqlqueue import (
    Ended,
    LeaseLost,
    Queue,
    Retry,
    Run,
    Unique,
    UniqueKeyBusy,
    WorkerOptions,
    current_run,
)
from sqlqueue.cli.supervisor import Processes, Supervisor
from tests.faults.history import REQUEST

queue = Queue(os.environ["SQLQUEUE_TEST_APP"])
NOTE = text("insert into effect (key, run, pid) values (:key, :run, :pid)")
AT_ONCE = Retry(attempts=100, waits=[timedelta(0)])
MIDDLE: list[Callable[[], object]] = []  # called in the middle of `write`


def load() -> Queue:
    """Return the queue; called by the worker processes of a supervisor."""
    return queue


def load_slowly() -> Queue:
    """Return the queue, in a worker process after two seconds."""
    if multiprocessing.parent_process():
        threading.Event().wait(2)
    return queue


def supervise(
    processes: int | dict[str, Any],
    names: tuple[str, ...],
    options: dict[str, Any],
    load: Callable[[], Queue] = load,
) -> None:
    """Be the parent of worker processes."""
    given = processes if isinstance(processes, dict) else {"least": processes}
    sys.exit(Supervisor(load, names, WorkerOptions(**options), Processes(**given)).run())


def work(names: tuple[str, ...], options: dict[str, Any]) -> None:
    """Be a single worker, without a parent that watches."""
    logging.basicConfig(level=logging.INFO)
    queue.worker(*names, **options).run()


def enqueue_until_told(job_id: str) -> None:
    """Enqueue `write` with a row of the application; again while the outcome is not known."""
    while True:
        with suppress(DBAPIError), Session(queue.engine) as session:
            session.execute(REQUEST, {"id": job_id})
            queue.using(session, id=UUID(job_id)).send("write", job_id)
            session.commit()
            return
        threading.Event().wait(0.1)


def be_struck(failpoint: Any) -> None:
    """Have a failpoint strike this process; one in a task, in the middle of `write`."""
    failpoint.install(queue)
    MIDDLE.append(lambda: failpoint.reach("in_task"))


@contextmanager
def noting_refusals(run: Run) -> Iterator[None]:
    """Write down that a run could not finish its job, since it had lost its lease."""
    try:
        yield
    except LeaseLost:
        with queue.engine.begin() as conn:
            key = {"id": run.job_id, "run": run.number}
            conn.execute(text("insert into refusal values (:id, :run)"), key)
        raise


def note(key: str) -> None:
    """Write down that this run was here, whatever becomes of it."""
    with queue.engine.begin() as conn:
        conn.execute(NOTE, {"key": key, "run": current_run().number, "pid": os.getpid()})


@queue.task(name="write", transactional=True, retry=AT_ONCE)
def write(session: Session, key: str, seconds: float = 0) -> int:
    """Write the key, and take some time before the commit."""
    run = current_run().number
    session.execute(NOTE, {"key": key, "run": run, "pid": os.getpid()})
    for call in MIDDLE:
        call()
    threading.Event().wait(seconds)
    return run


@queue.task(name="write_async", transactional=True, retry=AT_ONCE)
async def write_async(session: AsyncSession, key: str, seconds: float = 0) -> int:
    """Do what `write` does, on the event loop."""
    run = current_run().number
    await session.execute(NOTE, {"key": key, "run": run, "pid": os.getpid()})
    await asyncio.sleep(seconds)
    return run


@queue.task(name="nothing")
async def nothing() -> None:
    """Take no time."""


@queue.task(name="linger")
def linger(key: str, seconds: float) -> int:
    """Write down the start, then take some time."""
    note(key)
    threading.Event().wait(seconds)
    return os.getpid()


@queue.task(name="poison")
def poison() -> None:
    """Take the worker process down."""
    os.kill(os.getpid(), signal.SIGKILL)


@queue.task(name="topple")
def topple() -> None:
    """Take the whole tree of worker processes down."""
    os.killpg(0, signal.SIGKILL)


@queue.task(name="stay")
def stay(key: str) -> None:
    """Write down the start, and stay until somebody writes the key "go"."""
    note(key)
    while not _is_written("go"):
        threading.Event().wait(0.05)


def _is_written(key: str) -> bool:
    with queue.engine.begin() as conn:
        return bool(conn.scalar(text("select count(*) from effect where key = :key"), {"key": key}))


@queue.task(name="rest")
async def rest(key: str, seconds: float) -> None:
    """Write down the start, then take some time on the event loop."""
    note(key)
    await asyncio.sleep(seconds)


@queue.task(name="wedge")
def wedge(key: str) -> None:
    """Never end, and look at nothing."""
    note(key)
    threading.Event().wait()


@queue.task(name="hold_interpreter")
def hold_interpreter(seconds: int, key: str = "holds the interpreter") -> int:
    """Hold the interpreter's lock: no other thread of this process runs meanwhile."""
    note(key)
    ctypes.PyDLL(None).sleep(seconds)
    return current_run().number


@queue.task(name="hold_until")
def hold_until(released: str) -> None:
    """Hold the interpreter's lock, and say so by the file `released`.held, until `released` is."""
    waiting = f"touch {released}.held; until [ -e {released} ]; do sleep 0.05; done"
    ctypes.PyDLL(None).system(waiting.encode())


@queue.task(name="process_id", executor="process")
def process_id() -> int:
    """Return the id of the child process."""
    return os.getpid()


@queue.task(name="async_in_process", executor="process")
async def async_in_process() -> int:
    """Return the id of the child process, from a coroutine."""
    await asyncio.sleep(0)
    return os.getpid()


@queue.task(name="hidden", executor="process", retry=Retry(attempts=1))
def hidden() -> None:
    """Be known to the worker, under a name that holds something else in a child process."""


known_to_the_worker, hidden = hidden, None  # type: ignore[assignment]


@queue.task(name="die", executor="process", max_crashes=1, retry=Retry(attempts=1))
def die(how: str) -> None:
    """End this child process; or, out of memory by a limit of its own, this run."""
    note(how)
    if how == "segfault":
        ctypes.string_at(0)
    elif how == "exit":
        os._exit(3)
    elif how == "killed":  # as the kernel does when there is no memory left
        os.kill(os.getpid(), signal.SIGKILL)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 20, limits[1]))
    try:
        bytearray(1 << 30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


LEAKED: list[bytearray] = []


@queue.task(name="allocate", executor="process")
def allocate(megabytes: int) -> int:
    """Use memory and keep it, as a leak would; return the id of the child process."""
    bytes_used = bytearray(megabytes << 20)
    bytes_used[::4096] = b"x" * len(bytes_used[::4096])
    LEAKED.append(bytes_used)
    return os.getpid()


@queue.task(name="stubborn", executor="process", retry=Retry(attempts=1))
def stubborn(key: str) -> None:
    """Ignore SIGTERM, start a child that does too, and never end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    with queue.engine.begin() as conn:
        for pid in (os.getpid(), child.pid):
            conn.execute(NOTE, {"key": key, "run": current_run().number, "pid": pid})
    while True:
        signal.pause()


@queue.task(executor="process")
def tell(word: str) -> None:
    """Log, and say how far it is."""
    logging.getLogger("shop").info("%s: begins", word)
    current_run().progress(50, word)


@queue.task(name="hog")
def hog(megabytes: int) -> int:
    """Use memory of the worker process and keep it; return the id of the process."""
    LEAKED.append(bytearray(b"x") * (megabytes << 20))
    return os.getpid()


def told(ended: Ended) -> None:
    """Write down how a run ended: a hook for `after_run`."""
    with queue.engine.begin() as conn:
        conn.execute(NOTE, {"key": ended.outcome, "run": ended.run, "pid": os.getpid()})


@queue.task(name="once", unique=Unique(by=()))
def once() -> None:
    """Be the only unended job of its kind."""


def enqueue_in_many_processes(processes: int, rounds: int) -> int:
    """Enqueue `once` from processes that commit, roll back or die; return how many died."""
    died = 0
    for number in range(rounds):
        pids = [os.fork() for _ in range(processes) if os.getpid() == PARENT]
        if os.getpid() != PARENT:
            enqueue_or_die(random.Random(f"{number} {os.getpid()}"))
            os._exit(0)
        died += sum(os.waitpid(pid, 0)[1] == signal.SIGKILL for pid in pids)
    return died


def enqueue_or_die(dice: random.Random) -> None:
    """Enqueue `once` a few times; some transactions are rolled back, one may be the last."""
    for _ in range(15):
        with suppress(UniqueKeyBusy), queue.engine.connect() as conn, conn.begin() as transaction:
            once.using(conn).enqueue()
            fate = dice.random()
            if fate < 0.05:
                os.kill(os.getpid(), signal.SIGKILL)
            if fate < 0.4:
                transaction.rollback()


PARENT = os.getpid()
