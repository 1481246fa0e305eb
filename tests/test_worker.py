"""What a worker makes of each job: results, retries, ends, order, stopping."""

import asyncio
import logging
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine, text

from sqlqueue import (
    Cancel,
    Job,
    JobFailed,
    JobNotFound,
    NotEnded,
    Queue,
    Retry,
    RetryIn,
    Snooze,
    current_run,
)
from sqlqueue.lanes import Lanes
from tests.harness import CLOCKS, POLLING, SOON, load_app, outcomes, rows, value, wait_until
from tests.test_store import request_cancel

MOMENT = timedelta(milliseconds=20)
MINUTE = timedelta(minutes=1)
ONCE = Retry(attempts=1)


def ended(job: Job[Any]) -> Job[Any]:
    """Wait until the job has ended, one way or another."""
    wait_until(lambda: job.refresh().has_ended, what=f"the end of {job}")
    return job


def run_to_the_end(queue: Queue, *jobs: Job[Any], **options: Any) -> None:
    """Run a worker until the jobs have ended."""
    with queue.worker("default", **POLLING | options):
        for job in jobs:
            ended(job)


SLACK = 0.5  # seconds: a wait counts from the start of the turn, a run ends within it


def last_wait(engine: Engine, job: Job[Any]) -> float:
    """Return the seconds between the end of the last run and when the job runs again."""
    sql = (
        "select extract(epoch from scheduled.due_at - run.ended_at) from sqlqueue.scheduled"
        " join sqlqueue.run using (job_id) where job_id = :id order by run.run desc limit 1"
    )
    return float(wait_until(lambda: value(engine, sql, id=job.id), what="the next run"))


# Results


def test_results_come_back_from_threads_coroutines_and_processes(queue, migrated_url):
    app = load_app(migrated_url)

    @queue.task(name="add")
    def add(a: int, b: int) -> int:
        return a + b

    @queue.task(name="aadd")
    async def aadd(a: int, b: int) -> int:
        await asyncio.sleep(0)
        return a + b

    with queue.worker("default", **CLOCKS), app.queue.worker("processes", **CLOCKS):
        jobs = [add.enqueue(1, 2), aadd.enqueue(3, b=4)]
        apart = app.process_id.using(queue="processes").enqueue()
        assert [job.wait(SOON) for job in jobs] == [3, 7]
        assert apart.wait(SOON) > 0


def test_a_result_is_awaited_without_blocking_the_loop(queue):
    @queue.task(name="answer")
    def answer() -> timedelta:
        return MINUTE

    async def ask() -> timedelta:
        job = await answer.aenqueue()
        waiting = asyncio.create_task(job.await_result(SOON))
        await asyncio.sleep(0)
        assert not waiting.done()
        return await waiting

    with queue.worker("default", **POLLING):
        assert asyncio.run(ask()) == MINUTE


def test_a_result_is_not_stored_with_keep_off(queue, engine):
    @queue.task(name="secret", keep=False)
    def secret() -> str:
        return "not stored"

    job = secret.enqueue()
    run_to_the_end(queue, job)

    assert (job.state, job.result) == ("succeeded", None)
    assert value(engine, "select result from sqlqueue.run") is None


def test_a_result_that_is_no_json_fails_at_once(queue, engine):
    @queue.task(name="object")
    def thing() -> object:
        return object()

    @queue.task(name="nan")
    async def nan() -> float:
        return float("nan")

    jobs = [thing.enqueue(), nan.enqueue()]
    run_to_the_end(queue, *jobs)

    for job in jobs:
        assert (job.state, outcomes(engine, job.id)) == ("failed", ["failed"])
        assert job.error_type == "sqlqueue.errors.NotRepresentable"


def test_a_job_that_never_was_is_not_found(queue):
    with pytest.raises(JobNotFound):
        Job.get(queue, uuid4())


def test_waiting_ends_with_an_error_when_the_time_is_over(queue):
    job = queue.send("nobody")
    with pytest.raises(NotEnded, match="it is ready"):
        job.wait(MOMENT)


