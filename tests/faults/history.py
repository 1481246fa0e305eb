"""What applications asked for, and what they were told: the histories that the checker reads.

An enqueuer writes a row of its own (`request`) and a job in one transaction. Some transactions it
rolls back; one whose commit has an unknown outcome it repeats with the same id until it is told.
"""

import random
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self
from uuid import UUID

from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from sqlqueue import Queue
from sqlqueue.literal import new_id
from tests.harness import rows

REQUEST = text("insert into request (job_id) values (:id) on conflict do nothing")


@dataclass
class History:
    """The ids of jobs by what their enqueuer knows of them.

    acknowledged  its commit was acknowledged
    rolled_back   its transaction was rolled back on purpose
    unknown       its commit had an unknown outcome, and was not repeated
    errors        of the database, by SQLSTATE; "" if the connection broke
    """

    acknowledged: set[UUID] = field(default_factory=set)
    rolled_back: set[UUID] = field(default_factory=set)
    unknown: set[UUID] = field(default_factory=set)
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def repeated(self) -> int:
        """How many transactions were repeated."""
        return self.errors.total()


def request_table(engine: Engine) -> None:
    """Make the table of the enqueuers' own rows, empty."""
    rows(engine, "create table if not exists request (job_id uuid primary key)")
    rows(engine, "delete from request")


class Enqueuers:
    """Threads that enqueue tasks like `write` from entry to exit, at a rate below capacity.

    queue     whose engine they use; through a proxy, they meet its faults
    rate      jobs per second, all threads together
    seconds   longest time a job takes
    tasks     one of them at random
    """

    def __init__(
        self,
        queue: Queue,
        *,
        seed: int,
        threads: int = 2,
        rate: float = 60,
        seconds: float = 0.1,
        tasks: Sequence[str] = ("write",),
        **options: Any,
    ) -> None:
        self.history = History()
        self._queue, self._seconds, self._options = queue, seconds, options
        self._tasks, self._wait = tasks, threads / rate
        self._ends = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed} {number}"),))
            for number in range(threads)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "an enqueuer hangs"

    def _run(self, dice: random.Random) -> None:
        while not self._ends.wait(self._wait * dice.uniform(0.5, 1.5)):
            job_id, rolls_back = UUID(new_id()), dice.random() < 0.1
            call = dice.choice(self._tasks), str(job_id), dice.uniform(0, self._seconds)
            while not self._enqueue(job_id, call, rolls_back):
                if self._ends.wait(0.1):
                    self._note(self.history.unknown, job_id)
                    return

    def _note(self, kind: set[UUID], job_id: UUID) -> None:
        with self._lock:
            kind.add(job_id)

    def _enqueue(self, job_id: UUID, call: tuple[str, str, float], rolls_back: bool) -> bool:
        """Enqueue in a transaction with a row; return whether its outcome is known."""
        try:
            with self._queue.engine.connect() as conn:
                conn.execute(REQUEST, {"id": job_id})
                bound = self._queue.using(conn, id=job_id, **self._options)
                bound.send(*call)
                if rolls_back:
                    conn.rollback()
                    self._note(self.history.rolled_back, job_id)
                    return True
                conn.commit()
        except DBAPIError as error:
            with self._lock:
                self.history.errors[getattr(error.orig, "sqlstate", None) or ""] += 1
            return False
        self._note(self.history.acknowledged, job_id)
        return True
