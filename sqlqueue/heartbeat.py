"""A worker's signs of life, from a thread and a connection of their own.

A blocked task, event loop or pool cannot silence them. Each beat also compares the worker's
leases with what it knows of, and sees the requests to cancel. A second thread, which touches no
database and so cannot hang, watches that beats and turns go on.
"""

import logging
import threading
from datetime import timedelta
from itertools import cycle
from time import monotonic, process_time
from typing import TYPE_CHECKING

from sqlqueue.link import Link
from sqlqueue.process import resident_bytes
from sqlqueue.store import Ended

if TYPE_CHECKING:
    from sqlqueue.worker import Worker

log = logging.getLogger("sqlqueue.worker")


class Heartbeat:
    """Beats six times in a ttl; fences the worker when it could not for two thirds of one."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker
        self._ttl = worker.options.ttl.total_seconds()
        self.wakes = threading.Event()  # set when somebody asked to cancel a job
        self.link = Link(worker.queue.engine, worker.queue.store)
        self._beat_at = self._watched_at = monotonic()
        self._unknown: set[tuple[str, int]] = set()
        # Dead rows lie further back; a lease whose claim's commit took long is there, too.
        self._within = cycle([None] + [worker.options.ttl] * 11)

    def watch(self) -> float:
        """Fence a worker that cannot beat, end one whose turns are stuck; look again later."""
        worker, now, before = self._worker, monotonic(), self._watched_at
        self._watched_at = now
        if now - before > self._ttl / 6:
            return self._ttl / 12  # the whole process stood still: see first what the others do
        if now - self._beat_at > self._ttl * 2 / 3:
            self._beat_at = now
            worker.fence("could not beat")
            for link in (self.link, worker.link, worker.upkeep.link):
                link.cut()  # they may wait for a server that will never answer
        if worker.link.conn and now - worker.progress > self._ttl:
            raise TimeoutError(f"no turn for {now - worker.progress:.1f} s")
        return self._ttl / 12

    def beat(self) -> float:
        """Beat, and compare what the worker holds with what it knows of; again in a sixth."""
        worker, store = self._worker, self._worker.queue.store
        number, began = worker.id, monotonic()
        done = worker.taken - len(worker.runs.held)
        usage = [float(resident_bytes()), process_time(), float(done)]
        with self.link.begin(worker.options.ttl) as conn:
            told = store.beat(conn, number, usage)
        if not told:
            if number == worker.id and not worker.stopped.is_set():
                worker.fence("was declared dead")
            return self._ttl / 6
        self._beat_at = began
        for _ in range({"drain": 1, "stop": 2}.get(told, 0)):
            worker.stop()  # as a signal does, or two
        worker.signs.worker_id, worker.signs.beat_at = number, began
        known = set(worker.runs.held.copy())
        with self.link.begin(worker.options.ttl) as conn:
            leases = store.leases(conn, number, next(self._within))
            unknown = set(leases) - known - set(worker.runs.held.copy())
            # A claim may just be on its way back; what is unknown twice has lost its reply, or
            # its finish was rolled back.
            strays = [Ended(*key, "returned", timedelta(0)) for key in unknown & self._unknown]
            if strays:
                log.warning("worker %d: hands back %d unknown leases", number, len(strays))
                store.finish(conn, strays)
        self._unknown |= unknown
        for key, is_cancelled in leases.items():
            if is_cancelled and (run := worker.runs.held.get(key)):
                worker.runs.interrupt(run, "cancelled")
        return self._ttl / 6
