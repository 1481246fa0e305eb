"""Be a worker process: one worker, or one for each of several databases, which share its slots.

Several share nothing else. Each has threads, connections and a row of its own, as if it were alone:
a database that is down or hangs holds up its own worker only, which begins anew until it is back.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import Structure, c_bool, c_double, c_int64
from dataclasses import replace
from functools import partial
from time import monotonic, sleep
from typing import Any, NamedTuple

from sqlqueue.metrics import Probes
from sqlqueue.process import die_with_parent
from sqlqueue.queue import Queue
from sqlqueue.worker import AHEAD, Worker, WorkerOptions

log = logging.getLogger("sqlqueue.worker")
SWITCH_EVERY = 0.0001  # seconds: turns wait for the interpreter's lock behind tasks; 0.005 is usual
FAILED = 70  # exit code of a process whose worker could not go on
STUCK = 75  # of one that is to be replaced by a fresh one
BEGIN_EVERY = 1.0  # seconds between two beginnings of a worker
TURN = 1.0  # seconds: whose turn takes longer, or whose last one is longer ago, nobody waits for
CONNECT = "10"  # seconds to connect within, unless the url or the environment says otherwise
Load = Callable[[], Queue]


class Signs(Structure):
    """What a worker tells its parent, in shared memory: it needs neither's cooperation."""

    _fields_ = [
        ("worker_id", c_int64), ("beat_at", c_double), ("wants_probe", c_bool),
        ("held", c_int64), ("is_full", c_bool),
    ]  # fmt: skip


class Served(NamedTuple):
    """An application whose jobs are run.

    load   returns its Queue; called in each process, so it must be importable
    names  of the queues served
    """

    load: Load
    names: Sequence[str]


def serve(served: Sequence[Served], options: WorkerOptions, signs: Any) -> None:
    """Work until told to stop; `signs` are an array, one for each application."""
    die_with_parent()
    sys.setswitchinterval(SWITCH_EVERY)
    if len(served) > 1:
        os.environ.setdefault("PGCONNECT_TIMEOUT", CONNECT)
        worker: Worker | Crew = Crew(served, options, signs)
    else:
        worker = Worker(served[0].load(), served[0].names, options, signs[0])
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    if port := os.environ.get("SQLQUEUE_PROBES"):
        Probes(int(port), lambda: worker.workers if isinstance(worker, Crew) else [worker])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent passes it on
    if code := worker.run() if isinstance(worker, Crew) else run(worker):
        os._exit(code)  # threads that do not end would keep this process


def run(worker: Worker) -> int:
    """Have a worker work until it has stopped; return the exit code."""
    worker.start()
    while not worker.stopped.wait(0.5):  # a signal may not wake it
        pass
    if worker.error:
        return FAILED
    worker.join()
    return STUCK if worker.runs.is_stuck else 0


class _Member:
    """A worker of the crew, with what is known of it; another one takes its place if it fails.

    wants     whether it had more jobs than slots after its last turn
    told_at   when that was
    began_at  when its turn under way began, if there is one
    """

    def __init__(self, served: Served, signs: Signs) -> None:
        self.queue = served.load()
        self.names = served.names
        self.signs = signs
        self.held = 0
        self.is_done = False

    def begin(self, crew: "Crew", options: WorkerOptions) -> None:
        self.worker = Worker(self.queue, self.names, options, self.signs)
        self.worker.around_turn = partial(crew.turn, self)
        self.told_at = self.began_at = float("-inf")
        self.wants = False

    def wants_now(self, now: float) -> bool:
        return self.wants and now - self.told_at < TURN

    def charge(self, now: float) -> int:
        """Return the slots that are not for others; the one to look for work with is nobody's."""
        lent = self.worker.slots - (not self.wants_now(now))
        return max(self.worker.running, lent if now - self.began_at < TURN else 0)


