"""Child processes: one run at a time, killed with all they started when a run must end.

Children are started with spawn, live long, and are replaced after a number of runs or when they
have grown too large. A child leads a process group of its own, and dies with its parent.
"""

import importlib
import logging
import os
import resource
import signal
import threading
from functools import reduce
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

from sqlqueue import perform
from sqlqueue.run import Run
from sqlqueue.store import Ended, Store
from sqlqueue.task import Task

log = logging.getLogger("sqlqueue.worker")
SPAWN = get_context("spawn")


class Child:
    """Runs tasks in a child process of its own, which it starts when it needs one.

    max_runs   runs after which the process is replaced
    max_bytes  resident memory above which it is replaced after a run; None: no limit
    """

    def __init__(self, max_runs: int, max_bytes: int | None) -> None:
        self._max_runs = max_runs
        self._max_bytes = max_bytes
        self._process: Any = None
        self._current: Run | None = None
        self._pipe: Connection[Any, Any]
        self._runs = 0
        self._lock = threading.Lock()  # of killing: never a process that has begun another run

    def perform(self, run: Run) -> Ended:
        """Run it in the child; a child that dies over it is a crash."""
        with self._lock:
            if self._process is None:
                self._start()
            self._current = run
            if run.interrupted:
                return run.stopped()
        try:
            if self._runs == 0:
                self._pipe.recv()  # it has started
            run.started = monotonic()
            self._pipe.send((_address(run.registered), run.row._asdict(), run.claimed))
            ended, rss = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            how = f"its process ended with exit code {self._process.exitcode}"
            self._discard()
            return run.crashed(how)
        with self._lock:
            self._current = None
        self._runs += 1
        if run.interrupted or self._runs >= self._max_runs or rss > (self._max_bytes or rss):
            self._discard()
        result: Ended = run.stopped() if run.interrupted else ended
        return result

    def interrupt(self, run: Run) -> None:
        """Kill the child and all it started, if it still runs this run."""
        with self._lock:
            if self._process is not None and self._current is run:
                _kill_group(self._process.pid)

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            self._discard()

    def _start(self) -> None:
        self._pipe, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_serve, args=(theirs,), name="sqlqueue task")
        self._process.start()
        theirs.close()
        self._runs = 0

    def _discard(self) -> None:
        with self._lock:
            process, self._process, self._current = self._process, None, None
        _kill_group(process.pid)
        process.join()
        self._pipe.close()


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # the second: it has not yet made its own group
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def die_with_parent() -> None:
    """Make this process, its group if it leads one, die as soon as its parent has."""
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="sqlqueue parent", daemon=True).start()


def _address(task: Task[..., Any]) -> tuple[str, str]:
    return task.function.__module__, task.function.__qualname__


def _find(module: str, name: str) -> "Task[..., Any]":
    """Import a task. Raises TypeError if there is something else where its function was defined."""
    found: Any = reduce(getattr, name.split("."), importlib.import_module(module))
    if not isinstance(found, Task):
        raise TypeError(f"{module}.{name} is no task: a process finds tasks by the function's name")
    return found


def _serve(pipe: "Connection[Any, Any]") -> None:
    """Be a child: take runs from the pipe one by one, and say how each ended."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    pipe.send(None)
    while True:
        try:
            (module, name), row, claimed = pipe.recv()
        except EOFError:
            return
        run = Run(SimpleNamespace(**row), None, Store(), claimed)
        try:
            run.registered = _find(module, name)
            ended = perform.alone(run)
        except Exception as error:  # importing runs user code
            ended = run.failed(error)
        pipe.send((ended, resident_bytes()))


def resident_bytes() -> int:
    """Return the memory this process has now; where the system does not tell, its peak.

    On Linux the peak will not do: a process inherits that of the parent that started it.
    """
    try:
        pages = Path("/proc/self/statm").read_text("ascii").split()[1]
        return int(pages) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
