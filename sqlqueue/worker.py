"""A worker process: leases jobs, has them run, and finishes them.

One thread takes turns: a turn finishes what has ended and claims what fits, in one transaction.
It runs no user code and waits for nobody, and only it touches `held`.
"""

import logging
import os
import random
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psycopg

import sqlqueue
from sqlqueue.bell import Bell
from sqlqueue.flow import Flow
from sqlqueue.heartbeat import Heartbeat
from sqlqueue.lanes import Lanes, Sweeps
from sqlqueue.link import DatabaseError, Link
from sqlqueue.listener import Listener
from sqlqueue.run import Capture, Run
from sqlqueue.runs import NEVER, STALE, End, Runs
from sqlqueue.store import Ended, Executes, Lane
from sqlqueue.upkeep import LOOK_EVERY, Upkeep

if TYPE_CHECKING:
    from sqlqueue.queue import Queue

log = logging.getLogger("sqlqueue.worker")
BATCH = 500  # rows that a claim leases at most
AHEAD = 1000  # jobs claimed before there is a slot for them, at most
HORIZON = 0.03  # seconds of work claimed ahead, by how long jobs have been taking
# What a thread does, until when it may sleep, and its connection.
Part = tuple[Callable[[], float], threading.Event, Link | None]
LAST_UNKNOWN = 3600.0  # seconds that a job waits for a worker that knows its task


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """How a worker works.

    slots      jobs that run at a time
    poll       longest time between looks when idle, even if every notification is lost
    grace      time that running jobs have to end after the first signal to stop
    ttl        silence after which others take its jobs; it beats six times as often
    listen     wake on notifications; without, polling is all
    drain      stop when there is nothing to run
    max_jobs   stop after this many runs; None: never
    name       for people
    suspects   jobs that took two workers down: run them "alone" when all else has ended,
               "never", or run "only" them
    child_runs, child_bytes, child_age  runs, resident memory, and age, after which a child process
               is replaced
    """

    slots: int = 20
    poll: timedelta = timedelta(seconds=1)
    grace: timedelta = timedelta(seconds=30)
    ttl: timedelta = timedelta(seconds=30)
    listen: bool = True
    drain: bool = False
    max_jobs: int | None = None
    name: str | None = None
    suspects: str = "alone"
    child_runs: int = 1000
    child_bytes: int | None = None
    child_age: timedelta | None = None

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError(f"slots must be at least 1, got {self.slots}")
        if self.max_jobs is not None and self.max_jobs < 1:
            raise ValueError(f"max_jobs must be at least 1, or None, got {self.max_jobs}")
        if self.poll <= timedelta(0) or self.ttl < timedelta(milliseconds=500):
            raise ValueError("poll must be more than 0, ttl at least half a second")
        if self.suspects not in ("alone", "never", "only"):
            raise ValueError(f"suspects must be alone, never or only, got {self.suspects!r}")


