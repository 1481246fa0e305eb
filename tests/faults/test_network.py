"""Bars R22 to R24: replies that never arrive, and a network that swallows everything."""

import asyncio
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from time import monotonic
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from sqlqueue import Queue, Retry, Unique, current_run
from sqlqueue.literal import new_id
from tests.faults.proxy import Proxy
from tests.harness import (
    CLOCKS,
    POLLING,
    SOON,
    TTL,
    effects,
    members,
    outcomes,
    rows,
    tree,
    value,
    wait_until,
    workers,
)

pytestmark = pytest.mark.alone

BEAT = TTL.total_seconds() / 6
NOTE = text("insert into effect (key, run) values ('paid', :run)")


@pytest.fixture
def proxy(migrated_url: str, tables: None) -> Iterator[Proxy]:
    """A proxy to the empty database."""
    with Proxy(migrated_url) as proxy:
        yield proxy


@pytest.fixture
def far(proxy: Proxy) -> Iterator[Queue]:
    """A queue whose connections lead through the proxy, and send each statement as text."""
    queue = Queue(create_engine(proxy.url, connect_args={"prepare_threshold": None}))
    yield queue
    proxy.heal()
    queue.engine.dispose()


# R22


def in_the_callers_transaction(queue: Queue, job_id: UUID) -> None:
    """Enqueue, and again with the same id, until the commit is acknowledged."""
    while True:
        try:
            with queue.engine.begin() as conn:
                queue.using(conn, id=job_id).send("mail")
            return
        except OperationalError:
            continue


def in_one_of_its_own(queue: Queue, job_id: UUID) -> None:
    assert queue.using(id=job_id).send("mail").id == job_id


def in_one_of_its_own_with_a_unique_key(queue: Queue, job_id: UUID) -> None:
    own = queue.using(id=job_id, unique=Unique(on_conflict="raise"))
    assert own.send("mail", str(job_id)).id == job_id


@pytest.mark.parametrize(
    ("enqueue", "times"),
    [
        (in_the_callers_transaction, 120),
        (in_one_of_its_own, 70),
        (in_one_of_its_own_with_a_unique_key, 20),
    ],
)
def test_r22_an_enqueue_whose_reply_was_lost_is_repeated_and_makes_one_job(
    far, proxy, engine, enqueue: Callable[[Queue, UUID], None], times: int
) -> None:
    seed, ids = 22, [UUID(new_id()) for _ in range(times)]
    dice = random.Random(seed)
    for job_id in ids:
        proxy.swallow_commits(dice.choice((1, 1, 2)), lambda sent: b"mail" in sent)
        enqueue(far, job_id)

    print(f"seed {seed}: {len(ids)} jobs, {proxy.swallowed} replies lost")
    assert proxy.swallowed >= times, "inconclusive: few replies were lost"
    found = [row[0] for row in rows(engine, "select id from sqlqueue.job")]
    assert sorted(found) == sorted(ids)
    assert value(engine, "select count(*) from sqlqueue.ready") == len(ids)


# R23


@pytest.fixture
def claims_are_lost(proxy: Proxy, engine: Engine) -> Callable[[], None]:
    """A function after which the reply to the next commit of a claim that found jobs is lost."""

    def found_jobs(sent: bytes) -> bool:
        leases = "select count(*) from sqlqueue.lease"
        return b"into sqlqueue.lease" in sent and value(engine, leases) > 0

    return lambda: proxy.swallow_commits(1, found_jobs)


def test_r23_jobs_whose_claim_got_no_reply_are_back_within_two_beats(
    queue, far, proxy, engine, claims_are_lost
) -> None:
    @far.task(name="lost")
    def lost() -> int:
        return current_run().number

    with far.worker("default", **POLLING, slots=3) as worker:
        for _ in range(3):
            claims_are_lost()
            jobs = [queue.send("lost") for _ in range(3)]
            ran = [job.wait(SOON) for job in jobs]
            assert 2 in ran
        assert not worker.error

    sql = "select max(extract(epoch from ended_at - started_at)) from sqlqueue.run where run = 1"
    back = float(value(engine, sql + " and outcome = 'returned'"))
    print(f"{proxy.swallowed} replies to claims lost; the jobs were back after {back:.2f} s")
    assert proxy.swallowed == 3, "inconclusive: no reply was lost"
    assert back < 2 * BEAT + 0.4
    assert value(engine, "select max(attempt) from sqlqueue.run") == 1


def test_r23_a_run_whose_finish_got_no_reply_is_not_repeated(queue, far, proxy, engine) -> None:
    """Whatever its outcome, and whoever commits it; its slot is free again."""
    runs: list[str] = []
    at_once = Retry(attempts=2, waits=[timedelta(0)])

    @far.task(name="plain")
    def plain() -> None:
        runs.append("plain")

    @far.task(name="transactional", transactional=True, retry=at_once)
    def in_a_transaction(session: Session) -> None:
        runs.append("transactional")
        session.execute(NOTE, {"run": current_run().number})

    @far.task(name="by-itself", retry=at_once)
    def by_itself() -> None:
        runs.append("by-itself")
        with Session(far.engine) as session, session.begin():
            current_run().finish(session)

    @far.task(name="failing-once", retry=at_once)
    def failing_once() -> None:
        runs.append("failing-once")
        if current_run().number == 1:
            raise ValueError

    tasks = {plain: 1, in_a_transaction: 1, by_itself: 1, failing_once: 2}
    with far.worker("default", **POLLING, slots=1) as worker:
        for task, times in tasks.items():
            proxy.swallow_commits(1, lambda sent: b"into sqlqueue.run" in sent)
            job = queue.send(task.name)
            job.wait(SOON)
            queue.send("plain").wait(SOON)  # there is a slot for it
            wait_until(lambda: not worker.runs.held, what="the end of all runs")
            assert runs == [task.name] * times + ["plain"]
            assert outcomes(engine, job.id) == ["failed", "succeeded"][-times:]
            runs.clear()

    print(f"{proxy.swallowed} replies to finishes lost")
    assert proxy.swallowed == len(tasks), "inconclusive: no reply was lost"
    assert effects(engine, "paid") == [1]