def test_a_failed_job_raises_with_the_traceback_of_its_worker(queue):
    @queue.task(name="deep", retry=ONCE)
    def deep() -> None:
        raise ZeroDivisionError("by hand")

    job = deep.enqueue()
    run_to_the_end(queue, job)
    with pytest.raises(JobFailed, match="ZeroDivisionError: by hand") as caught:
        _ = job.result

    assert caught.value.state == "failed"
    assert 'raise ZeroDivisionError("by hand")' in str(caught.value.traceback)


# Failures and retries


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Retry(waits=[MINUTE]), (60, 60)),
        (Retry(waits=[timedelta(0), MINUTE]), (0, 0.1)),
        (Retry(base=MINUTE, limit=MINUTE), (0, 60)),
        (Retry(by_error={LookupError: Retry(waits=[MINUTE])}, waits=[timedelta(0)]), (60, 60)),
        (Retry(by_error={OSError: Retry(waits=[timedelta(0)])}, waits=[MINUTE]), (60, 60)),
        (Retry(decide=lambda error, failures: MINUTE * (failures + len(error.args))), (120, 120)),
    ],
    ids=["fixed", "listed", "jitter", "by class", "other class", "decided"],
)
def test_a_failure_waits_as_its_policy_says(queue, engine, policy, expected):
    @queue.task(name="fail", retry=policy)
    def fail() -> None:
        raise KeyError("no")

    with queue.worker("default", **POLLING):
        job = fail.enqueue()
        if expected[1] < 1:  # the next run is at once, and the one after that in a minute
            wait_until(lambda: len(outcomes(engine, job.id)) == 2)
            assert last_wait(engine, job) == pytest.approx(60, abs=SLACK)
        else:
            assert expected[0] - SLACK <= last_wait(engine, job) <= expected[1] + SLACK


@pytest.mark.parametrize(
    ("policy", "runs"),
    [
        (Retry(attempts=3, waits=[timedelta(0)]), 3),
        (Retry(give_up_on=[LookupError]), 1),
        (Retry(by_error={"KeyError": Retry(attempts=2, waits=[timedelta(0)])}), 2),
        (Retry(decide=lambda error, failures: None if failures == 2 else timedelta(0)), 2),
    ],
    ids=["attempts", "give up", "by class", "decided"],
)
def test_a_job_fails_when_its_policy_gives_up(queue, engine, policy, runs):
    @queue.task(name="fail", retry=policy)
    def fail() -> None:
        raise KeyError("no")

    job = fail.enqueue()
    run_to_the_end(queue, job)

    assert job.state == "failed"
    assert outcomes(engine, job.id) == ["failed"] * runs
    assert (job.attempt, job.run) == (runs, runs)


def broken_decision(_: BaseException, __: int) -> timedelta:
    raise RuntimeError("in decide")


@pytest.mark.parametrize("decide", [broken_decision, lambda _, __: 5, lambda _, __: timedelta.max])
def test_a_policy_that_fails_itself_harms_nobody(queue, engine, decide):
    @queue.task(name="fail", retry=Retry(attempts=2, decide=decide))
    def fail() -> None:
        raise KeyError("no")

    @queue.task(name="fine")
    def fine() -> str:
        return "fine"

    with queue.worker("default", **POLLING):
        job = fail.enqueue()
        wait_until(lambda: outcomes(engine, job.id), what="the end of the run")
        assert fine.enqueue().wait(SOON) == "fine"

    assert outcomes(engine, job.id)[0] == "failed"


def test_a_policy_that_cannot_be_read_harms_nobody(queue, engine):
    @queue.task(name="fail")
    def fail() -> None:
        raise KeyError("no")

    @queue.task(name="fine")
    def fine() -> str:
        return "fine"

    sql = """select sqlqueue.enqueue('fail', retry => '{"waits": "soon"}')"""
    job_id = value(engine, sql)
    with queue.worker("default", **POLLING):
        wait_until(lambda: outcomes(engine, job_id), what="the end of the run")
        assert fine.enqueue().wait(SOON) == "fine"

    assert outcomes(engine, job_id)[0] == "failed"


