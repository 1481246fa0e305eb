"""Enqueuing thousands to millions of calls at a time."""

import asyncio
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sqlqueue import BadArguments, Call, IdOutOfRange, Queue, Task
from sqlqueue.queue import BATCH

SOME = 2 * BATCH + BATCH // 2  # three batches, the last one short


@pytest.fixture
def number(queue: Queue) -> Task[..., Any]:
    """A task with a number for an argument."""

    @queue.task(name="number")
    def number(n: int) -> None: ...

    return number


def calls(task: Task[..., Any], count: int) -> Iterator[Call]:
    """As many calls, one after another."""
    return (task.s(n) for n in range(count))


def failing(task: Task[..., Any], count: int) -> Iterator[Call]:
    """As many calls, then an error."""
    yield from calls(task, count)
    raise OSError("the file ended")


def numbers(engine: Engine, table: str = "ready") -> list[int]:
    """The arguments of the jobs that another session sees, in the order of their lane."""
    order = "seq" if table == "ready" else "due_at"
    statement = (
        "select cast(args ->> 'n' as integer)"
        f" from sqlqueue.{table} join sqlqueue.job on id = job_id order by {order}"
    )
    with engine.connect() as conn:
        return list(conn.scalars(text(statement)))


def test_an_iterator_of_calls_is_enqueued_in_order(queue, number, engine) -> None:
    assert queue.enqueue_many(calls(number, SOME)) == SOME

    assert numbers(engine) == list(range(SOME))


def test_nothing_is_enqueued_when_there_are_no_calls(queue, engine) -> None:
    assert queue.enqueue_many([]) == 0
    assert queue.enqueue_many(iter(())) == 0
    assert asyncio.run(queue.aenqueue_many([])) == 0


def test_async_code_enqueues_many(queue, number, engine) -> None:
    assert asyncio.run(queue.aenqueue_many(calls(number, SOME))) == SOME

    assert numbers(engine) == list(range(SOME))


def test_many_jobs_exist_only_if_committed(queue, number, engine, migrated_url) -> None:
    with Session(engine) as session:
        assert queue.using(session).enqueue_many(calls(number, SOME)) == SOME
        assert numbers(engine) == []
        session.rollback()
        assert numbers(engine) == []
        queue.using(session).enqueue_many(calls(number, 3))
        session.commit()
    assert numbers(engine) == [0, 1, 2]

    raw = make_url(migrated_url).set(drivername="postgresql").render_as_string(False)
    with psycopg.connect(raw) as conn:
        queue.using(conn).enqueue_many(calls(number, SOME))
        assert numbers(engine) == [0, 1, 2]
    assert len(numbers(engine)) == 3 + SOME


def test_many_jobs_exist_only_if_committed_by_async_code(
    queue, number, engine, migrated_url
) -> None:
    async def enqueue(decide: str) -> None:
        application = create_async_engine(migrated_url)
        async with AsyncSession(application) as session:
            assert await queue.using(session).aenqueue_many(calls(number, SOME)) == SOME
            assert numbers(engine) == []
            await getattr(session, decide)()
        await application.dispose()

    asyncio.run(enqueue("rollback"))
    assert numbers(engine) == []
    asyncio.run(enqueue("commit"))
    assert numbers(engine) == list(range(SOME))


def test_tasks_and_options_may_be_mixed(queue, number, engine) -> None:
    @queue.task(name="word", priority=7)
    def word(text: str) -> None: ...

    urgent = number.using(priority=-1)
    later = number.using(delay=timedelta(hours=1))

    def mixed() -> Iterator[Call]:
        for n in range(BATCH):
            yield from (number.s(n), urgent.s(n), later.s(n), word.s(str(n)))

    assert queue.enqueue_many(mixed()) == 4 * BATCH

    places = Counter[tuple[str, str, int]]()
    with engine.connect() as conn:
        statement = "select task, state, priority, cast(args as text) from sqlqueue.jobs"
        rows = conn.execute(text(statement)).all()
        for task, state, priority, _ in rows:
            places[task, state, priority] += 1
    assert places == {
        ("number", "ready", 0): BATCH,
        ("number", "ready", -1): BATCH,
        ("number", "scheduled", 0): BATCH,
        ("word", "ready", 7): BATCH,
    }
    assert len({(task, state, priority, args) for task, state, priority, args in rows}) == 4 * BATCH


