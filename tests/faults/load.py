"""Load: jobs of each kind at a steady rate, and worker processes, in a cluster of their own.

The tasks are those of tests/faults/application.py.
"""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self
from uuid import UUID

from sqlalchemy import create_engine, text

from sqlqueue import Queue, Retry, Unique
from sqlqueue.integrations.alembic import migrate
from sqlqueue.literal import new_id
from tests.faults.cluster import Cluster
from tests.faults.history import request_table
from tests.harness import program, wait_until, workers

# Kinds of jobs: a task and what is special, with its share of the whole and its options.
PLAIN: dict[str, tuple[float, dict[str, Any]]] = {"plain": (1, {})}
MIXED: dict[str, tuple[float, dict[str, Any]]] = {
    "plain": (70, {}),
    "write": (8, {}),
    "fail_once": (6, {"retry": Retry(attempts=3, waits=[timedelta(0)])}),
    "plain later": (6, {"delay": timedelta(seconds=2)}),
    "plain in turn": (6, {"queue": "limited"}),
    "say": (3, {}),
    "plain alone": (1, {"unique": Unique(by=("n",))}),
}


class Load:
    """A thread that enqueues jobs from entry to exit, some in each transaction.

    rate     jobs per second; it catches up when it was held up
    depth    it pauses while more jobs than this are ready
    sent     how many have been committed
    """

    def __init__(
        self,
        queue: Queue,
        *,
        rate: float,
        kinds: dict[str, tuple[float, dict[str, Any]]] = PLAIN,
        batch: int = 5,
        depth: int | None = None,
        seed: int = 0,
    ) -> None:
        self.sent = 0
        self._queue, self._rate, self._kinds = queue, rate, kinds
        self._batch, self._depth = batch, depth
        self._dice = random.Random(seed)
        self._plain: list[UUID] = []
        self._ends = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="load")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the load hangs"
        if self._error:
            raise self._error

    def plain(self) -> list[UUID]:
        """Return the ids of the plain jobs since it was last called."""
        found, self._plain = self._plain, []
        return found

    def _run(self) -> None:
        try:
            due = time.monotonic()
            while not self._ends.wait(max(0.0, due - time.monotonic())):
                due += self._batch / self._rate
                while self._is_deep() and not self._ends.wait(0.01):
                    due = time.monotonic()
                self._enqueue()
        except Exception as error:
            self._error = error

    def _is_deep(self) -> bool:
        if self._depth is None:
            return False
        deep = text("select count(*) > :depth from (select from sqlqueue.ready limit :depth + 1) x")
        with self._queue.engine.connect() as conn:
            return bool(conn.scalar(deep, {"depth": self._depth}))

    def _enqueue(self) -> None:
        shares = [share for share, _ in self._kinds.values()]
        plain = []
        with self._queue.engine.begin() as conn:
            for kind in self._dice.choices(list(self._kinds), shares, k=self._batch):
                job_id = UUID(new_id())
                args: dict[str, Any] = {"key": str(job_id)}
                if kind == "plain":
                    plain.append(job_id)
                elif kind == "plain alone":
                    args["n"] = self._dice.randrange(100)
                bound = self._queue.using(conn, id=job_id, **self._kinds[kind][1])
                bound.send(kind.split()[0], **args)
        self.sent += self._batch
        self._plain += plain


@contextmanager
def migrated(settings: dict[str, str]) -> Iterator[Cluster]:
    """Run a durable cluster of the test's own, migrated."""
    with Cluster(settings) as cluster:
        engine = create_engine(cluster.url)
        migrate(engine)
        request_table(engine)
        engine.dispose()
        yield cluster


@contextmanager
def working(url: str, load: str = "load") -> Iterator[Queue]:
    """Have two worker processes with the default clocks; give a queue to enqueue in."""
    queue = Queue(url)
    serve = f"app.supervise(2, ('default', 'limited'), {{}}, application.{load})"
    with program(url, f"from tests.faults import application; {serve}"):
        wait_until(lambda: len(workers(queue.engine)) == 2, within=30, what="two workers")
        yield queue
    queue.engine.dispose()


def percentile(values: list[float], percent: float) -> float:
    """Return the value below which so many lie."""
    return sorted(values)[min(int(len(values) * percent / 100), len(values) - 1)]


def wait(seconds: float) -> None:
    """Let time pass."""
    threading.Event().wait(seconds)
