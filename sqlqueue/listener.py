"""Waking a worker: one connection that listens, and tells the worker what it hears.

It never begins a transaction: one that idles while it listens would fill the notification queue
of the whole cluster. Where listening does not work, as behind a pooler in transaction mode, the
worker polls.
"""

import logging
import os
import re
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg

from sqlqueue.link import driver_of
from sqlqueue.store import Lane

if TYPE_CHECKING:
    from sqlqueue.worker import Worker

log = logging.getLogger("sqlqueue.worker")
ECHO_WITHIN = 2.0  # seconds: a notification of our own that takes longer is lost


class Listener:
    """A thread with a connection. `is_heard` says whether notifications come through."""

    def __init__(self, worker: "Worker") -> None:
        self.is_heard = False
        self._worker = worker

    def listen(self) -> float:
        """Listen until the worker has stopped, or the connection breaks: then again."""
        try:
            with self._worker.queue.engine.connect() as conn:
                self._listen(driver_of(conn))
        finally:
            self.is_heard = False
        return 0

    def _listen(self, driver: psycopg.Connection[Any]) -> None:
        channel = self._worker.queue.store.schema
        driver.execute(f"listen {channel}")
        echo = f"0 echo {os.getpid()}-{id(self)}"
        with self._worker.queue.autocommit() as other:
            other.exec_driver_sql("select pg_notify(%s, %s)", (channel, echo))
        began = monotonic()
        self._worker.ring()  # for what was not heard before
        while not self._worker.stopped.is_set():
            for heard in driver.notifies(timeout=0.5, stop_after=1):
                if heard.payload == echo:
                    self.is_heard = True
                else:
                    self._tell(heard.payload)
            if not self.is_heard and monotonic() - began > ECHO_WITHIN:
                log.info("worker %d: hears no notification, so it polls", self._worker.id)
                self._worker.stopped.wait()

    def _tell(self, payload: str) -> None:
        """Look where `WORKER HINT SUBJECT` says; worker 0 is everybody.

        Whoever can connect can send one, so it is never believed: what is to be done is read.
        """
        heard = re.fullmatch(r"(\d+) (cancel|due|-?\d{1,3}) (\S+)", payload)
        if heard is None or int(heard[1]) not in (0, self._worker.id):
            return
        _, hint, subject = heard.groups()
        if hint == "cancel":
            self._worker.heartbeat.wakes.set()
        elif hint == "due":
            self._worker.upkeep.wakes.set()
        else:
            self._worker.ring(Lane(subject, int(hint)))
