"""The parent of worker processes: starts them, replaces them, and sees at once when one dies.

It runs no user code but hooks. It hands the jobs of a dead child back without waiting for its ttl,
beats for a child whose code holds the interpreter's lock, and keeps one probe process while there
are suspects: jobs that took two workers down, which run there alone. It starts another child while
none has room, stops one when there is room to spare, and replaces those that are old or large.
"""

import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import Structure, c_bool, c_double, c_int64
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from multiprocessing import connection
from multiprocessing.sharedctypes import RawValue
from time import monotonic
from typing import Any, NamedTuple

from sqlqueue.link import DatabaseError, Link
from sqlqueue.process import SPAWN, die_with_parent, resident_bytes
from sqlqueue.queue import Queue
from sqlqueue.runs import tell
from sqlqueue.store import Executes
from sqlqueue.worker import Worker, WorkerOptions

log = logging.getLogger("sqlqueue.supervisor")
LOOK_EVERY = 0.2  # seconds
RESTART_AFTER = 1.0  # seconds between two starts of a child that keeps dying
SWITCH_EVERY = 0.0001  # seconds: turns wait for the interpreter's lock behind tasks; 0.005 is usual
STUCK = 75  # exit code of a child that is to be replaced
SILENT_TTLS = 10  # a child that gives no sign for this many ttl is killed
Load = Callable[[], Queue]


class Signs(Structure):
    """What a child tells its parent, in shared memory: it needs neither's cooperation."""

    _fields_ = [
        ("worker_id", c_int64), ("beat_at", c_double), ("wants_probe", c_bool),
        ("held", c_int64), ("is_full", c_bool),
    ]  # fmt: skip


@dataclass(frozen=True)
class Processes:
    """How many worker processes there are, and when one is replaced by another.

    least, most   there are; None: as many as `least`
    max_age       of a process, give or take a tenth; None: no limit
    max_bytes     of its resident memory; None: no limit
    grow_after    without room for one more job in any of them, another is started
    shrink_after  with room enough in one less, one is stopped
    """

    least: int = 1
    most: int | None = None
    max_age: timedelta | None = None
    max_bytes: int | None = None
    grow_after: timedelta = timedelta(seconds=1)
    shrink_after: timedelta = timedelta(seconds=30)

    def __post_init__(self) -> None:
        if not 1 <= self.least <= (self.least if self.most is None else self.most):
            raise ValueError(f"need 1 or more processes, the lower number first, got {self}")
        if self.max_age == timedelta(0) or self.max_bytes == 0:
            raise ValueError(f"max_age and max_bytes must be more than 0, or None, got {self}")


class _Child(NamedTuple):
    options: WorkerOptions
    signs: Any
    process: Any
    started_at: float
    ends_at: float


