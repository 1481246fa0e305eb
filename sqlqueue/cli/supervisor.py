"""The parent of worker processes: starts them, replaces them, and sees at once when one dies.

It runs no user code but hooks. It hands the jobs of a dead child back without waiting for its ttl,
beats for a child whose code holds the interpreter's lock, and keeps one probe process of a database
while there are suspects: jobs that took two workers down, which run there alone. It starts another
child while none has room, stops one when there is room to spare, and replaces those that are old or
large. What it does in a database has a thread of its own: one that is down holds up nothing else.
"""

import logging
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.sharedctypes import RawArray
from time import monotonic
from typing import Any

from sqlqueue.cli.crew import Load, Served, Signs, serve
from sqlqueue.link import DatabaseError, Link
from sqlqueue.process import SPAWN, resident_bytes
from sqlqueue.runs import tell
from sqlqueue.store import Executes
from sqlqueue.worker import WorkerOptions

log = logging.getLogger("sqlqueue.supervisor")
LOOK_EVERY = 0.2  # seconds
RESTART_AFTER = 1.0  # seconds between two starts of a child that keeps dying
SILENT_TTLS = 10  # a child that gives no sign for this many ttl is killed


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


class _StandIn:
    """Does in one database what worker processes cannot: has a thread and a connection for it.

    dead    workers whose leases are to be handed back, and until when to try
    silent  the signs of those to beat for
    """

    def __init__(self, served: Served, ttl: timedelta) -> None:
        self.served = served
        self.dead: dict[int, float] = {}
        self.silent: dict[int, Signs] = {}
        self.wakes = threading.Event()
        self._queue = served.load()
        self._store = self._queue.store
        self._ttl = ttl
        self._link = Link(self._queue.engine, self._store)
        threading.Thread(target=self._work, name="sqlqueue stand-in", daemon=True).start()

    def bury(self, worker: int) -> None:
        """Have the leases of a worker that has died handed back; for a ttl, then others do it."""
        self.dead[worker] = monotonic() + self._ttl.total_seconds()
        self.wakes.set()

    def beat_for(self, signs: Signs) -> None:
        """Have a beat for a worker that is silent."""
        self.silent[signs.worker_id] = signs
        self.wakes.set()

    @property
    def is_needed(self) -> bool:
        """Whether there are leases to hand back, and time to."""
        return any(until > monotonic() for until in list(self.dead.values()))

    def _work(self) -> None:
        while True:
            self.wakes.wait(LOOK_EVERY if self.dead else None)
            self.wakes.clear()
            for worker in list(self.dead):
                self._rescue(worker)
            for worker in list(self.silent):
                self._beat(worker, self.silent.pop(worker))

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
            del self.dead[worker]
        for one in ended:
            log.warning("job %s: run %d crashed: %s", one.job_id, one.run, one.error)
        if self._queue.after_run:
            threading.Thread(target=tell, args=(self._queue.after_run, ended), daemon=True).start()

    @contextmanager
    def _transaction(self) -> Iterator[Executes]:
        """Lend a connection; break it if there is no answer within two thirds of a ttl."""
        alarm = threading.Timer(self._ttl.total_seconds() * 2 / 3, self._link.cut)
        alarm.start()
        try:
            with self._link.begin(self._ttl) as conn:
                yield conn
        finally:
            alarm.cancel()

    def _beat(self, worker: int, signs: Signs) -> None:
        try:
            with self._transaction() as conn:
                is_alive = self._store.beat(conn, worker, None)
            if is_alive:
                signs.is_full = True  # it takes no turns either; its next one says anew
        except DatabaseError as error:
            log.warning("no beat for worker %d: %s", worker, error)


@dataclass(eq=False)
class _Child:
    options: WorkerOptions
    stand_ins: Sequence[_StandIn]
    signs: Any  # an array: for each of these, those of its worker here
    process: Any
    started_at: float
    ends_at: float
    is_leaving: bool = False  # was told to stop, and goes on without being counted

    @property
    def is_probe(self) -> bool:
        return self.options.suspects == "only"

    @property
    def is_full(self) -> bool:
        return any(one.is_full for one in self.signs)

    @property
    def held(self) -> int:
        return sum(one.held for one in self.signs)

    @property
    def ids(self) -> list[int]:
        """The workers in it that have registered."""
        return [one.worker_id for one in self.signs if one.worker_id]


