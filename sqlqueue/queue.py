"""A queue in a database: where tasks are registered and jobs enqueued."""

import asyncio
import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from itertools import islice
from random import uniform
from time import monotonic, sleep
from typing import Any, ParamSpec, TypeVar, overload
from uuid import UUID

from psycopg.pq import TransactionStatus
from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.exc import OperationalError

from sqlqueue.codec import Plain, encode_call
from sqlqueue.errors import DuplicateJob, QueueFull, UniqueKeyBusy
from sqlqueue.job import Job
from sqlqueue.literal import new_id
from sqlqueue.options import Options, check_name
from sqlqueue.policy import Policy, Unique
from sqlqueue.run import Run
from sqlqueue.schedule import Schedule
from sqlqueue.store import Ended, Executes, Store
from sqlqueue.task import Call, Task
from sqlqueue.transaction import Driver, Transaction, across, savepoint, sqlalchemy_errors, within
from sqlqueue.waits import Waits
from sqlqueue.worker import Worker, WorkerOptions

P = ParamSpec("P")
R = TypeVar("R")
Kwargs = Mapping[str, Any]
Name = str | None
Added = tuple[int, dict[str, str]]
LOOK = 0.05  # seconds between two tries of an enqueue, on average
RETRIES = 5  # of an enqueue in a transaction of its own, after errors of the database,
RETRY_WITHIN = 1.0  # seconds
BATCH = 1000  # calls encoded and sent at a time by enqueue_many