def test_a_task_chooses_its_next_run_by_retry_in(queue, engine):
    @queue.task(name="later", retry=Retry(attempts=2))
    def later() -> None:
        raise RetryIn(timedelta(0) if current_run().attempt == 2 else MINUTE)

    with queue.worker("default", **POLLING):
        job = later.enqueue()
        assert last_wait(engine, job) == pytest.approx(60, abs=SLACK)
        rows(engine, "update sqlqueue.scheduled set due_at = now()")
        ended(job)

    assert (job.state, job.attempt) == ("failed", 2)


def test_a_snooze_uses_no_attempt(queue, engine):
    @queue.task(name="sleepy", retry=ONCE)
    def sleepy() -> int:
        if current_run().number < 4:
            raise Snooze(MOMENT)
        return current_run().attempt

    job = sleepy.enqueue()
    run_to_the_end(queue, job)

    assert job.result == 1
    assert outcomes(engine, job.id) == ["snoozed", "snoozed", "snoozed", "succeeded"]


def test_a_task_ends_its_job_as_cancelled(queue, engine):
    @queue.task(name="never_mind")
    def never_mind() -> None:
        raise Cancel("the order is gone")

    job = never_mind.enqueue()
    run_to_the_end(queue, job)

    assert (job.state, job.error) == ("cancelled", "the order is gone")
    with pytest.raises(JobFailed, match="the order is gone"):
        _ = job.result


def test_a_message_that_postgres_cannot_store_is_recorded_with_replacements(queue):
    @queue.task(name="odd", retry=ONCE)
    def odd() -> None:
        raise ValueError("a\0b\ud800c")

    job = odd.enqueue()
    run_to_the_end(queue, job)

    assert (job.state, job.error) == ("failed", "a\N{REPLACEMENT CHARACTER}b?c")


