"""The runs that a worker holds: from the claim, through an executor, to a recorded end.

Only the turn's thread adds and removes runs; any thread may say that one is over, or interrupt it.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

from sqlqueue.executors import Executor, LoopExecutor, ThreadExecutor, withdrawn
from sqlqueue.link import async_engine
from sqlqueue.notes import Said
from sqlqueue.perform import InThread, OnLoop
from sqlqueue.process import Child
from sqlqueue.retry import unsaid
from sqlqueue.run import Run
from sqlqueue.store import Ended

if TYPE_CHECKING:
    from sqlqueue.worker import Worker

log = logging.getLogger("sqlqueue.worker")
STALE = 0.25  # seconds after which a job that still waits for a slot here is handed back
NEVER = float("inf")
End = tuple[Run, Ended | None]  # None: the task finished its job itself


class Runs:
    """What is held, by (job id, run), and what has ended and is not recorded yet.

    next_check monotonic time at which `check` has something to do
    said       what runs say, to be written
    over       what has ended, until `take_over`
    lingering  runs that are over for us, and go on in a slot all the same
    has_stale  set when jobs claimed ahead had to be handed back: they take longer than thought
    is_stuck   whether a run went on after its end
    """

    def __init__(self, worker: "Worker") -> None:
        self.held: dict[tuple[str, int], Run] = {}
        self.lingering: set[Run] = set()
        self.said = Said()
        self.has_stale = False
        self.is_stuck = False
        self._options = worker.options
        self._worker = worker
        self._executors: dict[str, Executor] = {}
        self.over: deque[End] = deque()
        self.next_check = NEVER
        self._must_check = False
        self._hooks = ThreadPoolExecutor(1, "sqlqueue hooks")

    def launch(self, rows: Iterable[Any]) -> None:
        """Hold claimed jobs and hand them to the executors of their tasks."""
        now, patience = monotonic(), self._options.ttl * 2 / 3
        batches: dict[str, list[Run]] = {}
        for row in rows:
            task = self._worker.queue.tasks[row.task]
            run = Run(row, task, self._worker.queue.store, now, self.said, patience)
            self.held[run.key] = run
            if row.is_expired or row.is_cancelled:
                why = "expired" if row.is_expired else "cancelled"
                self.done(run, Ended(*run.key, why, error_type=why))
                continue
            self.next_check = min(self.next_check, now + (row.timeout or NEVER))
            usual = "async" if task.is_async else "thread"
            kind = row.executor if row.executor in (usual, "process") else usual
            if kind not in self._executors:
                self._executors[kind] = self._make(kind)
            run.executor = self._executors[kind]
            batches.setdefault(kind, []).append(run)
        if len(self.held) > self._options.slots:
            self.next_check = min(self.next_check, now + STALE)
        for kind, runs in batches.items():
            self._executors[kind].submit(runs)

    def hold(self, run: Run, ended: Ended) -> None:
        """Hold a claimed job that is not to be run, with its end."""
        self.held[run.key] = run
        self.done(run, ended)

    def _make(self, kind: str) -> Executor:
        slots, engine = self._options.slots, self._worker.queue.engine
        if kind == "async":
            on_loop = async_engine(engine.url, self._worker.link.driver, pool_size=slots)
            return LoopExecutor(slots, OnLoop(on_loop).perform, on_loop.dispose, self.done)
        if kind == "thread":
            in_thread = InThread(partial(Session, engine))
            return ThreadExecutor(slots, lambda: in_thread, self.done)
        limits = (self._options.child_runs, self._options.child_bytes, self._options.child_age)
        return ThreadExecutor(slots, partial(Child, *limits), self.done)

    def done(self, run: Run, ended: Ended | None) -> None:
        """Take note that a run has left its slot, and how it ended."""
        self._end(run, ended)
        self.lingering.discard(run)

    def _give_up(self, run: Run) -> None:
        """End a run that may go on for a while: it keeps its slot for as long."""
        if run.started is not None:
            self.lingering.add(run)
        if run.is_over:  # it has left its slot just now
            self.lingering.discard(run)
        self._end(run, run.stopped())

    def _end(self, run: Run, ended: Ended | None) -> None:
        if not run.is_over:
            run.is_over = True
            self.over.append((run, ended))
            self._worker.wake()

    def take_over(self) -> list[End]:
        """Return what has ended since the last call, of what is still held."""
        over = [self.over.popleft() for _ in range(len(self.over))]
        return [(run, ended) for run, ended in over if self.held.get(run.key) is run]

    def interrupt(self, run: Run, why: str) -> None:
        """Ask a run to stop because it was cancelled, timed_out or returned."""
        if run.interrupted:
            return  # told once: again, and its cleaning up would be cancelled too
        run.interrupted_at = monotonic()
        run.interrupted = why
        if run.executor is not None:
            run.executor.interrupt(run)
        self._must_check = True
        self._worker.wake()

    def check(self, now: float) -> None:
        """Interrupt what is out of time, give up on what ignores that, hand back what waits."""
        if now < self.next_check and not self._must_check:
            return
        self._must_check = False
        self.next_check = NEVER
        for run in self.held.values():
            if not run.is_over:
                self.next_check = min(self.next_check, self._check_one(run, now))
        if len(self.held) > self._options.slots:
            self.next_check = min(self.next_check, now + STALE)
            if any(r.started is None and now - r.claimed > STALE for r in self.held.values()):
                self.has_stale = True
                self.withdraw()

    def _check_one(self, run: Run, now: float) -> float:
        patience = self._options.ttl.total_seconds() / 6
        if run.interrupted:
            ends_at = run.interrupted_at + patience
            if now >= ends_at:
                log.warning("job %s: run %d goes on after it was %s", *run.key, run.interrupted)
                self.is_stuck = True
                self._give_up(run)
            return ends_at
        if run.row.timeout is None:
            return NEVER
        ends_at = (run.started or now) + run.row.timeout
        if now < ends_at:
            return float(ends_at)
        self.interrupt(run, "timed_out")
        return now + patience

    def withdraw(self) -> None:
        """Hand back the runs that have not been started."""
        for executor in self._executors.values():
            for run in withdrawn(executor):
                run.interrupted = "returned"
                self.done(run, run.stopped())

    def interrupt_all(self) -> None:
        """Ask all runs to stop; called by any thread."""
        for run in self.held.copy().values():
            if not run.is_over:
                self.interrupt(run, "returned")

    def hand_back(self) -> None:
        """Hand back all that is not over, started or not, without waiting for it."""
        self.interrupt_all()
        for run in self.held.values():
            if not run.is_over:
                self._give_up(run)

    def forget(self) -> None:
        """Stop everything and record nothing: the leases are lost, or will be."""
        self.hand_back()
        self.withdraw()
        self.held.clear()

    def tell(self, ended: Iterable[Ended]) -> None:
        """Have the hooks of the application told, in a thread of theirs, how runs ended."""
        if self._worker.queue.after_run:
            self._hooks.submit(tell, self._worker.queue.after_run, list(ended))

    def stop(self) -> None:
        """End the executors."""
        for executor in self._executors.values():
            executor.stop()


def tell(hooks: Iterable[Callable[[Ended], object]], ended: Iterable[Ended]) -> None:
    """Call the hooks of the application for each end of a run; log what they raise."""
    for one in ended:
        for hook in hooks:
            try:
                hook(one)
            except Exception as error:
                log.error("job %s: a hook of run %d failed", *one[:2], exc_info=unsaid(error))