class Crew:
    """Workers of several databases in one process.

    A worker borrows slots for a turn, and has those of the jobs that it runs afterwards. Those that
    want more get equal shares of what the others leave, at least one each, and so all slots if
    nobody else has work. To see that it has work again, a worker may always start one job more than
    the others leave it; the rest of its share comes back as their jobs end. `stop()` and `run()`
    are as those of a worker; `run` returns the exit code.
    """

    def __init__(self, served: Sequence[Served], options: WorkerOptions, signs: Any) -> None:
        self._options = replace(options, drain=False, max_jobs=None)
        self._slots, self._drains, self._max_jobs = options.slots, options.drain, options.max_jobs
        self._members = [_Member(*one) for one in zip(served, signs, strict=True)]
        self._lock = threading.Lock()
        self._stops = 0
        self._has_failed = False
        self._taken = 0  # jobs claimed by workers that have failed
        self._busy_at = 0.0  # when one of them was last seen with a job
        for member in self._members:
            member.begin(self, self._options)

    @property
    def workers(self) -> list[Worker]:
        """The worker of each database."""
        return [one.worker for one in self._members]

    def stop(self) -> None:
        """Stop claiming; return. What runs has the grace period; called again, none."""
        self._stops += 1
        for worker in self.workers:
            worker.stop()

    def run(self) -> int:
        """Work until all have stopped, or one is stuck; return the exit code of the process."""
        for member in self._members:
            threading.Thread(target=self._keep, args=(member,), daemon=True).start()
        while any(self._is_awaited(member) for member in self._members):
            sleep(0.2)
            for member in self._members:
                if member.wants:
                    member.worker.wake()  # to say so again
        if self._has_failed or not all(one.is_done or not one.worker.id for one in self._members):
            return FAILED
        return STUCK if any(worker.runs.is_stuck for worker in self.workers) else 0

    def _is_awaited(self, member: _Member) -> bool:
        """Whether it works, or is to stop in good order; not if it cannot, its database being down.

        After a second signal it has a poll and a turn, for its last word.
        """
        if member.is_done or not self._stops:
            return not member.is_done
        patience = self._options.poll.total_seconds() + TURN
        is_late = self._stops > 1 and monotonic() - member.worker.progress > patience
        return member.worker.id > 0 and not is_late

    def _keep(self, member: _Member) -> None:
        """Have a worker for it until all stop: another one if it fails, or cannot begin."""
        from sqlqueue.integrations.alembic import check

        engine, schema = member.queue.engine, member.queue.store.schema
        while not self._stops:
            worker = member.worker
            try:
                check(engine, schema)
                worker.start()
            except Exception as error:
                url = engine.url
                log.warning("no worker for database %s on %s: %s", url.database, url.host, error)
            else:
                worker.stopped.wait()
                if worker.error is None:
                    worker.join()
                    break
                self._replace(member)
            sleep(BEGIN_EVERY)
        member.is_done = True
        if not self._stops:
            self.stop()  # it is stuck: the process is to be replaced

    def _replace(self, member: _Member) -> None:
        """Put a new worker in the place of one that has failed."""
        failed = member.worker
        with self._lock:
            if self._stops:
                self._has_failed = True  # the parent hands back its jobs
            else:
                member.signs.worker_id = 0  # the parent does not beat for it
            self._taken += failed.taken
            member.begin(self, self._options)
        for link in (failed.link, failed.heartbeat.link, failed.upkeep.link):
            link.cut()
        failed.runs.interrupt_all()
        failed.runs.stop()

    @contextmanager
    def turn(self, member: _Member) -> Iterator[None]:
        """Lend a worker slots for a turn; take note of how it is after it."""
        with self._lock:
            now, worker = monotonic(), member.worker
            worker.slots, member.began_at = self._share(member, now), now
            worker.ahead = AHEAD if worker.slots >= self._slots else 0
            worker.left = max(self._left() // len(self._members), self._left() > 0)
        yield
        with self._lock:
            member.began_at = float("-inf")
            self._note(member, monotonic())

    def _share(self, member: _Member, now: float) -> int:
        """Return the slots that a worker may have: as many as others that want more."""
        eager = [one for one in self._members if one is member or one.wants_now(now)]
        others = sum(one.charge(now) for one in self._members if one not in eager)
        share, more = divmod(max(self._slots - others, 0), len(eager))
        free = self._slots - sum(one.charge(now) for one in self._members if one is not member)
        least = 1 if member.wants_now(now) else member.worker.running + 1
        return max(least, min(share + (eager.index(member) < more), free))

    def _note(self, member: _Member, now: float) -> None:
        signs = member.signs
        member.wants = signs.is_full or signs.held >= member.worker.slots
        member.told_at = now
        if signs.held or member.held:
            self._busy_at = now
        member.held = signs.held
        running = sum(worker.running for worker in self.workers)
        for one in self._members:
            one.signs.is_full = running >= self._slots
            if one.wants_now(now) and self._share(one, now) > one.worker.slots:
                one.worker.wake()
        if not self._stops and (self._is_drained() or (self._left() <= 0 and not running)):
            self.stop()

    def _left(self) -> int:
        """Return how many more jobs may be claimed."""
        taken = self._taken + sum(worker.taken for worker in self.workers)
        return sys.maxsize if self._max_jobs is None else self._max_jobs - taken

    def _is_drained(self) -> bool:
        """Whether to stop, each having found nothing to do since one of them last had a job.

        A job of one may have enqueued another one there.
        """
        return self._drains and all(one.idle_at > self._busy_at for one in self.workers)
