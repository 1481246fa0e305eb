"""Waiting for jobs to end: all waits of a process share one thread and one connection.

The thread begins with the first wait and ends soon after the last one. Each look asks for all jobs
whose time it is in one statement, and asks sooner again for those that are awaited for a short
time. A wait that was given up is dropped when its time comes.
"""

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from time import monotonic, sleep
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from sqlqueue.link import Link
from sqlqueue.store import Store
from sqlqueue.transaction import sqlalchemy_errors

SHORTEST, LONGEST = 0.002, 0.25  # seconds between two looks for a job
LINGER = 1.0  # seconds without a wait after which the connection is closed
AWAY = 10.0  # seconds without an answer of the database after which waits fail
SILENCE = timedelta(seconds=10)  # of this process in a look, after which the database ends it


@dataclass
class _Wait:
    job_id: str
    began: float
    ends_at: float
    look_at: float
    row: Future[Any] = field(default_factory=Future)


class Waits:
    """The waits of one process."""

    def __init__(self, engine: Engine, store: Store) -> None:
        self._store = store
        self._link = Link(engine, store)
        self._added = threading.Condition()
        self._waits: list[_Wait] = []
        self._has_thread = False

    def add(self, job_id: str, timeout: timedelta | None) -> Future[Any]:
        """Return the job's row as it will be when it has ended, or after `timeout`.

        None if there is no such job. Fails with what the database raises, unless it answers again
        within AWAY. The wait ends when the future is cancelled.
        """
        now = monotonic()
        ends_at = now + timeout.total_seconds() if timeout is not None else float("inf")
        wait = _Wait(job_id, now, ends_at, now)
        with self._added:
            self._waits.append(wait)
            self._added.notify()
            if not self._has_thread:
                threading.Thread(target=self._run, name="sqlqueue waits", daemon=True).start()
                self._has_thread = True
        return wait.row

    def _run(self) -> None:
        answered_at = monotonic()
        while self._pause():
            now = monotonic()
            due = [wait for wait in self._waits if wait.look_at <= now]
            try:
                self._look(due, now)
                answered_at = now
            except Exception as error:  # the top of a thread: whoever waits gets it
                is_away = isinstance(error, OperationalError) and now - answered_at < AWAY
                for wait in due:
                    if not is_away or wait.ends_at <= now:
                        _resolve(wait.row, error=error)
            for wait in due:
                wait.look_at = now + min(SHORTEST + (now - wait.began) / 2, LONGEST)
                wait.look_at = min(wait.look_at, wait.ends_at)
            sleep(monotonic() - now)  # so that it asks for half of the time at most

    def _pause(self) -> bool:
        """Sleep until the next look; return False if nobody has waited for a while."""
        with self._added:
            self._waits = [wait for wait in self._waits if not wait.row.done()]
            next_at = min((one.look_at for one in self._waits), default=monotonic() + LINGER)
            self._added.wait(max(0.0, next_at - monotonic()))
            if not self._waits:
                self._link.close()
                self._has_thread = False
            return self._has_thread

    def _look(self, due: list[_Wait], now: float) -> None:
        ids, are_over = [wait.job_id for wait in due], [wait.ends_at <= now for wait in due]
        with sqlalchemy_errors(), self._link.begin(SILENCE) as conn:
            rows = self._store.jobs(conn, ids, are_over)
        for wait in due:
            if wait.job_id in rows:
                _resolve(wait.row, rows[wait.job_id])


def _resolve(future: Future[Any], row: Any = None, error: Exception | None = None) -> None:
    if future.set_running_or_notify_cancel():  # else it was cancelled meanwhile
        future.set_exception(error) if error else future.set_result(row)
