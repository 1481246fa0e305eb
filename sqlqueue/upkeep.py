"""What any worker does for all: promote what is due, rescue, keep the tables and the log.

Every worker does it, at any time and beside the others; there is no leader.
"""

import logging
import threading
from datetime import timedelta
from typing import TYPE_CHECKING

from sqlqueue.lanes import Sweeps
from sqlqueue.link import Link
from sqlqueue.schedule import due
from sqlqueue.store import Executes

if TYPE_CHECKING:
    from sqlqueue.worker import Worker

log = logging.getLogger("sqlqueue.upkeep")
LOOK_EVERY = 1.0  # seconds; a job due sooner than this is announced when it is enqueued
BATCH = 500
WINDOW = timedelta(seconds=10)  # due longer ago than this are found by sweeps: dead rows lie there
TIDY_EVERY = 600.0


class Upkeep:
    """Has a thread and a connection of its own.

    passes  counts its rounds
    wakes   set when something is due soon
    """

    def __init__(self, worker: "Worker") -> None:
        self.passes = 0
        self._worker = worker
        self._store = worker.queue.store
        self._ttl = worker.options.ttl
        self.link = Link(worker.queue.engine, worker.queue.store)
        self.wakes = threading.Event()
        self._sweeps = Sweeps(10.0)
        self._rescues = Sweeps(worker.options.ttl.total_seconds() / 6)
        self._tidies = Sweeps(TIDY_EVERY)
        self._counts = Sweeps(5.0)

    def look(self) -> float:
        """Do what is due; return the seconds until there is more."""
        wait = min(self._promote(), LOOK_EVERY)
        if self._rescues.begin():
            with self.link.begin(self._ttl) as conn:
                crashed = self._store.rescue(conn, BATCH)
            self._worker.runs.tell(crashed)
            for one in crashed:
                log.warning("job %s: run %d crashed: %s", one.job_id, one.run, one.error)
            self._rescues.end()
        if self._tidies.begin():
            # Dropping a week locks out everybody: a process that stalls there is ended soon.
            with self.link.begin(timedelta(seconds=1)) as conn:
                for line in self._store.tidy(conn):
                    log.info("upkeep: %s", line)
            self._tidies.end()
        with self._worker.runs.said.taken() as lines:
            if lines:
                with self.link.begin(self._ttl) as conn:
                    self._store.log(conn, lines)
        if self._counts.begin():
            with self._worker.flow.taken() as counts, self.link.begin(self._ttl) as conn:
                self._store.count_runs(conn, counts)
            self._counts.end()
        self.passes += 1
        return wait

    def _fire(self, conn: Executes) -> None:
        """Enqueue the jobs of schedules whose time has come."""
        if not self.passes:
            known = self._worker.queue.declared
            self._store.set_schedules(conn, known, sorted(self._worker.queue.tasks))
        for row in self._store.due_schedules(conn):
            instants, next_at, problem = due(row)
            if problem:
                log.error("schedule %s: %s", row.name, problem)
            self._store.fire(conn, row.name, instants, next_at, problem)

    def _promote(self) -> float:
        """Move what is due; return the seconds until the next is."""
        sweeps = self._sweeps.begin()
        moved = BATCH
        while moved >= BATCH:
            with self.link.begin(self._ttl) as conn:
                lanes = self._store.promote(conn, None if sweeps else WINDOW, BATCH)
            moved = sum(count for _, count in lanes)
            for lane, _ in lanes:
                self._worker.ring(lane)
        if sweeps:
            self._sweeps.end()
        with self.link.begin(self._ttl) as conn:
            self._fire(conn)
            wait = self._store.next_due(conn)
        return LOOK_EVERY if wait is None else max(wait.total_seconds(), 0.0)
