"""A queue in a database: where tasks are registered and jobs enqueued."""

import asyncio
import copy
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import timedelta
from itertools import islice
from typing import Any, ParamSpec, TypeVar, overload
from uuid import UUID

from psycopg.pq import TransactionStatus
from sqlalchemy import URL, Engine, create_engine

from sqlqueue.codec import encode_call
from sqlqueue.errors import IdOutOfRange
from sqlqueue.job import Job
from sqlqueue.literal import new_id
from sqlqueue.options import Options, check_name
from sqlqueue.store import Executes, Store
from sqlqueue.task import Call, Task
from sqlqueue.transaction import (
    Driver,
    Transaction,
    across,
    savepoint,
    sqlalchemy_errors,
    within,
)
from sqlqueue.worker import Worker, WorkerOptions

P = ParamSpec("P")
R = TypeVar("R")
BATCH = 1000  # calls encoded and sent at a time by enqueue_many


class Queue:
    """The jobs of one schema in one database, and the tasks they call.

    database  a url, or an Engine the application already has; the driver is psycopg
    schema    where the tables are: `sqlqueue migrate` makes them
    options   defaults for all tasks, see Options

    Nothing connects until something is enqueued or read.
    """

    def __init__(
        self, database: str | URL | Engine, *, schema: str = "sqlqueue", **options: Any
    ) -> None:
        if not isinstance(database, Engine):
            database = create_engine(database, hide_parameters=True, max_overflow=100)
        self.engine = database
        self.store = Store(schema)
        self.tasks: dict[str, Task[..., Any]] = {}
        self.options = Options().changed(options)
        self._transaction: Transaction | None = None
        self._id: str | None = None

    @overload
    def task(self, function: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def task(
        self,
        function: None = None,
        /,
        *,
        name: str | None = None,
        transactional: bool = False,
        **options: Any,
    ) -> Callable[[Callable[..., R]], Task[..., R]]: ...
    def task(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        transactional: bool = False,
        **options: Any,
    ) -> Any:
        """Register a function as a task, named `module.function` unless a name is given.

        A transactional task takes a Session, or an AsyncSession, as its first argument: its
        writes, the jobs it enqueues there and the end of its job are one commit.

        Raises ValueError for a name that is taken and for options that do not fit.
        """

        def register(function: Callable[..., Any]) -> Task[..., Any]:
            task = Task(self, function, name, self.options.changed(options), transactional)
            if task.name in self.tasks:
                raise ValueError(f"task {task.name} is registered already: give it a name")
            self.tasks[task.name] = task
            return task

        return register(function) if function else register

    def using(
        self, transaction: Transaction | None = None, *, id: UUID | None = None, **options: Any
    ) -> "Queue":
        """Return a copy bound to a transaction and options, as Task.using does."""
        bound = copy.copy(self)
        bound._transaction = self._transaction if transaction is None else transaction
        bound._id = self._id if id is None else str(id)
        bound.options = self.options.changed(options)
        return bound

    def send(self, task: str, /, *args: Any, **kwargs: Any) -> Job[Any]:
        """Enqueue a call of a task whose code is not here; nobody checks its arguments yet."""
        return self.enqueue(self._call(task, args, kwargs))

    async def asend(self, task: str, /, *args: Any, **kwargs: Any) -> Job[Any]:
        """Do what `send` does, from async code."""
        return await self.aenqueue(self._call(task, args, kwargs))

    def _call(self, task: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        text = encode_call(args, kwargs)
        return Call(self._id or new_id(), check_name("task", task), text, self.options)

    def enqueue(self, call: Call) -> Job[Any]:
        """Enqueue a call made by `Task.s`, in the transaction bound, or in one of its own."""
        self._write(lambda conn: self._add(conn, [call]))
        return Job(self, UUID(call.id))

    async def aenqueue(self, call: Call) -> Job[Any]:
        """Do what `enqueue` does, from async code."""
        await self._awrite(lambda conn: self._add(conn, [call]))
        return Job(self, UUID(call.id))

    def enqueue_many(self, calls: Iterable[Call]) -> int:
        """Enqueue calls made by `Task.s`, in one transaction; return how many jobs were new.

        Takes any iterable, in bounded memory. In a transaction of its own, calls are encoded
        while others are on their way. Raises what their making raises, having written nothing.
        """
        if self._transaction is not None:
            return within(self._transaction, lambda conn: self._add_all(conn, calls))
        added = 0
        with self.autocommit() as conn, savepoint(conn), ThreadPoolExecutor(1) as sender:
            sent: Future[int] | None = None
            for some in _batches(calls):
                added += sent.result() if sent else 0
                sent = sender.submit(self._add, conn, some)
            return added + (sent.result() if sent else 0)

    async def aenqueue_many(self, calls: Iterable[Call]) -> int:
        """Do what `enqueue_many` does, from async code."""
        if self._transaction is None:
            return await asyncio.to_thread(self.enqueue_many, calls)
        return await across(self._transaction, lambda conn: self._add_all(conn, calls))

    def _add_all(self, conn: Executes, calls: Iterable[Call]) -> int:
        with savepoint(conn):
            return sum(self._add(conn, some) for some in _batches(calls))

    def _write(self, work: Callable[[Executes], R]) -> R:
        if self._transaction is not None:
            return within(self._transaction, work)
        with self.autocommit() as conn:
            return work(conn)

    async def _awrite(self, work: Callable[[Executes], R]) -> R:
        if self._transaction is not None:
            return await across(self._transaction, work)
        return await asyncio.to_thread(self._write, work)

    def _add(self, conn: Executes, calls: list[Call]) -> int:
        groups: dict[tuple[str, tuple[Any, ...]], list[Call]] = {}
        for call in calls:
            groups.setdefault((call.task, call.options.key), []).append(call)
        added = 0
        for same in groups.values():
            ids, args = [call.id for call in same], [call.args for call in same]
            count = self.store.enqueue(conn, ids, args, same[0].task, same[0].options.params)
            if count is None:
                raise IdOutOfRange()
            added += count
        return added

    @contextmanager
    def autocommit(self) -> Iterator[Executes]:
        """Lend a connection on which every statement is a transaction of its own."""
        with closing(self.engine.raw_connection()) as pooled:
            driver: Any = pooled.driver_connection
            before, driver.autocommit = driver.autocommit, True
            try:
                with sqlalchemy_errors():
                    yield Driver(driver)
            finally:
                if driver.pgconn.transaction_status == TransactionStatus.IDLE:
                    driver.autocommit = before
                else:
                    pooled.invalidate()

    def worker(self, *queues: str, **options: Any) -> Worker:
        """Return a worker of some queues, `NAME` or `NAME:WEIGHT`, to run in this program.

        Without names it serves the queues of the tasks registered. Options: see WorkerOptions.
        """
        own = {self.options.queue, *(task.options.queue for task in self.tasks.values())}
        return Worker(self, queues or sorted(own), WorkerOptions(**options))

    def pause(
        self,
        queue: str,
        *,
        by: str = "",
        why: str | None = None,
        lasts: timedelta | None = None,
    ) -> None:
        """Stop claiming from a queue, for a time or until `resume`; running jobs go on."""
        with self.autocommit() as conn:
            self.store.pause(conn, check_name("queue", queue), True, by, why, lasts)

    def resume(self, queue: str) -> None:
        """Go on claiming from a queue."""
        with self.autocommit() as conn:
            self.store.pause(conn, check_name("queue", queue), False, None, None, None)


def _batches(calls: Iterable[Call]) -> Iterator[list[Call]]:
    remaining = iter(calls)
    while some := list(islice(remaining, BATCH)):
        yield some