def test_calls_given_twice_make_one_job(queue, number, engine) -> None:
    some = list(calls(number, BATCH + 1))

    assert queue.enqueue_many(some + some) == BATCH + 1
    assert queue.enqueue_many(some) == 0

    assert numbers(engine) == list(range(BATCH + 1))


@pytest.mark.parametrize("before", [0, 1, BATCH, SOME])
def test_an_error_of_the_iterator_leaves_nothing(queue, number, engine, before) -> None:
    with pytest.raises(OSError, match="the file ended"):
        queue.enqueue_many(failing(number, before))
    with pytest.raises(OSError, match="the file ended"):
        asyncio.run(queue.aenqueue_many(failing(number, before)))

    assert numbers(engine) == []


def test_a_wrong_call_among_many_leaves_nothing(queue, number, engine) -> None:
    with pytest.raises(BadArguments):
        queue.enqueue_many(number.s(*args) for args in [(n,) for n in range(SOME)] + [()])

    assert numbers(engine) == []


@pytest.mark.parametrize("place", [0, 1, SOME - 1])
def test_a_stray_id_among_many_leaves_nothing(queue, number, engine, place) -> None:
    some = list(calls(number, SOME))
    some[place] = number.using(id=uuid4(), priority=1).s(0)

    with pytest.raises(IdOutOfRange, match="nothing was enqueued"):
        queue.enqueue_many(some)

    assert numbers(engine) == []


def write_to_shop(conn: Any) -> None:
    conn.execute(text("create temporary table shop (name text)"))
    conn.execute(text("insert into shop values ('mine')"))


def test_an_error_among_many_leaves_the_callers_transaction_as_it_was(
    queue, number, engine
) -> None:
    some = [*calls(number, SOME), number.using(id=uuid4(), priority=1).s(0)]

    with engine.begin() as conn:
        write_to_shop(conn)
        with pytest.raises(OSError, match="the file ended"):
            queue.using(conn).enqueue_many(failing(number, SOME))
        with pytest.raises(IdOutOfRange, match="nothing was enqueued"):
            queue.using(conn).enqueue_many(some)
        queue.using(conn).enqueue_many(calls(number, 2))
        assert conn.scalars(text("select name from shop")).all() == ["mine"]

    assert numbers(engine) == [0, 1]


def test_an_error_among_many_leaves_the_transaction_of_async_code_as_it_was(
    queue, number, engine, migrated_url
) -> None:
    async def enqueue() -> None:
        application = create_async_engine(migrated_url)
        async with application.begin() as conn:
            with pytest.raises(OSError, match="the file ended"):
                await queue.using(conn).aenqueue_many(failing(number, SOME))
            await queue.using(conn).aenqueue_many(calls(number, 2))
        await application.dispose()

    asyncio.run(enqueue())

    assert numbers(engine) == [0, 1]


def test_an_error_among_many_leaves_the_transaction_of_the_driver_as_it_was(
    queue, number, engine, migrated_url
) -> None:
    raw = make_url(migrated_url).set(drivername="postgresql").render_as_string(False)

    for autocommit in (False, True):
        with psycopg.connect(raw, autocommit=autocommit) as conn:
            with pytest.raises(OSError, match="the file ended"):
                queue.using(conn).enqueue_many(failing(number, SOME))
            queue.using(conn).enqueue_many(calls(number, 2))
        assert len(numbers(engine)) == (4 if autocommit else 2)


def peak_of(queue: Queue, number: Task[..., Any], count: int) -> int:
    """The most memory, in bytes, that enqueuing so many calls took at a time."""
    queue.enqueue_many(calls(number, 1))
    tracemalloc.start()
    try:
        assert queue.enqueue_many(calls(number, count)) == count
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [50_000, pytest.param(1_000_000, marks=pytest.mark.nightly)])
def test_memory_is_bounded_however_many_calls_there_are(queue, number, count) -> None:
    # All calls of the shorter form at once take 20 MB.
    assert peak_of(queue, number, count) < 5_000_000


def test_a_connection_of_the_pool_is_given_back(migrated_url, engine) -> None:
    application = create_engine(migrated_url, pool_size=1, max_overflow=0, pool_timeout=1)
    queue = Queue(application)
    number = queue.task(name="number")(print)

    for _ in range(3):
        with pytest.raises(OSError, match="the file ended"):
            queue.enqueue_many(failing(number, 2))
        queue.enqueue_many(calls(number, 2))

    assert application.pool.checkedout() == 0
    application.dispose()
