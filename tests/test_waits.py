"""Waiting for results: one connection and one thread for all waits of a process."""

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, create_engine, make_url
from sqlalchemy.exc import OperationalError

from sqlqueue import Job, JobNotFound, NotEnded, Queue, waits
from sqlqueue.integrations.alembic import migrate
from tests.harness import POLLING, SOON, rows, value, wait_until

MOMENT = timedelta(milliseconds=20)
NAME = "sqlqueue waits"  # of the thread, and here of the connections, too
COUNT = "select count(*) from pg_stat_activity where application_name = 'sqlqueue waits'"
CUT = (
    "select count(pg_terminate_backend(pid)) from pg_stat_activity"
    " where application_name = 'sqlqueue waits'"
)


def queue_on(url: str, name: str) -> Queue:
    """A queue with one task, whose connections have a name."""
    queue = Queue(create_engine(make_url(url).update_query_dict({"application_name": name})))

    @queue.task(name="double")
    def double(number: int) -> int:
        return 2 * number

    return queue


@pytest.fixture
def waiting(migrated_url: str, engine: Engine) -> Iterator[Queue]:
    """A queue that only enqueues and waits; when the test is over it has left nothing behind."""
    wait_until(lambda: threads() == 0, what="the end of what an earlier test waited with")
    queue = queue_on(migrated_url, NAME)
    yield queue
    queue.engine.dispose()
    wait_until(lambda: threads() == 0 and value(engine, COUNT) == 0, what="nothing left behind")


def threads() -> int:
    return sum(thread.name == NAME for thread in threading.enumerate())


def add(queue: Queue, count: int) -> list[Job[int]]:
    """Enqueue jobs; leave no connection of the queue's open."""
    calls = [queue.tasks["double"].s(number) for number in range(count)]
    queue.enqueue_many(calls)
    queue.engine.dispose()
    return [Job(queue, UUID(call.id)) for call in calls]


def is_looking(engine: Engine) -> bool:
    """Whether the connection of the waits is there, and no other."""
    return bool(value(engine, COUNT) == 1)


def test_a_thousand_awaits_share_one_connection_and_one_thread(waiting, engine, migrated_url):
    jobs = add(waiting, 1000)
    seen: list[tuple[int, int]] = []

    async def ask() -> list[int]:
        awaits = asyncio.gather(*(job.await_result(SOON) for job in jobs))
        await asyncio.to_thread(wait_until, partial(is_looking, engine))
        worker = queue_on(migrated_url, "others").worker("default", **POLLING)
        await asyncio.to_thread(worker.start)
        while not awaits.done():
            seen.append((await asyncio.to_thread(value, engine, COUNT), threads()))
        await asyncio.to_thread(worker.__exit__)
        return await awaits

    assert asyncio.run(ask()) == [2 * number for number in range(1000)]
    assert set(seen) == {(1, 1)}


def test_waits_that_are_given_up_leave_nothing_behind(waiting, engine):
    jobs = add(waiting, 20)

    async def ask() -> None:
        late = [job.await_result(MOMENT) for job in jobs[:10]]
        for error in await asyncio.gather(*late, return_exceptions=True):
            assert isinstance(error, NotEnded)
        awaits = [asyncio.create_task(job.await_result()) for job in jobs]
        await asyncio.to_thread(wait_until, partial(is_looking, engine))
        for one in awaits:
            one.cancel()
        for error in await asyncio.gather(*awaits, return_exceptions=True):
            assert isinstance(error, asyncio.CancelledError)

    asyncio.run(ask())  # the rest is said by the fixture


def test_a_wait_goes_on_when_its_connection_is_cut(waiting, engine, migrated_url):
    (job,) = add(waiting, 1)
    row = waiting.waits.add(str(job.id), SOON)
    wait_until(partial(is_looking, engine))

    assert value(engine, CUT) == 1
    with queue_on(migrated_url, "others").worker("default", **POLLING):
        assert job.wait(SOON) == 0

    assert row.result(10).state == "succeeded"


def test_a_wait_fails_when_the_database_stays_away(create_database, engine, monkeypatch):
    monkeypatch.setattr(waits, "AWAY", 0.2)
    url = create_database()
    queue = queue_on(url, NAME)
    migrate(queue.engine)
    (job,) = add(queue, 1)
    without_end = queue.waits.add(str(job.id), None)
    wait_until(partial(is_looking, engine))

    rows(engine, f"alter database {make_url(url).database} with allow_connections false")
    rows(engine, CUT)

    with pytest.raises(OperationalError):
        without_end.result(10)
    with pytest.raises(OperationalError):
        job.wait(MOMENT)


def test_a_job_that_never_was_is_not_found_by_who_waits_for_it(waiting):
    job = Job[int](waiting, uuid4())
    with pytest.raises(JobNotFound):
        job.wait()
    with pytest.raises(JobNotFound):
        asyncio.run(job.await_result())


def test_a_process_that_was_forked_while_its_parent_waited_can_wait(waiting, engine, migrated_url):
    (job,) = add(waiting, 1)
    row = waiting.waits.add(str(job.id), SOON)
    wait_until(partial(is_looking, engine))

    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            job.wait(SOON)
            os._exit(0)
        finally:
            os._exit(1)
    with queue_on(migrated_url, "others").worker("default", **POLLING):
        assert os.waitpid(child, 0)[1] == 0
        assert row.result(10).state == "succeeded"