class Worker:
    """Leases the jobs of some queues and runs them. Made by `Queue.worker`.

    Either `run()`, which returns when it has stopped, or a context manager that works in the
    background.

    slots, ahead  jobs to run at a time, and to claim before there is a slot for them
    left          jobs that may be claimed until it has taken so many as it should
    around_turn   returns a context manager entered around each turn, in which who shares a process
                  out among workers may change these
    progress      monotonic time of the last turn
    taken         jobs claimed
    idle_at       monotonic time of the last look that found nothing to do
    error         what ended a worker that should have gone on
    signs         where it says how it is to whoever watches it
    """

    def __init__(
        self, queue: "Queue", names: Iterable[str], options: WorkerOptions, signs: Any = None
    ) -> None:
        self.queue = queue
        self.options = options
        self.signs = signs or SimpleNamespace()
        self._is_watched = signs is not None
        self.lanes = Lanes.of(names)
        self.id = 0
        self.link = Link(queue.engine, queue.store)
        self.runs = Runs(self)
        self.flow = Flow()
        self.slots, self.ahead = options.slots, AHEAD
        self.left = options.max_jobs or sys.maxsize
        self.around_turn: Callable[[], AbstractContextManager[None]] = nullcontext
        self.progress = monotonic()
        self.taken = 0
        self.idle_at = 0.0
        self.stopped = threading.Event()
        self.error: Exception | None = None
        self._bell = Bell(queue.store, self.lanes.names, options.poll)
        self._unsettled: list[End] = []
        self._isolates = False
        self._wakes = threading.Event()
        self._sweeps = Sweeps(options.poll.total_seconds())
        self._gated: set[str] = set()  # queues in which jobs may have to wait
        self._admits_at = NEVER
        self._usual = 0.0  # seconds a job has been taking; 0: not known yet
        self._stop_by: float | None = None
        self._is_fenced = False
        self._sees_suspects = False
        self._threads: list[threading.Thread] = []

    # Life

    def start(self) -> None:
        """Register, and begin to work in the background."""
        self._register()
        Capture.install()
        self.heartbeat = Heartbeat(self)
        self.upkeep = Upkeep(self)
        self.listener = Listener(self)
        self._parts: list[Part] = [
            (self.heartbeat.beat, self.heartbeat.wakes, self.heartbeat.link),
            (self.heartbeat.watch, threading.Event(), None),
            (self.upkeep.look, self.upkeep.wakes, self.upkeep.link),
            (self._turn, self._wakes, self.link),
        ]
        if self.options.listen:
            self._parts.append((self.listener.listen, threading.Event(), None))
        for part in self._parts:
            name = f"sqlqueue {part[0].__qualname__}"
            thread = threading.Thread(target=self._keep, args=part, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Stop claiming; return. What runs has the grace period; called again, none."""
        grace = self.options.grace.total_seconds() if self._stop_by is None else 0
        self._stop_by = monotonic() + grace
        self.wake()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the worker has stopped; return whether it has."""
        if not self.stopped.wait(timeout):
            return False
        for thread in self._threads:
            thread.join(timeout=5)
        return True

    def run(self) -> None:
        """Work until stopped; an interrupt from the keyboard stops it, a second one at once."""
        self.start()
        while not self.stopped.is_set():
            try:
                self.stopped.wait(0.5)  # a signal may not wake it
            except KeyboardInterrupt:
                self.stop()
        if self.error:
            raise self.error
        self.join()

    def __enter__(self) -> "Worker":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.join()

    def _register(self) -> None:
        options, pid, host = self.options, os.getpid(), socket.gethostname()
        name, serves = options.name or f"{host}:{pid}", (self.lanes.names, sorted(self.queue.tasks))
        with self.link.begin(options.ttl) as conn:
            self.id = self.queue.store.register(
                conn, options.ttl, pid, options.slots, host, name, sqlqueue.__version__, *serves
            )
        self.signs.worker_id = self.id
        log.info("worker %d: serves %s", self.id, ", ".join(self.lanes.names))

    # From other threads

    def wake(self) -> None:
        """Have a turn soon."""
        if not self._wakes.is_set():
            self._wakes.set()

    def ring(self, lane: Lane | None = None) -> None:
        """Look for jobs now; in this lane too, if it is not known."""
        if lane:
            self.lanes.add(lane)
        self._bell.look()
        self.wake()

    def fence(self, why: str) -> None:
        """Drop everything and register anew: others may hold our jobs, or soon will."""
        log.warning("worker %d: %s; drops what it holds and registers anew", self.id, why)
        self._is_fenced = True
        self.runs.interrupt_all()  # at once: the next turn may hang
        self.wake()

    @property
    def running(self) -> int:
        """How many runs have not ended, or keep their slots; nearly so in another thread."""
        held, ended = len(self.runs.held), len(self.runs.over) + len(self._unsettled)
        return held - ended + len(self.runs.lingering)

    # The turn

    def _keep(self, look: Callable[[], float], wakes: threading.Event, link: Link | None) -> None:
        """Be a thread: look again and again, after the time it says, until the worker stops.

        An error that nobody foresaw ends the whole worker.
        """
        wait, failures = 0.0, 0
        try:
            while not self.stopped.is_set():
                wakes.wait(wait)
                wakes.clear()
                try:
                    wait, failures = look(), 0
                except DatabaseError as error:
                    log.warning("worker %d: %s: %s", self.id, look.__name__, error)
                    failures += 1
                    most = min(0.02 * 2 ** min(failures, 5), self.options.poll.total_seconds())
                    wait = random.uniform(0, most)
        except Exception as error:
            log.critical("worker %d: stops working", self.id, exc_info=True)
            self.error = error
            self.stopped.set()  # no more beats: its jobs are rescued
        if link:
            link.close()

    def _turn(self) -> float:
        self.progress = monotonic()
        if self._has_stopped():
            self._leave()
            return 0
        with self.around_turn():
            self.step()
            self.signs.held, self.signs.is_full = len(self.runs.held), self._room() <= 0
        return self._pause()

    def step(self) -> int:
        """Take one turn; return how many jobs it claimed."""
        if self._is_fenced:
            self._begin_anew()
        self._check(monotonic())
        self._unsettled += self.runs.take_over()
        ended = self._unsettled[: 1 if self._isolates else None]
        room, tasks = self._room(), self.queue.tasks
        if not ended and room <= 0 and not self._bell.is_in_vain:
            return 0
        try:
            with self.link.begin(self.options.ttl * 2 / 3) as conn:
                self._bell.take_down(conn, self.id)
                finished, locked = self._settle(conn, ended)
                rows = self._claim(conn, room) if room > 0 else []
                known = [row for row in rows if row.task in tasks]
                strays = [self._stray(conn, row) for row in rows if row.task not in tasks]
        except psycopg.DataError as error:
            # One outcome that cannot be stored must not hold up the others: find it, end it.
            if not ended:
                raise
            if self._isolates:
                self._unsettled[0] = (ended[0][0], ended[0][0].unstorable(error))
            self._isolates = True
            return 0
        if self._bell.has_hung:
            self._bell.has_hung = False
            self.upkeep.wakes.set()  # what was scheduled before it hung there did not ring
        self._forget(ended, finished, locked)
        for run, end in strays:
            self.runs.hold(run, end)
        self.runs.launch(known)
        return len(rows)

    def _settle(self, conn: Executes, ended: Sequence[End]) -> tuple[set[str], set[str]]:
        """Finish runs; return those that were finished, and those to be tried again."""
        store = self.queue.store
        succeeded = [one for _, one in ended if one and one.outcome == "succeeded"]
        others = [one for _, one in ended if one and one.outcome != "succeeded"]
        finished = store.finish(conn, succeeded) | store.finish(conn, others)
        left = [run.key for run, _ in ended if run.key[0] not in finished]
        return finished, store.held(conn, left) if left else set()

    def _forget(self, ended: list[End], finished: set[str], locked: set[str]) -> None:
        self._unsettled = self._unsettled[len(ended) :]
        self._isolates = bool(self._unsettled)
        done: list[End] = []
        for run, one in ended:
            if run.key[0] in locked:
                rolled_back = RuntimeError("run.finish was rolled back by the task")
                self._unsettled.append((run, one or run.failed(rolled_back)))
                continue
            self.runs.held.pop(run.key, None)
            if one is None or one.job_id in finished:
                done.append((run, one))
            else:
                why = "its end is recorded already, or the job was taken from it"
                log.warning("job %s: run %d holds its lease no more: %s", *run.key, why)
        self.flow.add(done)
        self.runs.tell(one for _, one in done if one)
        is_told = log.isEnabledFor(logging.DEBUG)
        for run, one in done:
            if one is None:
                log.debug("job %s: run %d finished its job itself", *run.key)
            elif is_told or one.outcome != "succeeded":
                self._report(one)
        rans = [ran for run, one in done if (ran := (one or run).ran) is not None]
        if rans:
            mean = sum(rans) / len(rans)
            self._usual = 0.7 * self._usual + 0.3 * mean if self._usual else mean

    def _report(self, one: Ended) -> None:
        """Log how a run ended; have upkeep look if its job is to run again soon."""
        if one.wait is not None and one.wait.total_seconds() < LOOK_EVERY:
            self.upkeep.wakes.set()
        then = "its job ended" if one.wait is None else f"again in {one.wait}"
        is_usual = one.outcome in ("succeeded", "snoozed", "returned")
        level = logging.DEBUG if is_usual else logging.WARNING
        log.log(level, "job %s: run %d %s; %s", one.job_id, one.run, one.outcome, then)

    def _room(self) -> int:
        """Say how many jobs fit: free slots, and a little work ahead if jobs are quick."""
        if self._stop_by is not None:
            return 0
        held = len(self.runs.held) - len(self._unsettled)  # what has ended is settled first
        if self._is_probing:
            return 0 if held else 1
        slots = self.slots - len(self.runs.lingering)
        ahead = min(self.ahead, int(slots * HORIZON / self._usual)) if self._usual else 0
        room = slots + ahead - held
        if held > slots and room < min(BATCH, ahead // 2):
            return 0  # nobody waits for it: claim more at a time
        return min(room, self.left)

    @property
    def _is_probing(self) -> bool:
        """Whether to claim suspects, one by one, and nothing else."""
        return self._sees_suspects or self.options.suspects == "only"

    def _claim(self, conn: Executes, room: int) -> list[Any]:
        began = monotonic()
        probes = self._is_probing
        sweeps = self._sweeps.begin()
        if sweeps:
            self._discover(conn)
        rows: list[Any] = []
        want = min(room, BATCH)
        self._admits_at = NEVER
        for lane in self._ways(conn, probes, want, rows):
            floor = self.lanes.floors[lane]
            low = 0 if sweeps or probes else floor.value
            found = self.queue.store.claim(conn, lane, low, want - len(rows), self.id)
            floor.see(found, began)
            rows += found
            if len(rows) == want:
                break
        if sweeps:
            self._sweeps.end()
        if probes and not rows:
            self._sees_suspects = False
        if rows:
            self._bell.found(conn, lane if len(rows) == room else None, self._admits_at < NEVER)
        else:
            self._bell.found_nothing(conn, self.id, self.listener.is_heard)
        self.taken += len(rows)
        self.left -= len(rows)
        is_idle = sweeps and not rows and not self.runs.held and self._admits_at == NEVER
        if is_idle and self.upkeep.passes:
            self.idle_at = began
            if self.options.drain:
                self.stop()
        return rows

    def _ways(self, conn: Executes, probes: bool, want: int, rows: list[Any]) -> Iterator[Lane]:
        """Yield the lanes in the order to look at them, having their queues admit jobs first."""
        for queue in self.lanes.draw():
            is_gated, room = queue in self._gated, want - len(rows)
            for row in self.queue.store.admit(conn, queue, room) if is_gated else ():
                if row.priority is None:
                    self._admits_at = min(self._admits_at, monotonic() + row.wait)
                else:
                    self.lanes.add(Lane(queue, row.priority))
            yield from self.lanes.in_queue(queue, probes)

    def _discover(self, conn: Executes) -> None:
        """Find lanes and policies that are not known yet, and whether suspects wait."""
        store, only = self.queue.store, self.options.suspects == "only"
        self._gated = set() if only else store.gated(conn, self.lanes.names)
        for queue in self.lanes.names:
            known = [lane.priority for lane in self.lanes.in_queue(queue, only)]
            for lane in store.lanes(conn, queue, known, only):
                self.lanes.add(lane)
            for lane in store.lanes(conn, queue, [], True) if not only else ():
                self.lanes.add(lane)
                self._sees_suspects = self.options.suspects == "alone"
                self.signs.wants_probe = True

    def _pause(self) -> float:
        """Say for how long to sleep if nobody wakes this thread."""
        if self._unsettled or self._is_fenced or self._bell.is_in_vain:
            return 0.005
        wait = self.options.poll.total_seconds()
        if self._room() > 0:
            next_at = min(self._sweeps.next_at, self._admits_at)
            wait = min(self._bell.pause(), next_at - monotonic())
        return max(0.0, min(wait, min(self.runs.next_check, self._stop_by or NEVER) - monotonic()))

    def _stray(self, conn: Executes, row: Any) -> tuple[Run, Ended]:
        """Say what becomes of a job whose task this worker does not know."""
        key = (row.job_id, row.run)
        if row.task is None:
            ended = Ended(*key, "failed", error_type="missing", error="its row in job is gone")
        else:
            since = self.queue.store.unknown_since(conn, row.job_id)
            wait = timedelta(seconds=min(max(since / 4, 1), 60)) if since < LAST_UNKNOWN else None
            outcome = "snoozed" if wait else "failed"
            why = f"no worker that got it knows the task {row.task}"
            ended = Ended(*key, outcome, wait, error_type="unknown_task", error=why)
        return Run(row, None, self.queue.store, monotonic(), self.runs.said), ended

    # The end

    def _check(self, now: float) -> None:
        """See to runs that are out of time, and to the end of the grace period."""
        if self._stop_by is not None:
            self.runs.withdraw()
            if now >= self._stop_by:
                self.runs.hand_back()
        self.runs.check(now)
        if self.runs.has_stale:
            self.runs.has_stale = False
            self._usual = max(self._usual, STALE)
        if self.runs.is_stuck and self._is_watched and self._stop_by is None:
            self.stop()  # to be replaced by a fresh process

    def _begin_anew(self) -> None:
        """After a fence: others may hold our jobs, or soon will."""
        self.runs.forget()
        self._unsettled = []
        self._register()
        self._is_fenced = False

    def _has_stopped(self) -> bool:
        if self.taken >= (self.options.max_jobs or float("inf")) and not self.runs.held:
            self.stop()
        if self._stop_by is None:
            return False
        gave_up = monotonic() > self._stop_by + self.options.ttl.total_seconds()
        return gave_up or not (self.runs.held or self._unsettled)

    def _leave(self) -> None:
        self.runs.stop()
        self.stopped.set()
        for _, wakes, _ in self._parts:
            wakes.set()
        if not self.runs.held:
            with suppress(*DatabaseError):
                self._unregister()
        log.info("worker %d: stopped after %d runs", self.id, self.taken)

    def _unregister(self) -> None:
        store, said, patience = self.queue.store, self.runs.said, self.options.ttl
        with said.taken() as lines, self.flow.taken() as counts, self.link.begin(patience) as conn:
            if lines:
                store.log(conn, lines)
            store.count_runs(conn, counts)
            store.disarm(conn, self.lanes.names, self.id)
            store.unregister(conn, self.id)
            # Others look for what was handed back; our own listener wakes to end.
            store.pass_on(conn, self.lanes.names[0], 0)