def test_an_exception_without_a_text_is_recorded(queue):
    class Speechless(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    @queue.task(name="sync", retry=ONCE)
    def in_thread() -> None:
        raise Speechless

    @queue.task(name="async", retry=ONCE)
    async def on_loop() -> None:
        raise Speechless

    jobs = [in_thread.enqueue(), on_loop.enqueue()]
    run_to_the_end(queue, *jobs)

    assert [job.state for job in jobs] == ["failed", "failed"]
    assert "Speechless" in jobs[0].error_type


def test_system_exit_in_a_task_is_its_failure(queue):
    @queue.task(name="leave", retry=ONCE)
    def leave() -> None:
        raise SystemExit(3)

    job = leave.enqueue()
    run_to_the_end(queue, job)

    assert (job.state, job.error_type) == ("failed", "SystemExit")


def test_an_operator_retries_a_failed_job_with_all_its_attempts(queue, engine):
    is_fixed = threading.Event()

    @queue.task(name="repaired", retry=Retry(attempts=2, waits=[timedelta(0)]))
    def repaired() -> int:
        if not is_fixed.is_set():
            raise KeyError("broken")
        return current_run().attempt

    with queue.worker("default", **POLLING):
        job = ended(repaired.enqueue())
        assert job.state == "failed"
        is_fixed.set()
        assert job.retry()
        assert job.wait(SOON) == 1
        assert not job.retry()  # it succeeded

    assert outcomes(engine, job.id) == ["failed", "failed", "succeeded"]


# Jobs that cannot run


def test_an_unknown_task_waits_for_a_worker_that_knows_it(queue, engine):
    job = queue.using(retry=ONCE).send("deployed_later")
    with queue.worker("default", **POLLING):
        wait_until(lambda: outcomes(engine, job.id), what="the first look")
        assert job.refresh().state == "scheduled"
    sql = "select distinct error_type from sqlqueue.run where outcome = 'snoozed'"
    assert value(engine, sql) == "unknown_task"

    @queue.task(name="deployed_later")
    def deployed_later() -> int:
        return current_run().attempt

    rows(engine, "update sqlqueue.scheduled set due_at = now()")
    run_to_the_end(queue, job)
    assert job.result == 1


def test_an_unknown_task_ends_after_an_hour(queue, engine):
    job = queue.send("misspelt")
    with queue.worker("default", **POLLING):
        wait_until(lambda: outcomes(engine, job.id), what="the first look")
        # An hour passes.
        rows(engine, "update sqlqueue.run set ended_at = ended_at - interval '61 minutes'")
        rows(engine, "update sqlqueue.scheduled set due_at = now()")
        ended(job)

    assert (job.state, job.error_type) == ("failed", "unknown_task")
    assert "misspelt" in job.error


@pytest.mark.parametrize("args", ['{"n": "no number"}', '{"m": 1}', '{"*": [1, 2, 3]}'])
def test_stored_arguments_that_do_not_fit_end_the_job_at_once(queue, engine, args):
    @queue.task(name="count")
    def count(n: int) -> None: ...

    job_id = value(engine, "select sqlqueue.enqueue('count', cast(:args as jsonb))", args=args)
    job = Job.get(queue, job_id)
    run_to_the_end(queue, job)

    assert (job.state, outcomes(engine, job.id)) == ("failed", ["failed"])
    assert job.error_type in (
        "sqlqueue.errors.BadArguments",
        "sqlqueue.errors.NotRepresentable",
    )
    assert "no number" not in job.error


def test_a_job_that_was_not_started_in_time_expires(queue, engine):
    ran = threading.Event()

    @queue.task(name="news")
    def news() -> None:
        ran.set()

    job = news.using(expires=MINUTE).enqueue()
    other = news.using(expires=timedelta(hours=1)).enqueue()
    past = "update sqlqueue.job set expires_at = expires_at - interval '2 minutes'"
    rows(engine, past + " where id = :id", id=job.id)
    run_to_the_end(queue, job)
    assert job.state == "expired"
    assert not ran.is_set() or ended(other)
    with pytest.raises(JobFailed, match="expired"):
        _ = job.result


# Cancelling


def test_a_job_that_is_ready_or_scheduled_is_cancelled_at_once(queue, engine):
    ready = queue.send("never")
    scheduled = queue.using(delay=MINUTE).send("never")

    for job in (ready, scheduled):
        assert job.cancel("no longer wanted")
        assert (job.refresh().state, job.error) == ("cancelled", "no longer wanted")
        assert not job.has_ended or job.cancel("again") is True

    assert value(engine, "select count(*) from sqlqueue.ready") == 0


def test_a_running_coroutine_is_cancelled(queue):
    started, cleaned_up = threading.Event(), threading.Event()

    @queue.task(name="patient")
    async def patient() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cleaned_up.set()
            raise

    with queue.worker("default", **CLOCKS):
        job = patient.enqueue()
        assert started.wait(10)
        assert job.cancel()
        ended(job)

    assert job.state == "cancelled"
    assert cleaned_up.is_set()


def test_jobs_are_cancelled_and_retried_in_sql(queue, engine):
    jobs = [queue.send("nobody", n) for n in range(3)]
    cancel = "select sqlqueue.cancel(id, 'not wanted') from sqlqueue.live where task = 'nobody'"

    assert rows(engine, cancel) == [(True,)] * 3
    assert {job.refresh().state for job in jobs} == {"cancelled"}
    assert rows(engine, f"select sqlqueue.cancel('{jobs[0].id}')") == [(False,)]
    retry = "select sqlqueue.retry(id) from sqlqueue.jobs where error = 'not wanted'"
    assert rows(engine, retry) == [(True,)] * 3
    assert {job.refresh().state for job in jobs} == {"ready"}


def test_a_running_coroutine_is_cancelled_in_sql(queue, engine):
    has_begun = threading.Event()

    @queue.task
    async def wait() -> None:
        has_begun.set()
        await asyncio.Event().wait()

    job = wait.enqueue()
    with queue.worker():
        assert has_begun.wait(10)
        assert rows(engine, f"select sqlqueue.cancel('{job.id}')") == [(True,)]
        wait_until(lambda: job.refresh().state == "cancelled")


def test_a_running_thread_sees_that_it_is_cancelled(queue):
    started = threading.Event()

    @queue.task(name="polite")
    def polite() -> None:
        run = current_run()
        started.set()
        wait_until(lambda: run.is_cancelled)
        raise InterruptedError

    with queue.worker("default", **CLOCKS):
        job = polite.enqueue()
        assert started.wait(10)
        assert job.cancel()
        ended(job)

    assert job.state == "cancelled"


def test_a_job_that_succeeds_before_it_hears_of_its_cancel_has_succeeded(queue):
    started, may_end = threading.Event(), threading.Event()

    @queue.task(name="quick")
    def quick() -> str:
        started.set()
        assert may_end.wait(10)
        return "done"

    with queue.worker("default", **CLOCKS):
        job = quick.enqueue()
        assert started.wait(10)
        assert job.cancel()
        may_end.set()
        assert job.wait(SOON) == "done"


def test_a_cancel_request_is_found_by_a_beat_when_its_notification_is_lost(queue, engine, store):
    started = threading.Event()

    @queue.task(name="patient")
    async def patient() -> None:
        started.set()
        await asyncio.Event().wait()

    with queue.worker("default", **CLOCKS):
        job = patient.enqueue()
        assert started.wait(10)
        with queue.autocommit() as conn:
            request_cancel(conn, str(job.id), "quietly")
        wait_until(lambda: job.refresh().has_ended, within=2)  # beats are 0.5 s apart

    assert job.state == "cancelled"


def test_a_job_asked_to_be_cancelled_is_not_retried(queue, engine):
    started, may_fail = threading.Event(), threading.Event()

    @queue.task(name="failing", retry=Retry(waits=[timedelta(0)]))
    def failing() -> None:
        started.set()
        assert may_fail.wait(10)
        raise KeyError("no")

    with queue.worker("default", **CLOCKS):
        job = failing.enqueue()
        assert started.wait(10)
        assert job.cancel()
        may_fail.set()
        ended(job)

    assert (job.state, job.run) == ("cancelled", 1)


# What a task is told


def test_a_task_is_given_its_fence(queue):
    tokens: list[str] = []

    @queue.task(name="tell", retry=Retry(attempts=2, waits=[timedelta(0)]))
    def tell() -> dict[str, Any]:
        run = current_run()
        tokens.append(run.fencing_token)
        if run.number == 1:
            raise KeyError("once")
        assert run.deadline is not None
        assert timedelta(seconds=50) < run.deadline - datetime.now(UTC) <= MINUTE
        return {
            "job_id": str(run.job_id),
            "number": run.number,
            "attempt": run.attempt,
            "task": run.task,
            "queue": run.queue,
            "headers": run.headers,
            "is_cancelled": run.is_cancelled,
        }

    with queue.worker("default", **POLLING):
        job = tell.using(headers={"trace": "abc"}, timeout=MINUTE).enqueue()
        told = job.wait(SOON)

    assert told == {
        "job_id": str(job.id),
        "number": 2,
        "attempt": 2,
        "task": "tell",
        "queue": "default",
        "headers": {"trace": "abc"},
        "is_cancelled": False,
    }
    assert tokens == [f"{job.id}:1", f"{job.id}:2"]
    with pytest.raises(LookupError):
        current_run()


# Order, queues, time


def recorder(queue: Queue, name: str = "record") -> tuple[Any, list[Any]]:
    """Register a task that writes down its argument; return both."""
    seen: list[Any] = []

    @queue.task(name=name)
    def record(item: Any) -> None:
        seen.append(item)

    return record, seen


def test_jobs_of_a_lane_run_in_order_and_urgent_lanes_first(queue):
    record, seen = recorder(queue)
    for number in range(3):
        record.using(priority=5).enqueue(f"late {number}")
        record.enqueue(f"plain {number}")
        record.using(priority=-5).enqueue(f"urgent {number}")

    with queue.worker("default", **POLLING, slots=1, drain=True) as worker:
        assert worker.join(10)

    assert seen == [f"{lane} {n}" for lane in ("urgent", "plain", "late") for n in range(3)]


def test_queues_without_weights_are_served_in_the_order_given(queue):
    record, seen = recorder(queue)
    for number in range(3):
        for name in ("a", "b", "c"):
            record.using(queue=name).enqueue(f"{name}{number}")

    with queue.worker("b", "a", **POLLING, slots=1, drain=True) as worker:
        assert worker.join(10)

    assert seen == ["b0", "b1", "b2", "a0", "a1", "a2"]


def test_weights_share_the_turns(queue):
    lanes = Lanes.of(["mail:3", "report"])
    draws = 20_000
    first = Counter(lanes.draw()[0] for _ in range(draws))
    # Three of four draws; the standard deviation of the share is 0.003.
    assert first["mail"] / draws == pytest.approx(0.75, abs=0.02)


def test_a_weighted_worker_serves_all_its_queues(queue):
    record, seen = recorder(queue)
    for _ in range(20):
        record.using(queue="mail").enqueue("mail")
        record.using(queue="report").enqueue("report")

    with queue.worker("mail:3", "report:1", **POLLING, slots=1, drain=True) as worker:
        assert worker.join(10)

    assert Counter(seen) == {"mail": 20, "report": 20}


def test_a_worker_without_names_serves_the_queues_of_its_tasks(queue):
    record, seen = recorder(queue)

    @queue.task(name="post", queue="mail")
    def post() -> None:
        seen.append("posted")

    record.enqueue("recorded")
    post.enqueue()
    with queue.worker(**POLLING, drain=True) as worker:
        assert worker.join(10)

    assert sorted(seen) == ["posted", "recorded"]


@pytest.mark.direct
@pytest.mark.parametrize("delay", [0.3, 1.4])
def test_a_delayed_job_starts_on_time_on_an_idle_worker(queue, engine, delay):
    record, _ = recorder(queue)
    sql = "select extract(epoch from started_at - due_at) from sqlqueue.run where job_id = :id"

    with queue.worker("default", **CLOCKS | {"poll": timedelta(seconds=5)}):
        wait_until(lambda: value(engine, "select count(*) from sqlqueue.doorbell"))
        late = []
        for _ in range(2):
            job = record.using(delay=timedelta(seconds=delay)).enqueue(1)
            job.wait(SOON)
            late.append(float(value(engine, sql, id=job.id)))

    print(f"started after it was due: {[f'{one * 1000:.0f} ms' for one in late]}")
    assert min(late) >= 0
    assert max(late) < 0.2  # 0.05 on a machine with nothing else to do


def test_a_paused_queue_waits_until_it_is_resumed(queue, engine):
    record, seen = recorder(queue)
    queue.pause("default", by="test", why="to see")

    with queue.worker("default", **POLLING) as worker:
        job = record.enqueue(1)
        other = record.using(queue="default", priority=1).enqueue(2)
        turns = worker.progress
        wait_until(lambda: worker.progress > turns + 0.5, what="some turns")
        assert seen == []
        assert (job.refresh().state, other.refresh().state) == ("ready", "ready")
        queue.resume("default")
        ended(job)
        ended(other)


def test_a_pause_ends_by_itself(queue):
    record, _ = recorder(queue)
    queue.pause("default", lasts=timedelta(seconds=0.5))

    with queue.worker("default", **POLLING):
        job = ended(record.enqueue(1))

    assert job.started_at - job.created_at > timedelta(seconds=0.3)


def test_a_worker_stops_after_max_jobs(queue, engine):
    record, seen = recorder(queue)
    for number in range(9):
        record.enqueue(number)

    with queue.worker("default", **POLLING, max_jobs=5) as worker:
        assert worker.join(10)

    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert value(engine, "select count(*) from sqlqueue.ready") == 4


def test_a_draining_worker_stops_when_all_has_run(queue, engine):
    record, seen = recorder(queue)
    queue.enqueue_many(record.s(number) for number in range(1500))

    with queue.worker("default", **POLLING, drain=True) as worker:
        assert worker.join(20)

    assert sorted(seen) == list(range(1500))
    assert value(engine, "select count(*) from sqlqueue.worker where died_at is null") == 0


# Stopping


def test_a_stopping_worker_hands_back_the_rest(queue, engine):
    """What ends within the grace period runs once; the rest uses no attempt."""
    started, may_end, forever = threading.Semaphore(0), threading.Event(), threading.Event()

    @queue.task(name="short", retry=ONCE)
    def short() -> None:
        started.release()
        assert may_end.wait(10)

    @queue.task(name="long", retry=ONCE)
    def long() -> int:
        if current_run().number == 1:
            started.release()
            forever.wait(10)
        return current_run().attempt

    with queue.worker("default", **POLLING | {"grace": timedelta(seconds=1)}, slots=2) as worker:
        done, rest = short.enqueue(), long.enqueue()
        assert started.acquire(timeout=10)
        assert started.acquire(timeout=10)
        waiting = short.enqueue()
        worker.stop()
        may_end.set()
        assert worker.join(10)

    assert outcomes(engine, done.id) == ["succeeded"]
    assert outcomes(engine, rest.id) == ["returned"]
    assert outcomes(engine, waiting.id) in ([], ["returned"])
    assert (rest.refresh().state, waiting.refresh().state) == ("ready", "ready")
    assert value(engine, "select count(*) from sqlqueue.worker where died_at is null") == 0

    run_to_the_end(queue, rest, waiting)
    assert rest.result == 1
    assert waiting.state == "succeeded"
    forever.set()


def test_a_second_stop_hands_back_at_once(queue, engine):
    started = threading.Event()

    @queue.task(name="patient", retry=ONCE)
    async def patient() -> None:
        started.set()
        await asyncio.Event().wait()

    with queue.worker("default", **POLLING | {"grace": MINUTE}) as worker:
        job = patient.enqueue()
        assert started.wait(10)
        worker.stop()
        assert not worker.join(0.3)
        worker.stop()
        assert worker.join(1.5)

    assert outcomes(engine, job.id) == ["returned"]
    assert job.refresh().state == "ready"


@pytest.mark.direct
def test_a_stopped_worker_leaves_no_connection_and_no_bell(migrated_url, engine):
    sql = "select count(*) from pg_stat_activity where datname = current_database()"
    queue = Queue(migrated_url)

    @queue.task(name="both", transactional=True)
    async def both(session: Any) -> None:
        await session.execute(text("select 1"))

    before = value(engine, sql)
    with queue.worker("default", **CLOCKS):
        ended(both.enqueue())
        wait_until(lambda: value(engine, "select count(*) from sqlqueue.doorbell"))
    queue.engine.dispose()

    wait_until(lambda: value(engine, sql) <= before, within=2, what="the end of its connections")


def test_no_argument_is_in_any_log_line(queue, caplog):
    caplog.set_level(logging.DEBUG)

    @queue.task(name="secretive", retry=ONCE)
    def secretive(password: str) -> str:
        if password == "swordfish-1":
            raise ValueError("refused")
        return password

    jobs = [secretive.enqueue(f"swordfish-{number}") for number in range(2)]
    run_to_the_end(queue, *jobs)

    assert "swordfish" not in caplog.text
    assert f"job {jobs[1].id}: run 1 failed" in caplog.text
