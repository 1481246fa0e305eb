"""The parent of worker processes: starts them, replaces them, and sees at once when one dies.

It runs no user code. It hands the jobs of a dead child back without waiting for its ttl, beats
for a child whose code holds the interpreter's lock, and keeps one probe process while there are
suspects: jobs that took two workers down, which run there alone.
"""

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.sharedctypes import RawValue
from time import monotonic
from typing import TYPE_CHECKING, Any

from sqlqueue.link import DatabaseError, Link
from sqlqueue.process import SPAWN, die_with_parent
from sqlqueue.worker import Worker, WorkerOptions

if TYPE_CHECKING:
    from sqlqueue.queue import Queue

log = logging.getLogger("sqlqueue.supervisor")
LOOK_EVERY = 0.2  # seconds
RESTART_AFTER = 1.0  # seconds between two starts of a child that keeps dying
SWITCH_EVERY = 0.0005  # seconds: turns wait for the interpreter's lock behind tasks; 0.005 is usual
STUCK = 75  # exit code of a child that is to be replaced
SILENT_TTLS = 10  # a child that gives no sign for this many ttl is killed


class Signs(ctypes.Structure):
    """What a child tells its parent, in shared memory: it needs neither's cooperation."""

    _fields_ = [
        ("worker_id", ctypes.c_int64),
        ("beat_at", ctypes.c_double),
        ("wants_probe", ctypes.c_bool),
    ]


@dataclass
class _Child:
    options: WorkerOptions
    signs: Any
    process: Any
    started_at: float


class Supervisor:
    """Keeps `processes` workers of the queues, and a probe when one is wanted.

    load  returns the Queue; called in each child, so it must be importable
    """

    def __init__(
        self, load: Callable[[], "Queue"], names: Sequence[str], options: WorkerOptions, n: int
    ) -> None:
        self._load = load
        self._names = names
        self._options = replace(options, suspects="never")
        self._queue = load()
        self._link = Link(self._queue.engine, self._queue.store)
        self._processes = n
        self._children: list[_Child] = []
        self._signals = 0

    def run(self) -> int:
        """Work until stopped by SIGTERM or SIGINT; return 0, or 1 if a child had to be killed.

        The first signal lets jobs end within the grace period, a second one ends them now.
        """
        wake = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._pass_on(wake))
        self._children = [self._start(self._options) for _ in range(self._processes)]
        while self._children:
            connection.wait([child.process.sentinel for child in self._children], LOOK_EVERY)
            for child in list(self._children):
                if child.process.is_alive():
                    self._watch(child)
                else:
                    self._bury(child)
        self._link.close()
        return 0

    def _start(self, options: WorkerOptions) -> _Child:
        signs = RawValue(Signs, 0, monotonic(), False)
        process = SPAWN.Process(
            target=_serve, args=(self._load, self._names, options, signs), name="sqlqueue worker"
        )
        process.start()
        return _Child(options, signs, process, monotonic())

    def _pass_on(self, wake: threading.Event) -> None:
        self._signals += 1
        wake.set()
        for child in self._children:
            child.process.terminate()

    def _bury(self, child: _Child) -> None:
        """Hand back the jobs of a child that has ended, and start another if it should go on."""
        self._children.remove(child)
        child.process.join()
        if child.process.exitcode != 0:
            log.error("a worker process ended with exit code %s", child.process.exitcode)
            self._rescue(child.signs.worker_id)
        is_probe = child.options.suspects == "only"
        if not self._signals and not is_probe and child.process.exitcode != 0:
            threading.Event().wait(max(0, child.started_at + RESTART_AFTER - monotonic()))
            self._children.append(self._start(child.options))

    def _rescue(self, worker: int) -> None:
        try:
            with self._link.begin(self._options.ttl) as conn:
                ended = self._queue.store.rescue(conn, 10_000, worker)
            for one in ended:
                log.warning("job %s: run %d crashed: %s", one.job_id, one.run, one.error)
        except DatabaseError as error:
            log.error("worker %d died; its jobs are rescued after its ttl: %s", worker, error)

    def _watch(self, child: _Child) -> None:
        ttl = self._options.ttl.total_seconds()
        silent = monotonic() - child.signs.beat_at
        if silent > SILENT_TTLS * ttl:
            log.critical("worker %d gives no sign: killed", child.signs.worker_id)
            child.process.kill()
        elif silent > ttl / 3 and child.signs.worker_id:
            self._beat_for(child)
        if child.signs.wants_probe:
            child.signs.wants_probe = False
            if not self._signals and all(c.options.suspects != "only" for c in self._children):
                probe = replace(self._options, slots=1, suspects="only", drain=True)
                self._children.append(self._start(probe))

    def _beat_for(self, child: _Child) -> None:
        try:
            with self._link.begin(self._options.ttl) as conn:
                self._queue.store.beat(conn, child.signs.worker_id)
        except DatabaseError as error:
            log.warning("no beat for worker %d: %s", child.signs.worker_id, error)


def _serve(
    load: Callable[[], "Queue"], names: Sequence[str], options: WorkerOptions, signs: Any
) -> None:
    """Be a child: work until told to stop."""
    die_with_parent()
    sys.setswitchinterval(SWITCH_EVERY)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    worker = Worker(load(), names, options, signs)
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent passes it on
    worker.run()
    if worker.runs.is_stuck:
        os._exit(STUCK)  # threads that do not end would keep this process
