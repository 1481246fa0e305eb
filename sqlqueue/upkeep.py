"""What any worker does for all: promote what is due, rescue, keep the tables.

Every worker does it, at any time and beside the others; there is no leader.
"""

import logging
import threading
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING

from sqlqueue.lanes import Sweeps
from sqlqueue.link import DatabaseError, Link

if TYPE_CHECKING:
    from sqlqueue.worker import Worker

log = logging.getLogger("sqlqueue.upkeep")
LOOK_EVERY = 1.0  # seconds; a job due sooner than this is announced when it is enqueued
BATCH = 500
WINDOW = timedelta(seconds=10)  # due longer ago than this are found by sweeps: dead rows lie there
TIDY_EVERY = 600.0


class Upkeep:
    """A thread with a connection of its own. `passes` counts its rounds."""

    def __init__(self, worker: "Worker") -> None:
        self.passes = 0
        self._worker = worker
        self._store = worker.queue.store
        self._link = Link(worker.queue.engine, worker.queue.store)
        self._wake = threading.Event()
        self._sweeps = Sweeps(10.0)
        self._rescues = Sweeps(worker.options.ttl.total_seconds() / 6)
        self._tidies = Sweeps(TIDY_EVERY)

    def wake(self) -> None:
        """Look again now: something is due soon."""
        self._wake.set()

    def expect(self, wait: timedelta) -> None:
        """Take note that a job of ours is due after `wait`."""
        if wait.total_seconds() < LOOK_EVERY:
            self.wake()

    def run(self) -> None:
        """Do it until the worker has stopped."""
        wait = 0.0
        while not self._worker.stopped.is_set():
            self._wake.wait(wait)
            self._wake.clear()
            try:
                wait = min(self._promote(), LOOK_EVERY)
                if self._rescues.is_due(monotonic()):
                    self._rescue()
                if self._tidies.is_due(monotonic()):
                    self._tidy()
                self.passes += 1
            except DatabaseError as error:
                log.warning("worker %d: upkeep: %s", self._worker.id, error)
                wait = LOOK_EVERY
        self._link.close()

    def _promote(self) -> float:
        """Move what is due; return the seconds until the next is."""
        began = monotonic()
        sweeps = self._sweeps.is_due(began)
        window = None if sweeps else WINDOW
        moved = BATCH
        while moved >= BATCH:
            with self._link.begin(self._worker.options.ttl) as conn:
                lanes = self._store.promote(conn, window, BATCH)
            moved = sum(count for _, count in lanes)
            for lane, _ in lanes:
                self._worker.ring(lane)
        if sweeps:
            self._sweeps.took(monotonic() - began, monotonic())
        with self._link.begin(self._worker.options.ttl) as conn:
            due = self._store.next_due(conn)
        return LOOK_EVERY if due is None else max(due.total_seconds(), 0.0)

    def _rescue(self) -> None:
        began = monotonic()
        with self._link.begin(self._worker.options.ttl) as conn:
            for one in self._store.rescue(conn, BATCH):
                log.warning("job %s: run %d crashed: %s", one.job_id, one.run, one.error)
        self._rescues.took(monotonic() - began, monotonic())

    def _tidy(self) -> None:
        began = monotonic()
        with self._link.begin(self._worker.options.ttl) as conn:
            for line in self._store.tidy(conn):
                log.info("upkeep: %s", line)
        self._tidies.took(monotonic() - began, monotonic())
