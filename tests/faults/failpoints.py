"""Failpoints: places in a worker or an enqueuer where a fault strikes once, set from outside.

There is no code for them in the package: `install` wraps the one function that runs every
statement of the store, the transactions of a worker, and SQLAlchemy's own commits. Whoever gets
there first creates a file, so that the fault strikes once, and its test can tell that it did.
Before the file's folder is there, nothing strikes.
"""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session

from sqlqueue import Queue
from sqlqueue.link import Link
from sqlqueue.run import Run
from sqlqueue.store import Store

# Point: when, the statement, and a word that its parameters must hold.
POINTS = {
    "before_enqueue_commit": ("within", "enqueue", ""),
    "after_enqueue_commit": ("after", "enqueue", ""),
    "before_claim": ("before", "claim", ""),
    "claim_before_commit": ("within", "claim", ""),
    "claim_after_commit": ("after", "claim", ""),
    "before_task": ("in run", "", ""),
    "in_task": ("in run", "", ""),
    "before_finish": ("before", "finish", "succeeded"),
    "finish_before_commit": ("within", "finish", "succeeded"),
    "finish_after_commit": ("after", "finish", "succeeded"),
    "in_beat": ("within", "beat", ""),
    "in_rescue_before_commit": ("within", "finish", "crashed"),
    "in_promote_before_commit": ("within", "promote", ""),
    "in_fire_before_commit": ("within", "fire", ""),
    "in_drop_after_lock": ("within", "tidy", ""),
    "in_hand_back": ("within", "finish", "returned"),
}
ACTIONS = ("kill", "stop", "cut", "crash")


class Failpoint:
    """One fault, at one place: strikes the first time that a process gets there.

    kill   SIGKILL to this process           stop   SIGSTOP to it; the test has to continue it
    cut    all its connections to Postgres   crash  SIGQUIT to the server: no checkpoint

    The server is that with this port and process id. For in_task, a task calls `reach` itself.
    """

    def __init__(self, point: str, action: str, file: str, port: int = 0, server: int = 0) -> None:
        if point not in POINTS or action not in ACTIONS:
            raise ValueError(f"there is no failpoint {point}:{action}")
        self._point, self._action, self._file = point, action, Path(file)
        self._port, self._server = port, server
        self._when, self._statement, self._word = POINTS[point]
        self._here = threading.local()

    def reach(self, point: str) -> None:
        """Be at this point: strike if it is the one, and nobody has struck yet."""
        if point == self._point:
            self._strike()

    def install(self, queue: Queue) -> None:
        """Watch the statements, the transactions and the runs of this process."""
        rows, begin = Store.rows, Link.begin

        def watched_rows(store: Store, conn: Any, name: str, params: Any) -> Any:
            is_it = name == self._statement and self._word in str(params)
            if is_it and self._when == "before":
                self._strike()
            found = rows(store, conn, name, params)
            if is_it and found and self._when == "within":
                self._strike()
            if is_it and found:
                self._here.has_run = True
            return found

        @contextmanager
        def watched_begin(link: Link, patience: timedelta) -> Iterator[Any]:
            self._here.has_run = False
            with begin(link, patience) as conn:
                yield conn
            self._committed()

        @contextmanager
        def around(run: Run) -> Iterator[None]:
            self.reach("before_task")
            yield

        Store.rows = watched_rows  # type: ignore[method-assign]
        Link.begin = watched_begin  # type: ignore[assignment,method-assign]
        event.listen(Session, "after_commit", lambda _: self._committed())
        queue.around_run.append(around)

    def _committed(self) -> None:
        has_run, self._here.has_run = getattr(self._here, "has_run", False), False
        if has_run and self._when == "after":
            self._strike()

    def _strike(self) -> None:
        try:
            with self._file.open("x") as file:
                file.write(str(os.getpid()))
        except (FileExistsError, FileNotFoundError):
            return
        if self._action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self._action == "cut":
            cut_connections(self._port)
        else:
            os.kill(self._server, signal.SIGQUIT)
        threading.Event().wait(0.2)  # a signal may reach another thread before this one


def cut_connections(port: int) -> None:
    """Cut all connections of this process to that port, as a broken network does."""
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError), socket.socket(fileno=os.dup(int(entry.name))) as found:
            if found.family == socket.AF_INET and found.getpeername()[1] == port:
                found.shutdown(socket.SHUT_RDWR)
