"""Where tasks run: time limits, children that are killed and replaced, neighbours left alone."""

import asyncio
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import timedelta
from time import monotonic
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Engine

from sqlqueue import Ended, Job, Retry, Run, current_run
from sqlqueue.runs import Runs
from tests.harness import (
    CLOCKS,
    POLLING,
    SOON,
    TTL,
    application_table,
    is_alive,
    load_app,
    outcomes,
    value,
    wait_until,
)

pytestmark = pytest.mark.alone

ONCE = Retry(attempts=1)
PATIENCE = TTL.total_seconds() / 6  # of a worker with a run that goes on after its end
LIMIT = timedelta(seconds=0.3)


@pytest.fixture
def app(engine: Engine, migrated_url: str) -> Iterator[ModuleType]:
    """The application of the tests, whose tasks child processes can import."""
    application_table(engine)
    loaded = load_app(migrated_url)
    yield loaded
    loaded.queue.engine.dispose()


def ended(job: Job[Any]) -> Job[Any]:
    wait_until(lambda: job.refresh().has_ended, within=20, what=f"the end of {job}")
    return job


# One run after another on the loop

WORD: ContextVar[str] = ContextVar("word")


def test_a_coroutine_finds_nothing_that_another_left_behind(queue):
    visited: set[Any] = set()

    @queue.task(name="leave")
    async def leave(waits: bool, sets: bool) -> list[str]:
        found = [WORD.get("nothing")]
        task = asyncio.current_task()
        if task in visited:
            found.append("a task that waited")
        if sets:
            WORD.set("mine")
        if waits:
            await asyncio.sleep(0)
            visited.add(task)
        return found

    kinds = [(True, False), (False, True), (False, False)]
    jobs = [leave.enqueue(*kind) for kind in kinds * 20]
    with queue.worker("default", slots=2, **POLLING):
        assert [job.wait(SOON) for job in jobs] == [["nothing"]] * len(jobs)


def test_a_coroutine_that_cancels_itself_too_late_cancels_no_other(queue):
    @queue.task(name="cancel_late", retry=ONCE)
    async def cancel_late() -> None:
        asyncio.current_task().cancel()

    @queue.task(name="wait_a_little", retry=ONCE)
    async def wait_a_little() -> str:
        await asyncio.sleep(0)
        return "done"

    jobs = [one.enqueue() for one in [cancel_late, wait_a_little] * 20]
    with queue.worker("default", slots=1, **POLLING):
        assert [job.wait(SOON) for job in jobs] == [None, "done"] * 20


def test_quick_coroutines_let_the_others_on_the_loop_have_their_turns(queue):
    """Thousands that never wait are not run in one go."""
    seen, rounds = [], []

    @queue.task(name="quick")
    async def quick() -> None:
        seen.append(len(seen))

    @queue.task(name="counting")
    async def counting() -> None:
        while len(seen) < 2000:
            rounds.append(len(seen))
            await asyncio.sleep(0)

    job = counting.enqueue()
    queue.enqueue_many(quick.s() for _ in range(2000))
    with queue.worker("default", slots=2, **POLLING):
        job.wait(SOON)

    assert len(set(rounds)) > 2000 / 100


# Time limits


def test_a_coroutine_is_cancelled_when_its_time_is_over(queue, engine):
    told = threading.Event()

    @queue.task(name="slow", timeout=LIMIT, retry=Retry(attempts=2, waits=[timedelta(0)]))
    async def slow() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            told.set()

    with queue.worker("default", **POLLING):
        job = ended(slow.enqueue())

    assert told.is_set()
    assert (job.state, job.error_type) == ("failed", "TimeoutError")
    assert outcomes(engine, job.id) == ["timed_out", "timed_out"]


def test_a_coroutine_is_told_once_to_stop(queue, store):
    """Its clean-up takes longer than a beat, and nothing breaks into it."""
    started, told = threading.Event(), []

    @queue.task(name="tidy")
    async def tidy() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            clean_up = asyncio.create_task(asyncio.sleep(3 * PATIENCE))
            while not clean_up.done():
                try:
                    await asyncio.shield(clean_up)
                except asyncio.CancelledError:
                    told.append("again")
            told.append("done")

    with queue.worker("default", **CLOCKS):
        job = tidy.enqueue()
        assert started.wait(10)
        assert job.cancel()
        wait_until(lambda: "done" in told)
        assert ended(job).state == "cancelled"

    assert told == ["done"]


def test_a_thread_that_hears_of_its_time_ends_as_timed_out(queue, engine):
    @queue.task(name="polite", timeout=LIMIT, retry=ONCE)
    def polite() -> None:
        run = current_run()
        wait_until(lambda: run.is_cancelled)
        raise InterruptedError

    with queue.worker("default", **POLLING):
        job = ended(polite.enqueue())

    assert outcomes(engine, job.id) == ["timed_out"]
    assert "InterruptedError" not in job.error


def test_a_process_job_that_waits_for_a_slot_is_cancelled_without_a_start(app, engine):
    """What was claimed ahead of a slot, and cancelled there, never runs."""
    with app.queue.worker("default", **CLOCKS, slots=1):
        first = app.stubborn.using(timeout=None).enqueue("first")
        wait_until(lambda: value(engine, "select count(*) from effect") == 2)
        second = app.stubborn.using(timeout=None).enqueue("second")
        assert second.cancel()
        ended(second)
        assert first.cancel()
        ended(first)

    assert second.state == "cancelled"
    assert value(engine, "select count(*) from effect where key = 'second'") == 0


