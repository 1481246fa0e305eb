"""Tasks whose writes, follow-up jobs and end are one commit, and runs that lost their lease."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sqlqueue import Job, LeaseLost, Queue, Retry, current_run
from sqlqueue.store import Ended
from tests.harness import (
    POLLING,
    SOON,
    application_table,
    effects,
    outcomes,
    rows,
    value,
    wait_until,
    work,
)

LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
NOTE = text("insert into effect (key, run) values (:key, :run)")
AT_ONCE = Retry(attempts=2, waits=[timedelta(0)])


@pytest.fixture(autouse=True)
def table(engine: Engine) -> None:
    application_table(engine)


def of_run(key: str) -> dict[str, Any]:
    return {"key": key, "run": current_run().number}


def transactions(engine: Engine, job: Job[Any], follow_up: str) -> set[str]:
    """Return the ids of the transactions that wrote the effect, the end and the follow-up."""
    sql = (
        "select cast(xmin as text) from effect where key = 'paid'"
        " union all select cast(xmin as text) from sqlqueue.run where job_id = :id"
        " union all select cast(xmin as text) from sqlqueue.job where task = :follow_up"
    )
    found = [row[0] for row in rows(engine, sql, id=job.id, follow_up=follow_up)]
    assert len(found) == 3
    return set(found)


def test_the_session_of_a_coroutine_connects_as_the_queues_engine_does(migrated_url, engine):
    how = {"application_name": "a shop's", "prepare_threshold": None}
    queue = Queue(create_engine(migrated_url, connect_args=how))

    @queue.task(name="look", transactional=True)
    async def look(session: AsyncSession) -> list[Any]:
        pooled = await (await session.connection()).get_raw_connection()
        name = await session.scalar(text("show application_name"))
        return [name, pooled.driver_connection.prepare_threshold]

    job = look.enqueue()
    work(queue)

    assert job.wait(SOON) == list(how.values())
    queue.engine.dispose()


def test_the_writes_of_a_task_its_follow_up_and_its_end_are_one_commit(queue, engine):
    @queue.task(name="pay", transactional=True)
    def pay(session: Session, amount: int) -> int:
        session.execute(NOTE, of_run("paid"))
        queue.using(session, queue="later").send("receipt", amount)
        return amount

    with queue.worker("default", **POLLING):
        job = pay.enqueue(5)
        assert job.wait(SOON) == 5

    assert len(transactions(engine, job, "receipt")) == 1


def test_the_writes_of_an_async_task_its_follow_up_and_its_end_are_one_commit(queue, engine):
    @queue.task(name="pay", transactional=True)
    async def pay(session: AsyncSession, amount: int) -> int:
        await session.execute(NOTE, of_run("paid"))
        await queue.using(session, queue="later").asend("receipt", amount)
        return amount

    with queue.worker("default", **POLLING):
        job = pay.enqueue(5)
        assert job.wait(SOON) == 5

    assert len(transactions(engine, job, "receipt")) == 1


def test_an_exception_rolls_back_all_a_task_wrote_and_is_recorded_by_itself(queue, engine):
    @queue.task(name="sync", transactional=True, retry=AT_ONCE)
    def in_thread(session: Session) -> None:
        session.execute(NOTE, of_run("sync"))
        queue.using(session, queue="later").send("receipt")
        raise ValueError("no money")

    @queue.task(name="async", transactional=True, retry=AT_ONCE)
    async def on_loop(session: AsyncSession) -> None:
        await session.execute(NOTE, of_run("async"))
        await queue.using(session, queue="later").asend("receipt")
        raise ValueError("no money")

    with queue.worker("default", **POLLING):
        jobs = [in_thread.enqueue(), on_loop.enqueue()]
        for job in jobs:
            wait_until(lambda job=job: job.refresh().has_ended)

    for job in jobs:
        assert (job.state, job.error_type, job.error) == ("failed", "ValueError", "no money")
        assert outcomes(engine, job.id) == ["failed", "failed"]
    assert rows(engine, "select from effect") == []
    assert value(engine, "select count(*) from sqlqueue.job where task = 'receipt'") == 0


def test_a_result_that_is_no_json_rolls_back_the_writes(queue, engine):
    @queue.task(name="odd", transactional=True)
    def odd(session: Session) -> object:
        session.execute(NOTE, of_run("odd"))
        return object()

    with queue.worker("default", **POLLING):
        job = odd.enqueue()
        wait_until(lambda: job.refresh().has_ended)

    assert (job.state, outcomes(engine, job.id)) == ("failed", ["failed"])
    assert effects(engine, "odd") == []


def test_a_task_finishes_its_job_in_a_session_of_its_own(queue, engine):
    @queue.task(name="own")
    def own(amount: int) -> int:
        with Session(engine) as session, session.begin():
            session.execute(NOTE, of_run("paid"))
            queue.using(session, queue="later").send("receipt", amount)
            current_run().finish(session, amount + 1)
        return 0  # not the result: that was given to finish

    with queue.worker("default", **POLLING):
        job = own.enqueue(1)
        assert job.wait(SOON) == 2

    assert len(transactions(engine, job, "receipt")) == 1
    assert outcomes(engine, job.id) == ["succeeded"]


def test_an_exception_after_the_finishing_commit_changes_nothing(queue, engine):
    @queue.task(name="late", retry=AT_ONCE)
    def late() -> str:
        with Session(engine) as session, session.begin():
            current_run().finish(session, "done")
        raise ValueError("too late to matter")

    with queue.worker("default", **POLLING):
        job = late.enqueue()
        assert job.wait(SOON) == "done"

    assert outcomes(engine, job.id) == ["succeeded"]


class Overtaken:
    """Two runs of a job: the first loses its lease to the second, and goes on afterwards."""

    def __init__(self, engine: Engine) -> None:
        self.started = threading.Event()
        self.may_finish = threading.Event()
        self.has_lost = threading.Event()
        self.errors: list[LeaseLost] = []
        self.may_succeed = threading.Event()
        self._engine = engine

    def pass_through(self) -> None:
        """Called by both runs between their writes and their finish."""
        if current_run().number == 1:
            self.started.set()
            assert self.may_finish.wait(10)
        else:
            assert self.may_succeed.wait(10)

    def refused(self, error: LeaseLost) -> None:
        """Called by the first run when it could not finish."""
        self.errors.append(error)
        self.has_lost.set()

    def play(self, queue: Queue, job: Job[Any], worker: int) -> None:
        """Take the lease from the first run, and let it try to finish while the second runs."""
        assert self.started.wait(10)
        rescued = wait_until(lambda: self._rescue(queue, worker))  # it skips locked rows
        assert [(one.job_id, one.run) for one in rescued] == [(str(job.id), 1)]
        sql = "select run from sqlqueue.lease where job_id = :id"
        wait_until(lambda: value(self._engine, sql, id=job.id) == 2, what="the second run")
        self.may_finish.set()
        assert self.has_lost.wait(10), "the first run was not refused"
        assert value(self._engine, sql, id=job.id) == 2
        self.may_succeed.set()

    def _rescue(self, queue: Queue, worker: int) -> list[Ended]:
        with self._engine.begin() as conn:
            return queue.store.rescue(conn, 10, worker)


@pytest.fixture
def overtaken(engine: Engine) -> Iterator[Overtaken]:
    both = Overtaken(engine)
    yield both
    both.may_finish.set()
    both.may_succeed.set()


@pytest.mark.parametrize("level", LEVELS)
def test_a_run_that_lost_its_lease_cannot_finish_the_job(queue, engine, overtaken, level):
    stricter = create_engine(engine.url, isolation_level=level)

    @queue.task(name="slow")
    def slow() -> int:
        run = current_run()
        with Session(stricter) as session:
            session.execute(NOTE, of_run("slow"))
            overtaken.pass_through()
            try:
                run.finish(session, run.number)
                session.commit()
            except LeaseLost as error:
                session.rollback()
                overtaken.refused(error)
        return 0  # not the result: that was given to finish

    with queue.worker("default", **POLLING) as worker:
        job = slow.enqueue()
        overtaken.play(queue, job, worker.id)
        assert job.wait(SOON) == 2

    assert [(error.job_id, error.run) for error in overtaken.errors] == [(job.id, 1)]
    assert outcomes(engine, job.id) == ["crashed", "succeeded"]
    assert effects(engine, "slow") == [2]
    stricter.dispose()


@pytest.mark.parametrize("level", LEVELS)
def test_an_async_run_that_lost_its_lease_cannot_finish_the_job(queue, engine, overtaken, level):
    @queue.task(name="slow")
    async def slow() -> int:
        run = current_run()
        stricter = create_async_engine(engine.url, isolation_level=level)
        async with AsyncSession(stricter) as session:
            await session.execute(NOTE, of_run("slow"))
            passing = asyncio.ensure_future(asyncio.to_thread(overtaken.pass_through))
            while not passing.done():
                with suppress(asyncio.CancelledError):  # deaf: a fenced worker tells it to stop
                    await asyncio.shield(passing)
            try:
                await run.afinish(session, run.number)
                await session.commit()
            except LeaseLost as error:
                await session.rollback()
                overtaken.refused(error)
        await stricter.dispose()
        return 0

    with queue.worker("default", **POLLING) as worker:
        job = slow.enqueue()
        overtaken.play(queue, job, worker.id)
        assert job.wait(SOON) == 2

    assert [(error.job_id, error.run) for error in overtaken.errors] == [(job.id, 1)]
    assert outcomes(engine, job.id) == ["crashed", "succeeded"]
    assert effects(engine, "slow") == [2]


@pytest.mark.parametrize("level", LEVELS)
def test_writes_in_the_finishing_transaction_happen_once(migrated_url, engine, overtaken, level):
    queue = Queue(create_engine(migrated_url, isolation_level=level))

    @queue.task(name="slow", transactional=True)
    def slow(session: Session) -> int:
        session.execute(NOTE, of_run("slow"))
        if current_run().number == 1:
            event.listen(session, "after_rollback", lambda _: overtaken.has_lost.set())
        overtaken.pass_through()
        return current_run().number

    with queue.worker("default", **POLLING) as worker:
        job = slow.enqueue()
        overtaken.play(queue, job, worker.id)
        assert job.wait(SOON) == 2

    assert outcomes(engine, job.id) == ["crashed", "succeeded"]
    assert effects(engine, "slow") == [2]
    queue.engine.dispose()


def test_a_process_is_refused_for_a_transactional_task_when_it_is_declared(queue):
    with pytest.raises(ValueError, match="a process cannot share a transaction"):

        @queue.task(name="apart", transactional=True, executor="process")
        def apart(session: Session) -> None: ...

    @queue.task(name="together", transactional=True)
    def together(session: Session) -> None: ...

    with pytest.raises(ValueError, match="a process cannot share a transaction"):
        together.using(executor="process")
