"""Child processes: one run at a time, killed with all they started when a run must end.

Children are started with spawn, live long, and are replaced after a number of runs or when they
have grown too large. A child leads a process group of its own, and dies with its parent.
"""

import fcntl
import logging
import os
import pkgutil
import resource
import signal
import sys
import threading
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

from sqlalchemy.orm import Session

from sqlqueue.notes import Line
from sqlqueue.perform import InThread
from sqlqueue.run import Capture, Run
from sqlqueue.store import Ended, Store
from sqlqueue.task import Task

SPAWN = get_context("spawn")


class Child:
    """Runs tasks in a child process of its own, which it starts when it needs one.

    max_runs   runs after which the process is replaced
    max_bytes  resident memory above which it is replaced after a run; None: no limit
    max_age    time after which it is replaced after a run; None: no limit
    """

    def __init__(self, max_runs: int, max_bytes: int | None, max_age: timedelta | None) -> None:
        self._max_runs = max_runs
        self._max_age = max_age.total_seconds() if max_age else float("inf")
        self._max_bytes = max_bytes
        self._process: Any = None
        self._pipe: Connection[Any, tuple[Ended | None, int]]
        self._runs = 0
        self._lock = threading.Lock()  # of killing: never a process that has begun another run

    def perform(self, run: Run) -> Ended | None:
        """Run it in the child; a child that dies over it is a crash."""
        if run.interrupted:
            return run.stopped()
        try:
            if self._process is None:
                self._start()
            ended, rss = self._ask(run)
        except (EOFError, OSError):
            return run.crashed(f"its process ended with exit code {self.close()}")
        self._runs += 1
        is_worn = self._runs >= self._max_runs or monotonic() > self._began + self._max_age
        if run.interrupted or is_worn or rss > (self._max_bytes or rss):
            self.close()
        return run.stopped() if run.interrupted else ended

    def _ask(self, run: Run) -> tuple[Ended | None, int]:
        """Have the child run it; say how that ended, and the memory the child has then."""
        run.handle = self  # first: who interrupts a run says so in it, and then looks here
        try:
            if run.interrupted:
                return run.stopped(), 0
            if self._runs == 0:
                self._pipe.recv()  # it has started
            run.started = monotonic()
            task = run.registered
            address = f"{task.__module__}:{task.__qualname__}"
            self._pipe.send((address, run.row._asdict(), run.claimed))
            while isinstance(told := self._pipe.recv(), Line):
                run.said.add(told)
            return told
        finally:
            with self._lock:
                run.handle = None

    def interrupt(self, run: Run) -> None:
        """Kill the child and all it started, if it still runs this run."""
        with self._lock:
            if run.handle is self:
                _kill_group(self._process.pid)

    def close(self) -> int | None:
        """End the process, if there is one; return its exit code, its own if it was dead."""
        process, self._process = self._process, None
        if process is None:
            return None
        _kill_group(process.pid)
        process.join()
        self._pipe.close()
        code: int | None = process.exitcode
        return code

    def _start(self) -> None:
        self._pipe, theirs = SPAWN.Pipe()
        level = logging.getLogger().level
        process = SPAWN.Process(target=_serve, args=(theirs, level), name="sqlqueue task")
        process.start()
        theirs.close()
        self._process = process
        self._runs, self._began = 0, monotonic()


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # the second: it has not yet made its own group
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def die_with_parent() -> None:
    """Have this process, its group if it leads one, killed as soon as its parent is dead.

    On Linux the system does it, when the pipe from the parent is closed: no thread of ours runs
    while a task's code holds the interpreter's lock, or the process is stopped.
    """
    parent: Any = parent_process()
    whom = os.getpid() * (-1 if os.getpgrp() == os.getpid() else 1)

    def watch() -> None:
        parent.join()
        os.kill(whom, signal.SIGKILL)

    threading.Thread(target=watch, name="sqlqueue parent", daemon=True).start()
    if sys.platform == "linux":
        fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, whom)
        fcntl.fcntl(parent.sentinel, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, os.O_ASYNC)


def _serve(pipe: "Connection[Any, Any]", level: int) -> None:
    """Be a child: take runs from the pipe one by one, and say how each ended."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    lock = threading.Lock()

    def tell(told: object) -> None:
        with lock:  # any thread of a run may have something to say
            pipe.send(told)

    tell(None)
    logging.getLogger().setLevel(level)
    Capture.install()
    with suppress(EOFError):  # the parent is gone
        while True:
            ended = _perform(SimpleNamespace(add=tell), *pipe.recv())
            tell((ended, resident_bytes()))


def _perform(said: Any, address: str, row: dict[str, Any], claimed: float) -> Ended | None:
    run = Run(SimpleNamespace(**row), None, Store(), claimed, said)
    try:
        run.registered = pkgutil.resolve_name(address)
        if not isinstance(run.registered, Task):
            raise TypeError(f"{address} is no task: a process finds tasks by the function's name")
        return InThread(Session).perform(run)
    except Exception as error:  # importing runs user code
        return run.failed(error)


def resident_bytes(pid: int | str = "self") -> int:
    """Return the memory a process has now; where the system does not tell, its peak or 0.

    On Linux the peak will not do: a process inherits that of the parent that started it.
    """
    try:
        pages = Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]
        return int(pages) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if pid == "self" else 0