# Child processes


def test_a_run_that_ends_just_as_it_is_given_up_leaves_its_slot(queue):
    runs = Runs(queue.worker())
    row = SimpleNamespace(job_id="j", run=1, failures=0, task="t", queue="q")
    run = Run(row, None, queue.store, 0.0, runs.said, started=0.0)
    runs.held[run.key] = run

    class Late(set[Run]):
        def add(self, given: Run) -> None:
            runs.done(given, Ended(*given.key, "succeeded"))  # by the thread that ran it
            super().add(given)

    runs.lingering = Late()
    runs.hand_back()

    assert not runs.lingering
    assert [ended.outcome for _, ended in runs.take_over()] == ["succeeded"]


def test_a_child_process_is_replaced_after_its_runs(app):
    with app.queue.worker("default", **POLLING, slots=1, child_runs=2):
        pids = [app.process_id.enqueue().wait(SOON) for _ in range(4)]

    assert pids[0] == pids[1]
    assert pids[2] == pids[3]
    assert pids[1] != pids[2]
    assert not any(is_alive(pid) for pid in pids)


def test_a_child_process_that_has_grown_is_replaced(app):
    limit = 200 << 20
    with app.queue.worker("default", **POLLING, slots=1, child_bytes=limit):
        small = app.allocate.enqueue(1).wait(SOON)
        large = app.allocate.enqueue(300).wait(SOON)
        after = app.allocate.enqueue(1).wait(SOON)

    assert small == large
    assert after != large


def test_a_child_process_that_has_grown_old_is_replaced(app):
    pids = {}
    for age in (timedelta(hours=1), timedelta(microseconds=1)):
        with app.queue.worker("default", **POLLING, slots=1, child_age=age):
            pids[age] = [app.process_id.enqueue().wait(SOON) for _ in range(2)]

    assert [len(set(two)) for two in pids.values()] == [1, 2]


def test_a_coroutine_runs_in_a_child_process(app):
    with app.queue.worker("default", **POLLING):
        assert app.async_in_process.enqueue().wait(SOON) != os.getpid()


def test_a_process_that_does_not_find_the_task_fails_the_job_and_says_why(app, engine):
    with app.queue.worker("default", **POLLING):
        job = ended(app.known_to_the_worker.enqueue())

    assert (job.state, job.error_type) == ("failed", "TypeError")
    assert "app:hidden is no task" in job.error
    assert outcomes(engine, job.id) == ["failed"]


def test_a_process_is_refused_for_a_function_that_it_cannot_import(queue):
    with pytest.raises(ValueError, match="could not import it"):

        @queue.task(name="hidden", executor="process")
        def hidden() -> None: ...


def test_an_executor_that_cannot_run_the_function_gives_way_to_one_that_can(queue):
    @queue.task(name="sync")
    def in_thread() -> str:
        return threading.current_thread().name

    with queue.worker("default", **POLLING):
        job = queue.using(executor="async").send("sync")
        assert job.wait(SOON) == "sqlqueue task"


# Blocked slots


def test_a_claimed_job_does_not_wait_behind_a_long_one(queue, engine):
    """Jobs claimed ahead of a slot are handed back, and another worker runs them."""
    may_end = threading.Event()

    @queue.task(name="quick")
    def quick() -> None: ...

    @queue.task(name="long")
    def long() -> None:
        assert may_end.wait(20)

    with queue.worker("default", **CLOCKS, slots=1) as busy:
        queue.enqueue_many(quick.s() for _ in range(200))  # it learns that jobs are quick
        wait_until(lambda: value(engine, "select count(*) from sqlqueue.live") == 0)
        queue.enqueue_many([long.s(), *(quick.s() for _ in range(20))])
        sql = "select count(*) from sqlqueue.jobs where task = 'long' and state = 'running'"
        wait_until(lambda: value(engine, sql) == 1)
        with queue.worker("default", **CLOCKS, slots=1):
            began = monotonic()
            sql = "select count(*) from sqlqueue.run where outcome = 'succeeded'"
            wait_until(lambda: value(engine, sql) == 220, within=5, what="the quick jobs")
            print(f"done beside a long job after {monotonic() - began:.2f} s")
        assert value(engine, "select count(*) from sqlqueue.lease") == 1
        may_end.set()

    assert not busy.runs.held
    assert value(engine, "select max(attempt) from sqlqueue.run") == 1


def test_a_thread_that_never_ends_takes_its_slot_and_no_job(queue, engine):
    """A worker without a parent goes on with the slots it has left."""
    may_end = threading.Event()

    @queue.task(name="deaf", timeout=LIMIT, retry=ONCE)
    def deaf() -> None:
        may_end.wait(30)

    @queue.task(name="fine")
    def fine() -> str:
        return "fine"

    stuck = queue.worker("default", **POLLING | {"grace": timedelta(seconds=0.5)}, slots=1)
    with stuck:
        ended(deaf.enqueue())
        job = fine.enqueue()
        with queue.worker("default", **POLLING, slots=1):
            assert job.wait(timedelta(seconds=5)) == "fine"
        may_end.set()
        assert fine.enqueue().wait(SOON) == "fine"  # the slot is free again