class Supervisor:
    """Keeps worker processes of the queues, and a probe when one is wanted.

    load  returns the Queue; called in each child, so it must be importable
    """

    def __init__(
        self, load: Load, names: Sequence[str], options: WorkerOptions, processes: Processes
    ) -> None:
        self._processes = processes
        self._serve = partial(_serve, load, names)
        self._options = replace(options, suspects="never")
        queue = self._queue = load()
        self._store = queue.store
        self._link = Link(queue.engine, queue.store)
        self._children: list[_Child] = []
        self._starts = [0.0] * processes.least  # when to start another worker, monotonic
        self._most = processes.most or processes.least
        self._leaving: set[int] = set()  # processes told to stop, which go on without being counted
        self._had_room_at = self._had_need_at = monotonic()
        self._dead: set[int] = set()  # workers whose leases are to be handed back
        self._signals = 0

    def run(self) -> int:
        """Work until stopped by SIGTERM or SIGINT, or until every child has ended; return 0.

        The first signal lets jobs end within the grace period, a second one ends them now.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)
        while self._children or self._starts or self._dead:
            due = [at for at in self._starts if at <= monotonic() or self._signals]
            for at in due:
                self._starts.remove(at)
                self._start(self._options)
            connection.wait([child.process.sentinel for child in self._children], LOOK_EVERY)
            for child in list(self._children):
                if child.process.is_alive():
                    self._watch(child)
                else:
                    self._bury(child)
            for worker in list(self._dead):
                self._rescue(worker)
            if not self._signals:
                self._adapt(monotonic())
        self._link.close()
        return 0

    def _start(self, options: WorkerOptions) -> None:
        if self._signals:
            return
        now, age = monotonic(), self._processes.max_age
        ends_at = now + age.total_seconds() * random.uniform(0.9, 1.1) if age else float("inf")
        signs = RawValue(Signs, 0, now, False)
        process = SPAWN.Process(target=self._serve, args=(options, signs), name="sqlqueue worker")
        process.start()
        self._children.append(_Child(options, signs, process, now, ends_at))
        if self._signals:  # came while it started
            process.terminate()

    def _pass_on(self, *_: object) -> None:
        self._signals += 1
        for child in self._children:
            if self._signals > 1 or child.process.pid not in self._leaving:
                child.process.terminate()

    @property
    def _workers(self) -> list[_Child]:
        """The children that are to stay, without a probe."""
        mine = [child for child in self._children if child.options.suspects != "only"]
        return [child for child in mine if child.process.pid not in self._leaving]

    def _adapt(self, now: float) -> None:
        """Start another worker, or stop one, by the room that there is for jobs."""
        workers, slots = self._workers, self._options.slots
        count = len(workers) + len(self._starts)
        if self._starts or not workers or not all(child.signs.is_full for child in workers):
            self._had_room_at = now
        held = sum(child.signs.held for child in workers)
        starts = self._starts or not all(child.signs.worker_id for child in workers)
        if starts or held > 0.8 * slots * (count - 1):
            self._had_need_at = now  # what starts is wanted
        full = now - self._had_room_at
        if full > self._processes.grow_after.total_seconds() and count < self._most:
            log.info("all %d worker processes are full: one more", count)
            self._starts.append(now)
        spare = now - self._had_need_at
        if spare > self._processes.shrink_after.total_seconds() and count > self._processes.least:
            log.info("there is room in %d worker processes: one less", count)
            # The youngest of those that have least to end: a job that outlasts grace starts anew.
            self._retire(min(reversed(workers), key=lambda child: child.signs.held))
            self._had_need_at = now

    def _retire(self, child: _Child) -> None:
        self._leaving.add(child.process.pid)
        child.process.terminate()

    def _bury(self, child: _Child) -> None:
        """Have the jobs of a child that has ended handed back; replace it if it should go on."""
        self._children.remove(child)
        was_leaving = child.process.pid in self._leaving
        self._leaving.discard(child.process.pid)
        if child.process.exitcode == 0:
            # One that has stopped by itself, drained or after so many jobs, is not replaced.
            self._most -= not was_leaving and child.options.suspects != "only"
            return
        log.error("a worker process ended with exit code %s", child.process.exitcode)
        if child.signs.worker_id:
            self._dead.add(child.signs.worker_id)
        if child.options.suspects != "only" and not was_leaving:
            self._starts.append(child.started_at + RESTART_AFTER)

    def _rescue(self, worker: int) -> None:
        """Hand back what a dead worker holds; again, while its last transaction still ends."""
        try:
            with self._transaction() as conn:
                ended = self._store.rescue(conn, 10_000, worker)
                left = self._store.leases(conn, worker, None)
        except DatabaseError as error:
            log.error("worker %d died; its jobs are rescued after its ttl: %s", worker, error)
            ended, left = [], {}
        if not left:
            self._dead.discard(worker)
        for one in ended:
            log.warning("job %s: run %d crashed: %s", one.job_id, one.run, one.error)
        if self._queue.after_run:
            threading.Thread(target=tell, args=(self._queue.after_run, ended), daemon=True).start()

    @contextmanager
    def _transaction(self) -> Iterator[Executes]:
        """Lend a connection; break it if there is no answer within two thirds of a ttl."""
        alarm = threading.Timer(self._options.ttl.total_seconds() * 2 / 3, self._link.cut)
        alarm.start()
        try:
            with self._link.begin(self._options.ttl) as conn:
                yield conn
        finally:
            alarm.cancel()

    def _watch(self, child: _Child) -> None:
        ttl = self._options.ttl.total_seconds()
        silent = monotonic() - child.signs.beat_at
        if silent > SILENT_TTLS * ttl:
            log.critical("worker %d gives no sign: killed", child.signs.worker_id)
            child.process.kill()
        elif silent > ttl / 3 and child.signs.worker_id:
            self._beat_for(child)
        self._renew(child, monotonic())
        if child.signs.wants_probe:
            child.signs.wants_probe = False
            if all(other.options.suspects != "only" for other in self._children):
                self._start(replace(self._options, slots=1, suspects="only", drain=True))

    def _renew(self, child: _Child, now: float) -> None:
        """Replace a worker process that is old or large."""
        age = now - child.started_at
        if self._signals or age < RESTART_AFTER or child not in self._workers:
            return
        limit, size = self._processes.max_bytes, resident_bytes(child.process.pid)
        is_large = limit is not None and size > limit
        if child.signs.worker_id and (is_large or now > child.ends_at):
            what = (child.signs.worker_id, age, size >> 20)
            log.info("worker %d, %.0f s old, with %d MiB: replaced", *what)
            self._retire(child)
            self._starts.append(now)

    def _beat_for(self, child: _Child) -> None:
        try:
            with self._transaction() as conn:
                is_alive = self._store.beat(conn, child.signs.worker_id)
            if is_alive:
                child.signs.is_full = True  # it takes no turns either; its next one says anew
        except DatabaseError as error:
            log.warning("no beat for worker %d: %s", child.signs.worker_id, error)


def _serve(load: Load, names: Sequence[str], options: WorkerOptions, signs: Any) -> None:
    """Be a child: work until told to stop."""
    die_with_parent()
    sys.setswitchinterval(SWITCH_EVERY)
    worker = Worker(load(), names, options, signs)
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent passes it on
    worker.run()
    if worker.runs.is_stuck:
        os._exit(STUCK)  # threads that do not end would keep this process