class Supervisor:
    """Keeps worker processes of the queues, and a probe when one is wanted.

    load    returns the Queue; called in each child, so it must be importable
    others  applications with databases of their own that the same processes serve
    """

    def __init__(
        self,
        load: Load,
        names: Sequence[str],
        options: WorkerOptions,
        processes: Processes,
        others: Sequence[Served] = (),
    ) -> None:
        self._processes = processes
        self._options = replace(options, suspects="never")
        served = [Served(load, names), *others]
        self._stand_ins = [_StandIn(one, options.ttl) for one in served]
        self._children: list[_Child] = []
        self._starts = [0.0] * processes.least  # when to start another worker, monotonic
        self._most = processes.most or processes.least
        self._had_room_at = self._had_need_at = monotonic()
        self._signals = 0

    def run(self) -> int:
        """Work until stopped by SIGTERM or SIGINT, or until every child has ended; return 0.

        The first signal lets jobs end within the grace period, a second one ends them now.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)
        while self._children or self._starts or any(one.is_needed for one in self._stand_ins):
            for at in [at for at in self._starts if at <= monotonic() or self._signals]:
                self._starts.remove(at)
                self._start(self._options, self._stand_ins)
            connection.wait([child.process.sentinel for child in self._children], LOOK_EVERY)
            for child in list(self._children):
                if child.process.is_alive():
                    self._watch(child)
                else:
                    self._bury(child)
            if not self._signals:
                self._adapt(monotonic())
        return 0

    def _start(self, options: WorkerOptions, stand_ins: Sequence[_StandIn]) -> None:
        if self._signals:
            return
        now, age = monotonic(), self._processes.max_age
        ends_at = now + age.total_seconds() * random.uniform(0.9, 1.1) if age else float("inf")
        signs = RawArray(Signs, [(0, now)] * len(stand_ins))
        served = [one.served for one in stand_ins]
        process = SPAWN.Process(target=serve, args=(served, options, signs), name="sqlqueue worker")
        process.start()
        self._children.append(_Child(options, stand_ins, signs, process, now, ends_at))
        if self._signals:  # came while it started
            process.terminate()

    def _pass_on(self, *_: object) -> None:
        self._signals += 1
        for child in self._children:
            if self._signals > 1 or not child.is_leaving:
                child.process.terminate()

    def _adapt(self, now: float) -> None:
        """Start another worker, or stop one, by the room that there is for jobs."""
        workers = [one for one in self._children if not (one.is_probe or one.is_leaving)]
        count, held = len(workers) + len(self._starts), sum(child.held for child in workers)
        have_begun = workers and not self._starts and all(child.ids for child in workers)
        if not have_begun or not all(child.is_full for child in workers):
            self._had_room_at = now
        if not have_begun or held > 0.8 * self._options.slots * (count - 1):
            self._had_need_at = now  # what starts is wanted
        full = now - self._had_room_at
        if full > self._processes.grow_after.total_seconds() and count < self._most:
            log.info("all %d worker processes are full: one more", count)
            self._starts.append(now)
        spare = now - self._had_need_at
        if spare > self._processes.shrink_after.total_seconds() and count > self._processes.least:
            log.info("there is room in %d worker processes: one less", count)
            # The youngest of those that have least to end: a job that outlasts grace starts anew.
            self._retire(min(reversed(workers), key=lambda child: child.held))
            self._had_need_at = now

    def _retire(self, child: _Child) -> None:
        child.is_leaving = True
        child.process.terminate()

    def _bury(self, child: _Child) -> None:
        """Have the jobs of a child that has ended handed back; replace it if it should go on."""
        self._children.remove(child)
        is_counted = not (child.is_leaving or child.is_probe)
        if child.process.exitcode == 0:
            # One that has stopped by itself, drained or after so many jobs, is not replaced.
            self._most -= is_counted
            return
        log.error("a worker process ended with exit code %s", child.process.exitcode)
        for stand_in, signs in zip(child.stand_ins, child.signs, strict=True):
            if signs.worker_id:
                stand_in.bury(signs.worker_id)
        if is_counted:
            self._starts.append(child.started_at + RESTART_AFTER)

    def _watch(self, child: _Child) -> None:
        ttl, now = self._options.ttl.total_seconds(), monotonic()
        if now - max(one.beat_at for one in child.signs) > SILENT_TTLS * ttl:
            log.critical("worker %s gives no sign: killed", child.ids)
            child.process.kill()
        for stand_in, signs in zip(child.stand_ins, child.signs, strict=True):
            if signs.worker_id and now - signs.beat_at > ttl / 3:
                stand_in.beat_for(signs)
            if signs.wants_probe:
                signs.wants_probe = False
                self._probe(stand_in)
        if not (self._signals or child.is_leaving or child.is_probe):
            self._renew(child, now)

    def _probe(self, stand_in: _StandIn) -> None:
        """Start a process for the suspects of a database, if there is none."""
        if not any(one.is_probe and stand_in in one.stand_ins for one in self._children):
            options = replace(self._options, slots=1, suspects="only", drain=True)
            self._start(options, [stand_in])

    def _renew(self, child: _Child, now: float) -> None:
        """Replace a worker process that is old or large."""
        age, size = now - child.started_at, resident_bytes(child.process.pid)
        is_worn = now > child.ends_at or size > (self._processes.max_bytes or size)
        if is_worn and child.ids and age >= RESTART_AFTER:
            text = "worker %s, %.0f s old, with %d MiB: replaced"
            log.info(text, child.ids, age, size >> 20)
            self._retire(child)
            self._starts.append(now)
