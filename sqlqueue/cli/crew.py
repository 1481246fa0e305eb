"""Be a worker process: one worker, or one for each of several databases, which share its slots.

Several share nothing else. Each has threads, connections and a row of its own, as if it were alone:
a database that is down or hangs holds up its own worker only, which begins anew until it is back.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from ctypes import Structure, c_bool, c_double, c_int64
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any, NamedTuple

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
    """What a worker tells its parent, in shared memory: it needs neither's cooperation.

    told  called after each turn
    """

    _fields_ = [
        ("worker_id", c_int64), ("beat_at", c_double), ("wants_probe", c_bool),
        ("held", c_int64), ("is_full", c_bool),
    ]  # fmt: skip
    told: Callable[[], object] | None = None

    def tell(self, held: int, is_full: bool) -> None:
        """Say after a turn how many jobs are held, and whether there is no room for one more."""
        self.held, self.is_full = held, is_full
        if self.told:
            self.told()


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

    wants      whether it had more jobs than slots after its last turn
    told_at    when that was
    bound      slots that its turn under way may count on: more than it has if some were taken away
    lowered_at when they were
    """

    def __init__(self, served: Served, signs: Signs, ahead: int) -> None:
        self.queue = served.load()
        self.names = served.names
        self.signs = signs
        self.ahead = ahead
        self.held = 0
        self.is_done = False

    def begin(self, options: WorkerOptions) -> None:
        self.worker = Worker(self.queue, self.names, options, self.signs)
        self.worker.slots = self.bound = 1
        self.worker.ahead = 0
        self.told_at = self.lowered_at = float("-inf")
        self.wants = False

    def take(self, slots: int, now: float) -> None:
        """Have so many slots from the next turn on."""
        if slots < self.worker.slots and self.bound == self.worker.slots:
            self.lowered_at = now
        self.bound = max(self.bound, slots)
        if slots != self.worker.slots:
            self.worker.ahead = self.ahead if slots >= self.worker.options.slots else 0
            self.worker.slots = slots
            self.worker.wake()

    def wants_now(self, now: float) -> bool:
        return self.wants and now - self.told_at < TURN

    def charge(self, now: float) -> int:
        """Return the slots that are not for others; the one to look for work with is nobody's."""
        is_sure = self.bound == self.worker.slots or now - self.lowered_at > TURN
        slots = self.worker.slots if is_sure else self.bound
        return max(self.worker.running, slots - (not self.wants_now(now)))


class Crew:
    """Workers of several databases in one process.

    Those that want more slots than they have get equal shares of what the others leave, at least
    one each, and so all slots if nobody else has work. To see that it has work again, a worker may
    always start one job more than the others leave it; the rest of its share comes back as their
    jobs end. `stop()` and `run()` are as those of a worker; `run` returns the exit code.
    """

    def __init__(self, served: Sequence[Served], options: WorkerOptions, signs: Any) -> None:
        self._options = replace(options, drain=False, max_jobs=None)
        self._slots, self._drains, self._max_jobs = options.slots, options.drain, options.max_jobs
        # Without a slot for them, jobs claimed ahead would be runs too many.
        ahead = 0 if self._max_jobs else AHEAD
        self._members = [_Member(*one, ahead) for one in zip(served, signs, strict=True)]
        self._lock = threading.Lock()
        self._ends = threading.Event()
        self._stopping = threading.Event()
        self._stops = 0
        self._has_failed = False
        self._taken = 0  # jobs claimed by workers that have failed
        self._busy_at = 0.0  # when one of them was last seen with a job
        for member in self._members:
            member.begin(self._options)
            member.signs.told = partial(self._told, member)

    def stop(self) -> None:
        """Stop claiming; return. What runs has the grace period; called again, none."""
        self._stops += 1
        self._stopping.set()
        for member in self._members:
            member.worker.stop()

    def run(self) -> int:
        """Work until all have stopped, or one is stuck; return the exit code of the process."""
        for member in self._members:
            threading.Thread(target=self._keep, args=(member,), daemon=True).start()
        while any(self._is_awaited(member) for member in self._members):
            self._ends.wait(0.2)
            self._ends.clear()
            for member in self._members:
                if member.wants:
                    member.worker.wake()  # to say so again
        if self._has_failed or not all(one.is_done or not one.worker.id for one in self._members):
            return FAILED
        return STUCK if any(one.worker.runs.is_stuck for one in self._members) else 0

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
        while not self._stops:
            worker = member.worker
            try:
                self._start(member)
            except Exception as error:
                url = member.queue.engine.url
                log.warning("no worker for database %s on %s: %s", url.database, url.host, error)
                self._stopping.wait(BEGIN_EVERY)
                continue
            worker.stopped.wait()
            if worker.error is None:
                worker.join()
                break
            self._replace(member)
            self._stopping.wait(BEGIN_EVERY)
        member.is_done = True
        if not self._stops:
            self.stop()  # it is stuck: the process is to be replaced
        self._ends.set()

    def _start(self, member: _Member) -> None:
        from sqlqueue.integrations.alembic import check

        check(member.queue.engine, member.queue.store.schema)
        member.worker.start()

    def _replace(self, member: _Member) -> None:
        """Put a new worker in the place of one that has failed."""
        failed = member.worker
        with self._lock:
            if self._stops:
                self._has_failed = True  # the parent hands back its jobs
            else:
                member.signs.worker_id = 0  # the parent does not beat for it
            self._taken += failed.taken
            member.begin(self._options)
        for link in (failed.link, failed.heartbeat.link, failed.upkeep.link):
            link.cut()
        failed.runs.interrupt_all()
        failed.runs.stop()

    # After each turn

    def _told(self, member: _Member) -> None:
        """Take note of how a worker is after a turn, and share the slots out again."""
        with self._lock:
            now, signs = monotonic(), member.signs
            member.told_at, member.bound = now, member.worker.slots
            member.wants = signs.is_full or signs.held >= member.worker.slots
            if signs.held or member.held:
                self._busy_at = now
            member.held = signs.held
            if self._stops:
                return
            running = sum(one.worker.running for one in self._members)
            left = self._left()
            if (self._drains and self._are_idle()) or (left <= 0 and not running):
                self.stop()
            else:
                self._share(min(self._slots, running + left) if left > 0 else 0, now)

    def _left(self) -> int:
        """Return how many more jobs may be claimed."""
        taken = self._taken + sum(one.worker.taken for one in self._members)
        return sys.maxsize if self._max_jobs is None else self._max_jobs - taken

    def _are_idle(self) -> bool:
        """Whether each has found nothing to do since one of them last had a job.

        A job of one may have enqueued another one there.
        """
        return all(one.worker.idle_at > self._busy_at for one in self._members)

    def _share(self, slots: int, now: float) -> None:
        """Give equal shares to those that want more, of what the others do not use."""
        eager, least = [one for one in self._members if one.wants_now(now)], min(slots, 1)
        for one in self._members:
            if one not in eager and (eager or not slots):
                one.take(min(one.worker.slots, one.worker.running + least), now)
        left = slots - sum(one.charge(now) for one in self._members if one not in eager)
        share, more = divmod(max(left, 0), len(eager) or 1)
        shares = [max(least, share + (place < more)) for place in range(len(eager))]
        for one, most in zip(eager, shares, strict=True):
            one.take(min(one.worker.slots, most), now)
        for one, most in zip(eager, shares, strict=True):
            free = slots - sum(other.charge(now) for other in self._members if other is not one)
            one.take(max(one.worker.slots, min(most, free)), now)
        is_full = sum(one.worker.running for one in self._members) >= slots
        for one in self._members:
            one.signs.is_full = is_full