def test_r23_a_finish_rolled_back_by_its_task_is_a_failure_and_the_job_is_not_lost(
    queue, engine, tables
) -> None:
    @queue.task(name="undecided", retry=Retry(attempts=2, waits=[timedelta(0)]))
    def undecided() -> None:
        with Session(engine) as session, session.begin():
            savepoint = session.begin_nested()
            session.execute(NOTE, {"run": current_run().number})
            current_run().finish(session)
            if current_run().number == 1:
                savepoint.rollback()

    with queue.worker("default", **POLLING):
        job = undecided.enqueue()
        job.wait(SOON)

    assert outcomes(engine, job.id) == ["failed", "succeeded"]
    assert effects(engine, "paid") == [2]


# R24


class Split:
    """Tasks of two queues, near and far, which are in the same database."""

    def __init__(self, near: Queue, far: Queue) -> None:
        self.has_begun, self.may_end = threading.Event(), threading.Event()
        self.told_at = 0.0  # when a coroutine far away was told to stop
        for queue in (near, far):
            self._define(queue, queue is far)

    def _define(self, queue: Queue, is_far: bool) -> None:
        @queue.task(name="pay", transactional=True, retry=Retry(attempts=100))
        def pay(session: Session) -> None:
            session.execute(NOTE, {"run": current_run().number})
            if is_far:
                self.has_begun.set()
                assert self.may_end.wait(120)

        @queue.task(name="idle")
        async def idle() -> None:
            try:
                while is_far and not self.told_at:
                    await asyncio.sleep(3600)
            finally:
                self.told_at = self.told_at or monotonic()


@pytest.mark.parametrize(
    ("seconds", "clocks"),
    [
        pytest.param(5, CLOCKS, id="short"),
        pytest.param(60, {}, id="default clocks", marks=pytest.mark.nightly),
    ],
)
@pytest.mark.timeout(180)
def test_r24_a_black_holed_worker_stops_its_jobs_and_later_goes_on(
    queue, far, proxy, engine, seconds: float, clocks: dict[str, Any]
) -> None:
    """Its jobs run elsewhere meanwhile, and nothing is written twice."""
    split = Split(queue, far)
    with far.worker("default", **clocks) as worker:
        ttl, first = worker.options.ttl.total_seconds(), worker.id
        jobs = [queue.send("pay"), queue.send("idle")]
        assert split.has_begun.wait(10)
        wait_until(lambda: value(engine, "select count(*) from sqlqueue.lease") == 2)
        proxy.black_hole()
        began = monotonic()
        with queue.worker("default", **clocks):
            for job in jobs:
                job.wait(timedelta(seconds=2 * ttl + 10))
            elsewhere = monotonic() - began
        split.may_end.set()
        threading.Event().wait(began + seconds - monotonic())
        stopped = split.told_at - began
        assert outcomes(engine, jobs[1].id) == ["crashed", "succeeded"]

        proxy.heal()
        later, healed = queue.send("idle"), monotonic()
        later.wait(timedelta(seconds=20))
        back = monotonic() - healed
        assert worker.id != first
        open_ = "select count(*) from pg_stat_activity where state = 'idle in transaction'"
        wait_until(lambda: value(engine, open_) == 0, what="the end of its old transaction")

    times = f"{stopped:.2f} s, ran elsewhere after {elsewhere:.2f} s, back after {back:.2f} s"
    print(f"black-holed for {seconds} s with a ttl of {ttl:.0f} s: stopped after {times}")
    assert 0 < stopped < ttl * 2 / 3 + 1
    assert elsewhere < ttl + 5
    assert outcomes(engine, jobs[0].id) == ["crashed", "succeeded"]
    assert effects(engine, "paid") == [2]


def another(engine: Engine) -> int:
    """Kill the only worker process of a tree; return the one that takes its place."""
    (number, pid), *_ = wait_until(lambda: workers(engine).items(), within=20)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: workers(engine).keys() - {number}, within=20, what="another worker")
    return workers(engine)[max(workers(engine))]


def test_r24_a_black_holed_supervisor_still_replaces_a_worker_that_dies(engine, proxy) -> None:
    url = make_url(proxy.url).update_query_dict({"connect_timeout": "2"})
    with tree(url.render_as_string(hide_password=False)) as parent:
        first = another(engine)  # and so the supervisor is connected
        proxy.black_hole()
        threading.Event().wait(4 * BEAT)  # it beats for a child that is silent, in vain
        before = set(members(parent))
        os.kill(first, signal.SIGKILL)
        began = monotonic()
        wait_until(lambda: set(members(parent)) - before, within=20, what="another process")
        took = monotonic() - began
        (second,) = set(members(parent)) - before
        proxy.heal()
        wait_until(lambda: second in workers(engine).values(), within=20, what="its registration")

    print(f"black-holed, a worker process that died was replaced after {took:.2f} s")
    assert took < TTL.total_seconds() + 5
