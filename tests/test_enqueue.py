"""Enqueuing in the caller's transaction, whatever holds it, and by the SQL function."""

import asyncio
import inspect
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import dict_row
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sqlqueue import (
    BadArguments,
    IdOutOfRange,
    Job,
    NotRepresentable,
    Options,
    Queue,
    Retry,
    Task,
    UnsupportedTransaction,
)
from sqlqueue.store import Ended, Lane, Store
from tests.conftest import TABLES
from tests.harness import rows, wait_until
from tests.test_store import hire

KINDS = (
    "Session", "Connection", "AsyncSession", "AsyncConnection", "psycopg", "async psycopg"
)  # fmt: skip
LEVELS = ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")
SECRET = "hunter2"


class Caller:
    """An application with a transaction of one of the six kinds, driven from sync code."""

    def __init__(self, kind: str, url: str, level: str | None = None) -> None:
        self._runner = asyncio.Runner()
        self._engine: Any = None
        if "psycopg" in kind:
            raw = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
            is_async = kind == "async psycopg"
            connect = psycopg.AsyncConnection.connect if is_async else psycopg.Connection.connect
            self.transaction: Any = self.do(connect(raw, row_factory=dict_row))
            if level:
                chosen = psycopg.IsolationLevel[level.replace(" ", "_")]
                self.do(
                    self.transaction.set_isolation_level(chosen)
                    if is_async
                    else setattr(self.transaction, "isolation_level", chosen)
                )
        else:
            options = {"isolation_level": level} if level else {}
            make = create_async_engine if kind.startswith("Async") else create_engine
            self._engine = make(url, **options)
            if kind == "Session":
                self.transaction = Session(self._engine)
            elif kind == "AsyncSession":
                self.transaction = AsyncSession(self._engine)
            else:
                connecting = self._engine.connect()
                self.transaction = self.do(connecting)
        self.is_async = "sync" in kind.lower()

    def do(self, value: Any) -> Any:
        """Await what is to be awaited."""

        async def awaited() -> Any:
            return await value

        return self._runner.run(awaited()) if inspect.isawaitable(value) else value

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement of the application; return its rows."""
        is_raw = self._engine is None
        result = self.do(self.transaction.execute(statement if is_raw else text(statement)))
        if not is_raw:
            return [tuple(row) for row in result] if result.returns_rows else []
        if result.description is None:
            return []
        return [tuple(row.values()) for row in self.do(result.fetchall())]

    def enqueue(self, task: Task[..., Any], *args: Any) -> Job[Any]:
        """Enqueue in this transaction, as code of this kind does."""
        bound = task.using(self.transaction)
        return self.do(bound.aenqueue(*args)) if self.is_async else bound.enqueue(*args)

    @contextmanager
    def savepoint_rolled_back(self) -> Iterator[None]:
        """Do something in a savepoint that is rolled back."""
        if self._engine is None:
            nested = self.transaction.transaction(force_rollback=True)
            enter = nested.__aenter__ if self.is_async else nested.__enter__
            leave = nested.__aexit__ if self.is_async else nested.__exit__
            self.do(enter())
            yield
            self.do(leave(None, None, None))
        else:
            nested = self.do(self.transaction.begin_nested())
            yield
            self.do(nested.rollback())

    def commit(self) -> None:
        self.do(self.transaction.commit())

    def rollback(self) -> None:
        self.do(self.transaction.rollback())

    def close(self) -> None:
        self.do(self.transaction.close())
        if self._engine is not None:
            self.do(self._engine.dispose())
        self._runner.close()


@pytest.fixture
def open_caller(migrated_url: str, engine: Engine) -> Iterator[Callable[..., Caller]]:
    """A function that opens a transaction of a kind; the table `shop` is there and empty."""
    with engine.begin() as conn:
        conn.execute(text("create table if not exists shop (name text)"))
        conn.execute(text("truncate shop"))
    opened: list[Caller] = []

    def open_one(kind: str, level: str | None = None) -> Caller:
        opened.append(Caller(kind, migrated_url, level))
        return opened[-1]

    yield open_one
    for caller in opened:
        caller.close()


@pytest.fixture
def greet(queue: Queue) -> Task[..., Any]:
    """A task with an argument."""

    @queue.task(name="shop.greet")
    def greet(name: str) -> str:
        """Greet somebody."""
        return f"hello {name}"

    return greet


def ids_in(engine: Engine, table: str) -> list[UUID]:
    """The jobs of a table that another session sees."""
    column = "id" if table == "job" else "job_id"
    with engine.connect() as conn:
        return list(conn.scalars(text(f"select {column} from sqlqueue.{table} order by 1")))


def exists(engine: Engine, job: Job[Any]) -> bool:
    """Whether another session sees the job; it is whole, or nothing of it is there."""
    is_asked_for, is_ready = (job.id in ids_in(engine, table) for table in ("job", "ready"))
    assert is_asked_for == is_ready
    return is_asked_for


def names_in_shop(engine: Engine) -> list[str]:
    with engine.connect() as conn:
        return list(conn.scalars(text("select name from shop order by name")))


def one(engine: Engine, statement: str) -> dict[str, Any]:
    """The only row of a query."""
    with engine.connect() as conn:
        return dict(conn.execute(text(statement)).mappings().one())


# One transaction


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_job_exists_only_if_committed(open_caller, greet, engine, kind, level) -> None:
    caller = open_caller(kind, level)

    caller.execute("insert into shop values ('kept')")
    kept = caller.enqueue(greet, "kept")
    assert not exists(engine, kept)
    caller.commit()
    assert exists(engine, kept)

    caller.execute("insert into shop values ('dropped')")
    dropped = caller.enqueue(greet, "dropped")
    caller.rollback()
    assert not exists(engine, dropped)

    assert ids_in(engine, "job") == [kept.id]
    assert names_in_shop(engine) == ["kept"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_savepoint_takes_its_job_along_and_nothing_else(open_caller, greet, engine, kind) -> None:
    caller = open_caller(kind)
    caller.execute("insert into shop values ('before')")
    before = caller.enqueue(greet, "before")

    with caller.savepoint_rolled_back():
        caller.execute("insert into shop values ('inside')")
        caller.enqueue(greet, "inside")
    caller.commit()

    assert ids_in(engine, "job") == ids_in(engine, "ready") == [before.id]
    assert names_in_shop(engine) == ["before"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_callers_transaction_is_left_as_it_was(open_caller, greet, kind, level) -> None:
    caller = open_caller(kind, level)
    caller.execute("insert into shop values ('mine')")
    # Those of plpgsql appear when it is loaded.
    settings = "select name, setting from pg_settings where category !~ 'Customized' order by name"
    identity = "select pg_current_xact_id(), pg_backend_pid()"

    def state() -> list[Any]:
        own = ("autocommit", "isolation_level", "row_factory", "prepare_threshold", "closed")
        return [
            *(getattr(caller.transaction, name, None) for name in own),
            caller.transaction.in_transaction() if "psycopg" not in kind else None,
            caller.execute(identity),
            caller.execute(settings),
        ]

    before = state()

    caller.enqueue(greet, "you")

    assert state() == before


@pytest.mark.parametrize("kind", ["psycopg", "async psycopg"])
def test_a_connection_in_autocommit_enqueues_at_once(open_caller, greet, engine, kind) -> None:
    caller = open_caller(kind)
    if caller.is_async:
        caller.do(caller.transaction.set_autocommit(True))
    else:
        caller.transaction.autocommit = True

    job = caller.enqueue(greet, "you")

    assert exists(engine, job)
    assert caller.transaction.autocommit is True


def test_without_a_transaction_it_enqueues_at_once(greet, engine) -> None:
    job = greet.enqueue("you")
    other = asyncio.run(greet.aenqueue("you"))

    assert exists(engine, job)
    assert exists(engine, other)


def test_async_code_may_hold_a_sync_session(open_caller, greet, engine) -> None:
    caller = open_caller("Session")

    job = asyncio.run(greet.using(caller.transaction).aenqueue("you"))

    assert not exists(engine, job)
    caller.commit()
    assert exists(engine, job)


# The same id


@pytest.mark.parametrize("kind", KINDS)
def test_an_enqueue_repeated_makes_one_job(open_caller, greet, engine, queue, kind) -> None:
    caller = open_caller(kind)
    first = greet.enqueue("you")
    again = greet.using(id=first.id)
    other = greet.s("you")

    assert caller.enqueue(again, "you").id == first.id  # committed by another transaction
    assert caller.enqueue(again, "you").id == first.id
    caller.commit()
    assert caller.enqueue(again, "you").id == first.id  # committed by this one
    caller.commit()
    assert again.enqueue("you").id == first.id
    assert queue.enqueue_many([again.s("you"), other, other, again.s("you")]) == 1

    assert ids_in(engine, "job") == ids_in(engine, "ready") == [first.id, UUID(other.id)]


def test_an_enqueue_repeated_while_the_first_is_uncommitted_makes_one_job(
    open_caller, greet, engine
) -> None:
    caller = open_caller("Session")
    first = caller.enqueue(greet, "you")

    with ThreadPoolExecutor(1) as thread:
        again = thread.submit(greet.using(id=first.id).enqueue, "you")
        wait_for_a_lock(engine)
        caller.commit()
        again.result(timeout=10)

    assert ids_in(engine, "job") == ids_in(engine, "ready") == [first.id]


def test_an_enqueue_repeated_after_its_job_ended_runs_nothing(greet, engine, store: Store) -> None:
    job = greet.enqueue("you")
    with engine.begin() as conn:
        worker = hire(conn, store)
        (row,) = store.claim(conn, Lane("default", 0), 0, 10, worker)
        store.finish(conn, [Ended(row.job_id, row.run, "succeeded")])

    greet.using(id=job.id).enqueue("you")

    assert ids_in(engine, "ready") == []
    assert job.state == "succeeded"


def wait_for_a_lock(engine: Engine) -> None:
    """Return when a session of this database waits for a lock."""
    statement = (
        "select count(*) from pg_stat_activity"
        " where datname = current_database() and wait_event_type = 'Lock'"
    )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        wait_until(lambda: conn.scalar(text(statement)), what="somebody waits for a lock")


def uuid_at(at: datetime) -> UUID:
    """A uuid v7 of an instant."""
    milliseconds = int(at.timestamp() * 1000)
    return UUID(int=milliseconds << 80 | 0x7 << 76 | 0x2 << 62 | uuid4().int & (1 << 62) - 1)


STRAY_IDS = {
    "uuid4": uuid4,
    "too old": lambda: uuid_at(datetime.now(UTC) - timedelta(days=30, minutes=1)),
    "too far ahead": lambda: uuid_at(datetime.now(UTC) + timedelta(days=1, minutes=1)),
    "nil": lambda: UUID(int=0),
}


@pytest.mark.parametrize("make_id", STRAY_IDS.values(), ids=STRAY_IDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stray_id_is_refused_and_the_transaction_goes_on(
    open_caller, greet, engine, kind, make_id
) -> None:
    caller = open_caller(kind)
    caller.execute("insert into shop values ('mine')")

    with pytest.raises(IdOutOfRange, match="nothing was enqueued"):
        caller.enqueue(greet.using(id=make_id()), "you")

    job = caller.enqueue(greet, "you")
    caller.commit()
    assert ids_in(engine, "job") == [job.id]
    assert names_in_shop(engine) == ["mine"]


@pytest.mark.parametrize("off", [timedelta(days=-29, hours=-23), timedelta(hours=23)])
def test_an_id_within_the_retention_and_a_day_ahead_is_taken(greet, engine, off) -> None:
    job = greet.using(id=uuid_at(datetime.now(UTC) + off)).enqueue("you")

    assert exists(engine, job)
    with engine.connect() as conn:
        assert conn.scalar(text("select count(*) from only sqlqueue.job_default")) == 0


# What is refused


@pytest.fixture
def nowhere() -> Queue:
    """A queue whose database cannot be reached: whoever sends something fails otherwise."""
    return Queue("postgresql+psycopg://127.0.0.1:1/nowhere")


@pytest.mark.parametrize(
    ("args", "kwargs", "error"),
    [
        ((), {}, BadArguments),
        ((1, 2, 3), {}, BadArguments),
        ((1,), {"text": "a", "color": "red"}, BadArguments),
        (("one",), {}, NotRepresentable),
        ((1, object()), {}, NotRepresentable),
        ((1, "\0"), {}, NotRepresentable),
        ((1, "x" * (1 << 20)), {}, NotRepresentable),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_sent(nowhere, args, kwargs, error) -> None:
    @nowhere.task(name="draw")
    def draw(number: int, text: str = "") -> None: ...

    with pytest.raises(error):
        draw.enqueue(*args, **kwargs)
    with pytest.raises(error):
        asyncio.run(draw.aenqueue(*args, **kwargs))
    with pytest.raises(error):
        draw.s(*args, **kwargs)


def test_names_of_tasks_are_checked_before_anything_is_sent(nowhere) -> None:
    for name in ("", "two words", "x" * 101, "a'b", "a\0b"):
        with pytest.raises(ValueError, match="task must match"):
            nowhere.send(name)


@pytest.mark.parametrize(
    "make",
    [
        lambda: create_engine("sqlite://").connect(),
        lambda: Session(create_engine("sqlite://")),
        lambda: create_engine("sqlite://"),
        lambda: Session(create_engine("sqlite://")).begin(),
        lambda: "postgresql://localhost/shop",
        lambda: "",
        lambda: 0,
        object,
    ],
)
def test_what_is_no_transaction_of_ours_is_refused(greet, engine, make) -> None:
    with pytest.raises(UnsupportedTransaction):
        greet.using(make()).enqueue("you")
    with pytest.raises(UnsupportedTransaction):
        asyncio.run(greet.using(make()).aenqueue("you"))

    assert ids_in(engine, "job") == []


@pytest.mark.parametrize("kind", ["AsyncSession", "AsyncConnection", "async psycopg"])
def test_a_sync_call_with_an_async_transaction_says_what_to_call(open_caller, greet, kind) -> None:
    caller = open_caller(kind)

    with pytest.raises(UnsupportedTransaction, match="await the method whose name begins with `a`"):
        greet.using(caller.transaction).enqueue("you")


def test_an_unknown_option_is_refused_by_a_list_of_those_known(greet, queue) -> None:
    asks = (
        lambda: greet.using(prio=1),
        lambda: queue.using(prio=1),
        lambda: queue.task(prio=1)(print_nothing),
        lambda: Queue(queue.engine, prio=1),
    )
    for ask in asks:
        with pytest.raises(TypeError, match=r"unknown option 'prio'.*queue, priority, delay"):
            ask()


def test_two_tasks_of_one_name_are_an_error(queue, greet) -> None:
    with pytest.raises(ValueError, match=r"task shop\.greet is registered already"):
        queue.task(name="shop.greet")(print_nothing)

    assert queue.tasks["shop.greet"] is greet


def print_nothing() -> None:
    """Do nothing."""


def greet_aloud(name: str) -> None:
    """Greet somebody so that all hear it."""


def test_a_task_is_still_the_function_it_was(queue) -> None:
    task = queue.task(print_nothing)

    assert task() is None
    assert queue.tasks[f"{__name__}.print_nothing"] is task
    assert (task.__name__, task.__doc__) == ("print_nothing", "Do nothing.")
    assert inspect.signature(task) == inspect.signature(print_nothing)


# Errors of the database


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_the_database_shows_no_argument(open_caller, greet, engine, kind) -> None:
    caller = open_caller(kind)
    caller.execute("set local lock_timeout = '50ms'")

    with engine.connect() as other:
        other.execute(text("lock table sqlqueue.ready"))
        with pytest.raises((DBAPIError, psycopg.Error)) as caught:
            caller.enqueue(greet, SECRET)

    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert getattr(caught.value, "orig", caught.value).sqlstate == "55P03"


@pytest.mark.direct
def test_an_error_of_the_database_shows_no_argument_whatever_the_engine(
    migrated_url, engine
) -> None:
    application = create_engine(migrated_url, connect_args={"options": "-c lock_timeout=50ms"})
    queue = Queue(application)
    calls = (
        lambda: queue.send("shop.greet", name=SECRET),
        lambda: asyncio.run(queue.asend("shop.greet", name=SECRET)),
        lambda: queue.enqueue_many([queue.task(name="shop.greet")(greet_aloud).s(SECRET)]),
    )

    with engine.connect() as other:
        other.execute(text("lock table sqlqueue.ready"))
        for call in calls:
            with pytest.raises(DBAPIError) as caught:
                call()
            assert SECRET not in "".join(traceback.format_exception(caught.value))
    application.dispose()


@pytest.mark.direct
def test_a_connection_that_broke_is_not_used_again(migrated_url, engine) -> None:
    application = create_engine(migrated_url, pool_size=1, max_overflow=0)
    queue = Queue(application)
    job = queue.send("shop.greet")
    ended = (
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where datname = current_database() and pid <> pg_backend_pid()"
    )
    rows(engine, ended)

    with pytest.raises(DBAPIError):
        job.refresh()

    assert job.refresh().state == "ready"
    rows(engine, ended)
    assert exists(engine, queue.send("shop.greet"))  # tried again by itself
    application.dispose()


# Options


def test_the_call_overrides_the_task_which_overrides_the_queue(queue, engine) -> None:
    ours = Queue(queue.engine, priority=1, queue="ours", timeout=None)

    @ours.task(name="shop.pack", priority=2, queue="pack")
    def pack() -> None: ...

    pack.using(priority=3).enqueue()

    row = one(engine, "select priority, queue, timeout, attempts, max_crashes from sqlqueue.job")
    assert row == {
        "priority": 3, "queue": "pack", "timeout": None, "attempts": 10, "max_crashes": 3
    }  # fmt: skip


def test_every_option_is_stored_with_the_job(queue, engine) -> None:
    greet = queue.task(name="shop.greet")(greet_aloud)
    ends = datetime(2040, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)

    greet.using(
        queue="mail",
        priority=-7,
        expires=ends,
        timeout=timedelta(seconds=1.5),
        retry=Retry(attempts=4, waits=[timedelta(seconds=9)]),
        max_crashes=1,
        executor="process",
        keep=False,
        tags=["a", 'b"\\,{}'],
        description="for {you}",
        key="tenant:1",
        weight=3,
        headers={"trace": "1"},
    ).enqueue("you")

    row = one(engine, "select * from sqlqueue.job")
    assert row.pop("id")
    assert row.pop("created_at")
    assert row == {
        "task": "shop.greet",
        "args": {"name": "you"},
        "queue": "mail",
        "priority": -7,
        "due_at": None,
        "expires_at": ends,
        "timeout": timedelta(seconds=1.5),
        "attempts": 4,
        "retry": {"waits": ["PT9S"]},
        "max_crashes": 1,
        "executor": "process",
        "keep": False,
        "tags": ["a", 'b"\\,{}'],
        "description": "for {you}",
        "key": "tenant:1",
        "weight": 3,
        "unique_key": None,
        "headers": {"trace": "1"},
    }
    ready = one(engine, "select * from sqlqueue.ready")
    assert (ready["queue"], ready["priority"]) == ("mail", -7)
    assert (ready["run"], ready["failures"], ready["crashes"]) == (0, 0, 0)


def test_a_delay_counts_from_the_start_of_the_transaction(greet, engine) -> None:
    greet.using(delay=timedelta(minutes=5), expires=timedelta(minutes=9)).enqueue("you")

    row = one(engine, "select * from sqlqueue.job")
    assert row["due_at"] - row["created_at"] == timedelta(minutes=5)
    assert row["expires_at"] - row["created_at"] == timedelta(minutes=9)
    place = one(engine, "select * from sqlqueue.scheduled")
    assert (place["due_at"], place["reason"]) == (row["due_at"], "delay")
    assert ids_in(engine, "ready") == []


def test_an_instant_is_kept_and_a_past_one_means_at_once(greet, engine) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)

    delayed = greet.using(run_at=later).enqueue("you")
    at_once = greet.using(run_at=later - timedelta(days=1)).enqueue("you")

    assert one(engine, "select due_at from sqlqueue.scheduled") == {"due_at": later}
    assert ids_in(engine, "scheduled") == [delayed.id]
    assert ids_in(engine, "ready") == [at_once.id]


def test_a_job_whose_code_is_elsewhere_can_be_sent(queue, open_caller, engine) -> None:
    caller = open_caller("AsyncSession")

    queue.send("other.greet", "you", lang="en")
    queue.using(priority=9, tags=["a"]).send("other.greet")
    bound = queue.using(caller.transaction, priority=8)
    sent = caller.do(bound.asend("other.greet"))

    with engine.connect() as conn:
        statement = "select args, priority, tags from sqlqueue.job order by priority"
        rows = [tuple(row) for row in conn.execute(text(statement))]
    assert rows == [({"*": ["you"], "lang": "en"}, 0, None), ({}, 9, ["a"])]
    caller.commit()
    assert exists(engine, sent)


def test_the_id_of_a_job_is_a_uuid_v7_known_before_the_commit(greet, open_caller, engine) -> None:
    caller = open_caller("Session")
    asked = uuid_at(datetime.now(UTC))

    made = caller.enqueue(greet, "you")
    given = caller.enqueue(greet.using(id=asked), "you")

    assert (made.id.version, given.id) == (7, asked)
    caller.commit()
    assert ids_in(engine, "job") == sorted([made.id, asked])


# The SQL function


def plain(url: str) -> psycopg.Connection[Any]:
    """A connection that knows nothing of SQLAlchemy or sqlqueue."""
    return psycopg.connect(make_url(url).set(drivername="postgresql").render_as_string(False))


def test_the_sql_function_has_the_defaults_of_python(queue, engine, migrated_url) -> None:
    queue.send("shop.greet")
    with plain(migrated_url) as conn:
        conn.execute("select sqlqueue.enqueue('shop.greet')")

    for table, own in (("job", {"id", "created_at"}), ("ready", {"job_id", "due_at", "seq"})):
        with engine.connect() as conn:
            rows = conn.execute(text(f"select * from sqlqueue.{table}")).mappings().all()
        ours, theirs = ({k: v for k, v in row.items() if k not in own} for row in rows)
        assert ours == theirs
    assert Options() == Options(queue="default", retry=Retry())


def test_the_sql_function_is_part_of_its_transaction(engine, migrated_url) -> None:
    with plain(migrated_url) as conn:
        (job_id,) = conn.execute("""select sqlqueue.enqueue('a', '{"n": 1}')""").fetchone()
        assert ids_in(engine, "job") == []
        conn.commit()
        conn.execute("select sqlqueue.enqueue('b')")
        conn.rollback()

    assert job_id.version == 7
    assert ids_in(engine, "job") == ids_in(engine, "ready") == [job_id]


def test_the_sql_function_called_again_with_an_id_adds_nothing(engine, migrated_url) -> None:
    job_id = uuid_at(datetime.now(UTC))

    with plain(migrated_url) as conn:
        for _ in range(2):
            got = conn.execute("select sqlqueue.enqueue('a', id => %s)", [job_id]).fetchone()
            assert got == (job_id,)
            conn.commit()

    assert ids_in(engine, "job") == ids_in(engine, "ready") == [job_id]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("null", "task is no name"),
        ("''", "task is no name"),
        ("'two words'", "task is no name"),
        ("repeat('x', 101)", "task is no name"),
        ("'a', queue => ''", "queue is no name"),
        ("'a', queue => null", "queue is no name"),
        ("'a', '[1]'", "args must be a JSON object"),
        ("'a', null", "args must be a JSON object"),
        ("'a', 'null'", "args must be a JSON object"),
        ("'a', jsonb_build_object('x', repeat('x', 1048576))", "args are over 1 MiB"),
        (
            "'a', jsonb_build_object('x', (repeat('[', 64) || repeat(']', 64))::jsonb)",
            "args are nested",
        ),
        ("'a', key => repeat('x', 1001)", "key is over 1000 bytes"),
        ("'a', headers => '[]'", "headers must be a JSON object"),
        ("'a', headers => jsonb_build_object('x', repeat('x', 8192))", "headers are over 8 KiB"),
        ("'a', headers => '{\"x\": 1}'", "headers"),
        ("'a', priority => 101", "priority must be from -100 to 100"),
        ("'a', priority => null", "priority must be from -100 to 100"),
        ("'a', attempts => 0", "attempts must be at least 1"),
        ("'a', attempts => null", "attempts must be at least 1"),
        ("'a', max_crashes => 0", "max_crashes must be at least 1"),
        ("'a', max_crashes => null", "max_crashes must be at least 1"),
        ("'a', timeout => '0'", "timeout must be more than 0"),
        ("'a', delay => '1s', run_at => now()", "give delay or run_at, not both"),
        ("'a', delay => '-1s'", "delay"),
        ("'a', run_at => 'infinity'", "run_at"),
        ("'a', executor => 'fork'", "executor must be async, thread or process"),
        ("'a', keep => null", "keep must be true or false"),
        ("'a', retry => '[]'", "retry"),
        ("'a', id => gen_random_uuid()", "id must be a uuid v7"),
        ("'a', id => sqlqueue.uuid_at(now() - interval '31 days')", "id must be a uuid v7"),
        ("'a', id => sqlqueue.uuid_at(now() + interval '25 hours')", "id must be a uuid v7"),
    ],
)
def test_the_sql_function_refuses_what_python_refuses(
    engine, migrated_url, arguments, problem
) -> None:
    with plain(migrated_url) as conn:
        with pytest.raises(psycopg.errors.InvalidParameterValue) as caught:
            conn.execute(f"select sqlqueue.enqueue({arguments})")
        conn.rollback()

    message = caught.value.diag.message_primary
    assert problem in message
    assert "nothing was enqueued" in message
    assert ids_in(engine, "job") == []


# The bell


@pytest.fixture
def hears(migrated_url: str) -> Iterator[Callable[[], list[str]]]:
    """A function that returns what was notified on the channel since it was last asked."""
    with plain(migrated_url) as conn:
        conn.autocommit = True
        conn.execute("listen sqlqueue")

        def heard() -> list[str]:
            conn.execute("select")  # what was committed before this has come
            return [n.payload for n in conn.notifies(timeout=0)]

        yield heard


@pytest.mark.direct
def test_an_enqueue_rings_only_if_somebody_sleeps(greet, queue, engine, store, hears) -> None:
    greet.enqueue("you")
    assert hears() == []

    with engine.begin() as conn:
        store.arm(conn, ["default"], 7, timedelta(seconds=30))
    greet.using(priority=5).enqueue("you")
    greet.using(queue="other").enqueue("you")
    greet.using(delay=timedelta(minutes=1)).enqueue("you")
    assert hears() == ["7 5 default"]
    greet.using(delay=timedelta(milliseconds=200)).enqueue("you")  # before upkeep looks again
    assert hears() == ["7 due default"]

    with engine.begin() as conn:
        conn.execute(text("set local sqlqueue.ring = 'off'"))
        greet.using(conn).enqueue("you")
    assert hears() == []

    with engine.begin() as conn:
        store.disarm(conn, ["default"], 7)
    greet.enqueue("you")
    assert hears() == []


def test_the_bell_of_a_worker_that_has_gone_is_silent(greet, engine, store, hears) -> None:
    with engine.begin() as conn:
        store.arm(conn, ["default"], 7, timedelta(seconds=30))
        age = "update sqlqueue.doorbell set rings_until = now() - interval '1 second'"
        conn.execute(text(age))

    greet.enqueue("you")

    assert hears() == []


def test_an_enqueue_rolled_back_rings_nobody(greet, engine, store, hears) -> None:
    with engine.begin() as conn:
        store.arm(conn, ["default"], 7, timedelta(seconds=30))

    with engine.connect() as conn:
        greet.using(conn).enqueue("you")
        conn.rollback()

    assert hears() == []


@pytest.mark.direct
def test_a_promotion_rings_in_each_lane(greet, engine, store, hears) -> None:
    for priority in (5, 5, 6):
        greet.using(priority=priority, delay=timedelta(minutes=1)).enqueue("you")
    with engine.begin() as conn:
        store.arm(conn, ["default"], 7, timedelta(seconds=30))
        conn.execute(text("update sqlqueue.scheduled set due_at = now()"))
        store.promote(conn, None, 10)

    assert sorted(hears()) == ["7 5 default", "7 6 default"]


@pytest.mark.direct
def test_who_has_its_hands_full_passes_the_bell_on_to_everybody(engine, store, hears) -> None:
    with engine.begin() as conn:
        store.pass_on(conn, "default", 5)

    assert hears() == ["0 5 default"]


@pytest.mark.direct
def test_the_worker_of_a_running_job_is_told_to_cancel_it(greet, engine, store, hears) -> None:
    job = greet.enqueue("you")
    with engine.begin() as conn:
        worker = hire(conn, store)
        store.claim(conn, Lane("default", 0), 0, 1, worker)

    assert job.cancel()

    assert hears() == [f"{worker} cancel {job.id}"]
    with engine.connect() as conn:
        assert store.leases(conn, worker, None) == {(str(job.id), 1): True}


def test_the_tables_of_the_fixture_are_all_there_are(engine) -> None:
    with engine.connect() as conn:
        found = conn.scalars(
            text(
                "select relname from pg_class where relnamespace = 'sqlqueue'::regnamespace"
                " and relkind in ('r', 'p') and not relispartition"
            )
        )
        assert set(found) - {"alembic_version", "setting"} == set(TABLES)