class Queue:
    """The jobs of one schema in one database, and the tasks they call.

    database  a url, or an Engine the application already has; the driver is psycopg
    schema    where the tables are: `sqlqueue migrate` makes them
    options   defaults for all tasks, see Options

    around_run      functions of a Run that return a context manager, entered around each run of
                    its tasks, where it runs; it sees what the task raises
    after_run       functions of an Ended, called in a thread of the worker when it has been
                    recorded how a run ended: failures that are retried and crashes as well
    before_enqueue  functions that take each Call made and return it, or another
    cipher          what arguments and results are stored through, see Plain

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
        self.around_run: list[Callable[[Run], AbstractContextManager[Any]]] = []
        self.after_run: list[Callable[[Ended], object]] = []
        self.before_enqueue: list[Callable[[Call], Call]] = []
        self.cipher: Any = Plain()
        self._waits: dict[int, Waits] = {}
        self._schedules: dict[str, tuple[Callable[[], Call], Schedule]] = {}
        self._transaction: Transaction | None = None
        self._id: str | None = None

    @overload
    def task(self, function: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def task(self, /, **options: Any) -> Callable[[Callable[..., R]], Task[..., R]]: ...
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
        return self.call(check_name("task", task), encode_call(args, kwargs), self.options)

    def call(self, task: str, args: str, options: Options) -> Call:
        """Make a Call, of arguments as JSON text."""
        key = options.unique.key_of(task, args) if options.unique else None
        call = Call(self._id or new_id(), task, self.cipher.seal(args), options, key)
        for hook in self.before_enqueue:
            call = hook(call)
        return call

    def enqueue(self, call: Call) -> Job[Any]:
        """Enqueue a call made by `Task.s`, in the transaction bound, or in one of its own."""
        if self._transaction is None:
            return self._job(call, self._add_alone(call))
        return self._job(call, within(self._transaction, partial(self._add, calls=[call])))

    async def aenqueue(self, call: Call) -> Job[Any]:
        """Do what `enqueue` does, from async code."""
        if self._transaction is None:
            return await asyncio.to_thread(self.enqueue, call)
        return self._job(call, await across(self._transaction, partial(self._add, calls=[call])))

    def _job(self, call: Call, added: Added) -> Job[Any]:
        return Job(self, UUID(added[1].get(call.id, call.id)))

    def enqueue_many(self, calls: Iterable[Call]) -> int:
        """Enqueue calls made by `Task.s`, in one transaction; return how many jobs were new.

        Takes any iterable, in bounded memory. In a transaction of its own, calls are encoded
        while others are on their way. Raises what their making raises, having written nothing.
        """
        if self._transaction is not None:
            return within(self._transaction, lambda conn: self._add_all(conn, calls))
        added = 0
        with self.autocommit() as conn, savepoint(conn), ThreadPoolExecutor(1) as sender:
            sent: Future[Added] | None = None
            for some in _batches(calls):
                added += sent.result()[0] if sent else 0
                sent = sender.submit(self._add, conn, some)
            return added + (sent.result()[0] if sent else 0)

    async def aenqueue_many(self, calls: Iterable[Call]) -> int:
        """Do what `enqueue_many` does, from async code."""
        if self._transaction is None:
            return await asyncio.to_thread(self.enqueue_many, calls)
        return await across(self._transaction, lambda conn: self._add_all(conn, calls))

    def _add_all(self, conn: Executes, calls: Iterable[Call]) -> int:
        with savepoint(conn):
            return sum(self._add(conn, some)[0] for some in _batches(calls))

    def _add_alone(self, call: Call) -> Added:
        """Add a job in a transaction of its own, again if its outcome is an error, or unknown."""
        patience, began, tries = call.options.wait_if_full, monotonic(), 0
        while True:
            tries += 1
            try:
                with self.autocommit() as conn:
                    return self._add(conn, [call])
            except QueueFull:
                if monotonic() >= began + (patience.total_seconds() if patience else 0):
                    raise
            except OperationalError:
                if tries > RETRIES or monotonic() > began + RETRY_WITHIN:
                    raise
            sleep(uniform(0, 2 * LOOK))

    def _add(self, conn: Executes, calls: list[Call]) -> Added:
        """Add jobs; return how many were new, and by id the jobs that stand for others."""
        groups: dict[tuple[str, tuple[Any, ...]], list[Call]] = {}
        for call in calls:
            groups.setdefault((call.task, call.options.identity), []).append(call)
        added, holders = 0, dict[str, str]()
        for (task, _), same in groups.items():
            options = same[0].options
            with savepoint(conn) if options.unique else nullcontext():
                if options.unique:
                    holders |= self._take_keys(conn, same, options.unique)
                new = [one for one in same if one.id not in holders]
                if new:
                    columns = [(one.id, one.args, one.unique_key) for one in new]
                    ids, args, keys = zip(*columns, strict=True)
                    added += self.store.enqueue(conn, ids, args, task, options.params, keys)
        return added, holders

    def _take_keys(self, conn: Executes, calls: list[Call], unique: Unique) -> dict[str, str]:
        keys, ids = [call.unique_key for call in calls], [call.id for call in calls]
        how = (unique.on_conflict, unique.until == "started", unique.period)
        times = (calls[0].options.delay, unique.longest)
        holders = self.store.take_keys(conn, keys, ids, *how, *times)
        if holders is None:
            raise UniqueKeyBusy()
        others = {one: other for one, other in zip(ids, holders, strict=True) if one != other}
        if others and unique.on_conflict == "raise":
            raise DuplicateJob(UUID(next(iter(others.values()))))
        return others

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

    @property
    def waits(self) -> Waits:
        """The waits for jobs in this process; one that was forked has its own."""
        return self._waits.setdefault(os.getpid(), Waits(self.engine, self.store))

    def worker(self, *queues: str, **options: Any) -> Worker:
        """Return a worker of some queues, `NAME` or `NAME:WEIGHT`, to run in this program.

        Without names it serves the queues of the tasks registered. Options: see WorkerOptions.
        """
        own = {self.options.queue, *(task.options.queue for task in self.tasks.values())}
        return Worker(self, queues or sorted(own), WorkerOptions(**options))

    def pause(
        self,
        queue: str | None = None,
        *,
        task: str | None = None,
        schedule: str | None = None,
        by: str = "",
        why: str | None = None,
        lasts: timedelta | None = None,
    ) -> None:
        """Start no more jobs of a queue, task or schedule, for a time or until `resume`.

        Running jobs go on. Raises ValueError unless exactly one of them is given.
        """
        self._say(self.store.pause, queue, task, schedule, True, by, why, lasts)

    def schedule(
        self, cron: Name = None, *, name: Name = None, args: Kwargs | None = None, **when: Any
    ) -> Callable[[Task[P, R]], Task[P, R]]:
        """Declare that a task is enqueued by itself; written above `@queue.task`.

        The schedule is named as the task is unless it gets a name; `args` are those of the task,
        by name. For the rest see Schedule. Workers set it up when they start, and pause it when
        it is declared no more.
        """
        schedule = Schedule(cron=cron, **when)

        def declare(task: Task[P, R]) -> Task[P, R]:
            self._schedules[name or task.name] = (lambda: task.s(**args or {}), schedule)
            return task

        return declare

    def set_schedule(self, name: str, call: Call, schedule: Schedule) -> None:
        """Make a schedule at run time, or change it; its row can be changed in SQL, too."""
        with self.autocommit() as conn:
            self.store.set_schedules(conn, f"[{schedule.to_json(name, call)}]", None)

    @property
    def declared(self) -> str:
        """The schedules declared in code, as JSON."""
        rows = [one.to_json(name, call()) for name, (call, one) in self._schedules.items()]
        return f"[{','.join(rows)}]"

    def set_policy(
        self, policy: Policy | None, *, queue: str | None = None, task: str | None = None
    ) -> None:
        """Set the rules of a queue or of a task, at any time; None takes them away.

        Workers follow within a poll; jobs that are ready already wait under them, too.
        Raises ValueError unless exactly one of queue and task is given.
        """
        self._say(self.store.set_policy, queue, task, None, policy and policy.to_json())

    def resume(
        self, queue: str | None = None, *, task: str | None = None, schedule: str | None = None
    ) -> None:
        """Go on starting jobs of a queue, task or schedule."""
        self._say(self.store.pause, queue, task, schedule, False, None, None, None)

    def _say(self, verb: Any, queue: Name, task: Name, schedule: Name, *what: Any) -> None:
        given = {"queue": queue, "task": task, "schedule": schedule}
        named = [(scope, name) for scope, name in given.items() if name is not None]
        if len(named) != 1:
            raise ValueError("give one of queue, task and schedule")
        with self.autocommit() as conn:
            verb(conn, named[0][0], check_name(*named[0]), *what)


def _batches(calls: Iterable[Call]) -> Iterator[list[Call]]:
    remaining = iter(calls)
    while some := list(islice(remaining, BATCH)):
        yield some
