"""Limits, rates, shares and order: what waits, and when it is admitted."""

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Connection, text

from sqlqueue import Policy, Queue, QueueFull, Rate, Retry
from sqlqueue.literal import new_id
from sqlqueue.options import Options
from sqlqueue.store import Ended, Lane, Store
from tests.harness import POLLING, rows, value
from tests.test_store import hire

LANE = Lane("mail", 0)
SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)


class Desk:
    """One transaction, in which jobs are enqueued, admitted, claimed and ended."""

    def __init__(self, conn: Connection, store: Store) -> None:
        self.conn = conn
        self.store = store
        self.worker = hire(conn, store, timedelta(hours=1))

    def rule(self, policy: Policy | None, scope: str = "queue", name: str = "mail") -> None:
        self.store.set_policy(self.conn, scope, name, policy and policy.to_json())

    def add(self, key: str | None = None, count: int = 1, task: str = "t", **options: Any) -> None:
        params = Options(**{"queue": "mail", "key": key} | options).params
        ids = [new_id() for _ in range(count)]
        self.store.enqueue(self.conn, ids, ["{}"] * count, task, params)

    def admit(self, room: int = 100) -> list[Any]:
        return self.store.admit(self.conn, "mail", room)

    def start(self, room: int = 100) -> list[str]:
        """Admit and claim; return the keys of the jobs, in order."""
        self.admit(room)
        self.rows = list(self.store.claim(self.conn, LANE, 0, room, self.worker))
        keys = dict(self.conn.execute(text("select cast(id as text), key from sqlqueue.job")).all())
        return [keys[row.job_id] for row in self.rows]

    def end(self, *rows: Any, outcome: str = "succeeded", wait: timedelta | None = None) -> None:
        ended = [Ended(row.job_id, row.run, outcome, wait) for row in rows]
        assert self.store.finish(self.conn, ended) == {row.job_id for row in rows}

    def count(self, table: str) -> int:
        found = self.conn.execute(text(f"select count(*) from sqlqueue.{table}"))
        return int(found.scalar_one())

    def pass_time(self, time: timedelta) -> None:
        change = "update sqlqueue.bucket set empty_until = empty_until - :time"
        self.conn.execute(text(change), {"time": time})


@pytest.fixture
def desk(conn: Connection, store: Store) -> Desk:
    return Desk(conn, store)


# Concurrency


def test_a_queue_runs_no_more_jobs_at_a_time_than_its_limit(desk) -> None:
    desk.rule(Policy(concurrency=3))
    desk.add(count=10)

    assert (desk.count("ready"), desk.count("waiting")) == (0, 10)
    assert len(desk.start()) == 3
    first = desk.rows
    assert desk.start() == []

    desk.end(first[0])
    assert len(desk.start()) == 1
    assert (desk.count("lease"), desk.count("admitted"), desk.count("waiting")) == (3, 3, 6)


def test_a_limit_per_key_leaves_room_for_other_keys(desk) -> None:
    desk.rule(Policy(concurrency=4, concurrency_per_key=1))
    desk.add("a", 5)
    desk.add("b", 5)

    assert desk.start() == ["a", "b"]
    desk.end(desk.rows[0])
    assert desk.start() == ["a"]


def test_a_task_has_one_limit_in_all_queues(desk) -> None:
    desk.rule(Policy(concurrency=2), "task", "scarce")
    desk.add(count=3, task="scarce")
    desk.add(count=3, task="scarce", queue="other")
    desk.add(count=3, task="plain")

    assert (desk.count("ready"), desk.count("waiting")) == (3, 6)
    assert [row.moved for row in desk.store.admit(desk.conn, "other", 10)] == [2]
    assert desk.admit() == []


def test_a_full_task_does_not_hold_up_another(desk) -> None:
    desk.rule(Policy(concurrency=1), "task", "a")
    desk.rule(Policy(concurrency=4), "task", "b")
    desk.add(count=9, task="a")
    desk.add(count=9, task="b")

    desk.start()

    assert Counter(row.task for row in desk.rows) == {"a": 1, "b": 4}


@pytest.mark.parametrize("outcome", ["failed", "snoozed"])
def test_a_job_that_waits_for_its_next_run_holds_no_place(desk, outcome) -> None:
    desk.rule(Policy(concurrency=1))
    desk.add(count=2)
    desk.start()

    desk.end(*desk.rows, outcome=outcome, wait=SECOND)

    assert len(desk.start()) == 1
    due = "update sqlqueue.scheduled set due_at = now() - interval '1 s'"
    desk.conn.execute(text(due))
    desk.store.promote(desk.conn, None, 10)
    assert (desk.count("ready"), desk.count("waiting")) == (0, 1)


@pytest.mark.parametrize("outcome", ["returned", "crashed"])
def test_a_job_that_is_handed_back_keeps_its_place(desk, outcome) -> None:
    desk.rule(Policy(concurrency=1))
    desk.add(count=2)
    desk.start()
    (held,) = desk.rows

    desk.end(held, outcome=outcome, wait=timedelta(0))

    assert (desk.count("ready"), desk.count("admitted")) == (1, 1)
    desk.start()
    assert [row.job_id for row in desk.rows] == [held.job_id]


def test_a_cancelled_job_gives_its_place_back(desk) -> None:
    desk.rule(Policy(concurrency=1))
    desk.add(count=2)
    desk.admit()
    (job_id,) = desk.conn.execute(text("select job_id from sqlqueue.ready")).scalars()

    assert desk.store.cancel(desk.conn, str(job_id), "")

    assert desk.count("admitted") == 0
    assert len(desk.start()) == 1


def test_a_waiting_job_is_cancelled_at_once(desk) -> None:
    desk.rule(Policy(concurrency=1))
    desk.add()
    (job_id,) = desk.conn.execute(text("select job_id from sqlqueue.waiting")).scalars()

    assert desk.store.cancel(desk.conn, str(job_id), "no more")
    (job,) = desk.store.jobs(desk.conn, [str(job_id)], [True]).values()
    assert job.state == "cancelled"


# Rates


def test_a_rate_admits_a_burst_and_then_so_many_in_a_time(desk) -> None:
    desk.rule(Policy(rate=Rate(10, HOUR, burst=4)))
    desk.add(count=20)

    assert len(desk.start()) == 4
    (row,) = desk.admit()
    assert row.priority is None
    assert 0 < row.wait <= 2 * 360

    desk.pass_time(0.3 * HOUR)
    assert len(desk.start()) == 3
    desk.pass_time(60 * HOUR)
    assert len(desk.start()) == 4


def test_a_heavy_job_takes_more_of_a_rate(desk) -> None:
    desk.rule(Policy(rate=Rate(1, HOUR, burst=10)))
    desk.add(count=5, weight=4)

    assert len(desk.start()) == 2
    desk.pass_time(2 * HOUR)
    assert len(desk.start()) == 1


def test_a_job_heavier_than_the_burst_is_admitted_once_nothing_is_owed(desk) -> None:
    desk.rule(Policy(rate=Rate(1, HOUR, burst=2)))
    desk.add(weight=100)
    desk.add()

    assert len(desk.start()) == 1
    assert desk.start() == []
    desk.pass_time(2 * HOUR)
    assert len(desk.start()) == 1


def test_each_key_has_a_rate_of_its_own(desk) -> None:
    desk.rule(Policy(rate_per_key=Rate(1, HOUR, burst=1)))
    desk.add("a", 3)
    desk.add("b", 3)

    assert sorted(desk.start()) == ["a", "b"]
    assert desk.start() == []


# Turns


def test_keys_take_turns_however_many_jobs_one_has(desk) -> None:
    desk.rule(Policy())
    desk.add("a", 500)
    desk.start(3)
    desk.add("b", 3)

    assert "".join(desk.start(6)) in ("ababab", "bababa")


def test_shares_give_a_key_more_of_each_round(desk) -> None:
    desk.rule(Policy(shares={"a": 3}))
    desk.add("a", 100)
    desk.add("b", 100)

    keys = [key for _ in range(10) for key in desk.start(8)]

    assert Counter(keys) == {"a": 60, "b": 20}


def test_a_key_in_order_waits_for_the_retries_of_the_job_before(desk) -> None:
    desk.rule(Policy(keeps_order=True))
    desk.add("a", 2)
    desk.add("b", 1)
    assert sorted(desk.start()) == ["a", "b"]
    first = next(row for row in desk.rows)

    desk.end(*desk.rows, outcome="failed", wait=SECOND)

    assert desk.start() == []
    due = "update sqlqueue.scheduled set due_at = now() - interval '1 s'"
    desk.conn.execute(text(due))
    desk.store.promote(desk.conn, None, 10)
    assert sorted(desk.start()) == ["a", "b"]
    desk.end(*desk.rows)
    assert desk.start() == ["a"]
    assert desk.rows[0].job_id != first.job_id


def test_a_limit_of_one_per_key_goes_on_after_a_failure(desk) -> None:
    desk.rule(Policy(concurrency_per_key=1))
    desk.add("a", 2)
    desk.start()
    (first,) = desk.rows

    desk.end(first, outcome="failed", wait=SECOND)

    assert desk.start() == ["a"]
    assert desk.rows[0].job_id != first.job_id


def test_urgent_jobs_of_a_key_come_first(desk) -> None:
    desk.rule(Policy(concurrency=1))
    desk.add(priority=5)
    desk.add(priority=-5)

    assert [row.priority for row in desk.admit()] == [-5]


def test_with_ageing_a_job_grows_urgent_by_waiting(desk) -> None:
    desk.rule(Policy(ageing=timedelta(minutes=1)))
    desk.add(priority=5)
    desk.conn.execute(text("update sqlqueue.waiting set rank = rank - 299"))
    desk.add(priority=0, count=2)

    assert [row.priority for row in desk.admit(1)] == [0]
    desk.conn.execute(text("update sqlqueue.waiting set rank = rank - 2 where priority = 5"))
    assert [row.priority for row in desk.admit(1)] == [5]


# Changes


def test_a_policy_holds_for_jobs_that_are_ready_and_ends_for_those_that_wait(desk) -> None:
    desk.add(count=3)
    desk.rule(Policy(concurrency=2))
    assert (desk.count("ready"), desk.count("waiting")) == (0, 3)

    assert len(desk.start()) == 2
    desk.rule(Policy(concurrency=3))
    assert len(desk.start()) == 1

    desk.add(count=3)
    desk.rule(None)
    assert (desk.count("ready"), desk.count("waiting")) == (3, 0)


def test_a_full_queue_refuses_jobs(queue) -> None:
    queue.set_policy(Policy(max_waiting=2), queue="mail")
    mail = queue.using(queue="mail")
    mail.send("t")
    mail.send("t")

    with pytest.raises(QueueFull, match="queue mail is full"):
        mail.send("t")
    queue.send("t")


@pytest.mark.parametrize("is_async", [False, True])
def test_enqueuing_waits_for_room_in_a_full_queue(queue, engine, is_async) -> None:
    job = queue.task(name="t", queue="mail", wait_if_full=SECOND * 20)(lambda: None)
    queue.set_policy(Policy(max_waiting=1, concurrency=1), queue="mail")
    job.enqueue()

    with ThreadPoolExecutor() as threads:
        work = partial(asyncio.run, job.aenqueue()) if is_async else job.enqueue
        second = threads.submit(work)
        with pytest.raises(TimeoutError):
            second.result(0.2)
        queue.worker("mail", max_jobs=1, **POLLING).run()
        second.result(20)

    assert value(engine, "select count(*) from sqlqueue.waiting") == 1
    with pytest.raises(QueueFull):
        job.using(wait_if_full=SECOND / 10).enqueue()
    with engine.begin() as conn, pytest.raises(QueueFull):
        job.using(conn).enqueue()


def test_many_at_once_are_refused_together_if_they_do_not_fit(queue, engine) -> None:
    queue.set_policy(Policy(max_waiting=2), queue="mail")
    task = queue.task(name="t", queue="mail")(lambda: None)

    with pytest.raises(QueueFull):
        queue.enqueue_many(task.s() for _ in range(3))
    assert value(engine, "select count(*) from sqlqueue.live") == 0
    assert queue.enqueue_many(task.s() for _ in range(2)) == 2


def test_a_job_enqueued_in_sql_waits_too(engine, queue) -> None:
    queue.set_policy(Policy(concurrency=1), queue="mail")

    rows(engine, "select sqlqueue.enqueue('t', queue => 'mail', key => 'a', weight => 2)")

    assert rows(engine, "select flow, weight from sqlqueue.waiting") == [(" a", 2)]
    assert value(engine, "select state from sqlqueue.jobs") == "waiting"


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrency": 0},
        {"concurrency_per_key": 0},
        {"max_waiting": 0},
        {"ageing": timedelta(0)},
        {"breaks_after": 0, "breaks_for": SECOND},
        {"breaks_after": 1, "breaks_for": timedelta(0)},
        {"shares": {"a": 0}},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match="must be"):
        Policy(**wrong)


def test_a_breaker_needs_a_number_and_a_time() -> None:
    for half in ({"breaks_after": 3}, {"breaks_for": SECOND}):
        with pytest.raises(ValueError, match="breaks_after and breaks_for, or neither"):
            Policy(**half)


def test_a_rate_that_makes_no_sense_is_refused() -> None:
    for wrong in ({"jobs": 0}, {"per": timedelta(0)}, {"burst": 0.5}):
        with pytest.raises(ValueError, match="a rate needs"):
            Rate(**{"jobs": 1, "per": SECOND} | wrong)


def test_a_policy_is_for_a_queue_or_a_task(queue: Queue) -> None:
    for wrong in ({}, {"queue": "a", "task": "b"}):
        with pytest.raises(ValueError, match="give one of queue"):
            queue.set_policy(Policy(), **wrong)


def test_a_paused_task_waits_and_others_go_on(desk) -> None:
    desk.add(task="held", count=2)
    desk.store.pause(desk.conn, "task", "held", True, "me", "broken", None)
    desk.add(task="held")
    desk.add(task="free")

    assert desk.start() == [None]
    desk.store.pause(desk.conn, "task", "held", False, None, None, None)
    assert len(desk.start()) == 3


def test_the_pause_of_a_task_ends_by_itself(desk) -> None:
    desk.store.pause(desk.conn, "task", "held", True, "", None, SECOND)
    desk.add(task="held")
    assert desk.start() == []

    desk.conn.execute(text("update sqlqueue.policy set resumes_at = now()"))
    assert len(desk.start()) == 1


# Workers


# A circuit breaker

BREAKS = Policy(breaks_after=3, breaks_for=SECOND)


def run_one(desk: Desk, outcome: str) -> None:
    assert len(desk.start(1)) == 1
    desk.end(*desk.rows, outcome=outcome)


def has_broken(desk: Desk) -> bool:
    """Whether nothing is admitted, though jobs wait."""
    assert desk.count("waiting")
    return desk.admit() == []


def let_time_pass(desk: Desk) -> None:
    """End the pause of a policy as if its time were over."""
    desk.conn.execute(text("update sqlqueue.policy set resumes_at = now() - interval '1 us'"))


@pytest.mark.parametrize("scope", ["queue", "task"])
def test_failures_in_a_row_pause_a_queue_or_task(desk, scope) -> None:
    desk.rule(BREAKS, scope, {"queue": "mail", "task": "t"}[scope])
    desk.add(count=20)

    for outcome in ("failed", "timed_out", "succeeded", "failed", "crashed", "failed"):
        run_one(desk, outcome)

    assert has_broken(desk)
    (rule,) = rows_of(desk, "select * from sqlqueue.policy")
    assert (rule.failures, rule.paused_by) == (3, "circuit breaker")
    assert rule.paused_why == "3 failures in a row"
    assert rule.resumes_at - rule.paused_at == SECOND
    assert desk.count("verdict") == 0


def rows_of(desk: Desk, sql: str) -> list[Any]:
    return list(desk.conn.execute(text(sql)))


def test_a_snooze_or_a_cancel_is_no_failure_and_no_success(desk) -> None:
    desk.rule(BREAKS)
    desk.add(count=20)

    for outcome in ("failed", "failed", "snoozed", "cancelled", "failed"):
        run_one(desk, outcome)

    assert has_broken(desk)


def test_after_the_pause_one_job_at_a_time_is_tried_until_one_succeeds(desk) -> None:
    desk.rule(BREAKS)
    desk.add(count=30)
    for _ in range(3):
        run_one(desk, "failed")
    assert has_broken(desk)

    let_time_pass(desk)
    assert len(desk.start()) == 1
    assert has_broken(desk)
    desk.end(*desk.rows, outcome="failed")
    assert has_broken(desk)
    let_time_pass(desk)
    assert len(desk.start()) == 1
    desk.end(*desk.rows)

    assert len(desk.start()) == 25


def test_many_failures_at_once_break_the_circuit_once(desk) -> None:
    desk.rule(BREAKS)
    desk.add(count=30)
    desk.start(10)
    desk.end(*desk.rows[:5], outcome="failed")
    assert has_broken(desk)
    (before,) = rows_of(desk, "select * from sqlqueue.policy")

    desk.end(*desk.rows[5:], outcome="failed")
    assert has_broken(desk)

    (after,) = rows_of(desk, "select * from sqlqueue.policy")
    assert (before.failures, after.failures) == (5, 10)
    assert after.resumes_at == before.resumes_at


def test_a_success_among_failures_that_are_looked_at_together_counts(desk) -> None:
    desk.rule(BREAKS)
    desk.add(count=30)
    desk.start(4)
    for row, outcome in zip(desk.rows, ["failed", "failed", "succeeded", "failed"], strict=True):
        desk.end(row, outcome=outcome)

    assert not has_broken(desk)


def test_whoever_resumes_a_queue_closes_its_circuit(desk) -> None:
    desk.rule(BREAKS)
    desk.add(count=30)
    for _ in range(3):
        run_one(desk, "failed")
    assert has_broken(desk)

    desk.store.pause(desk.conn, "queue", "mail", False, None, None, None)

    assert len(desk.start()) == 27


def test_jobs_without_a_breaker_leave_no_verdict(desk) -> None:
    desk.rule(Policy(concurrency=5))
    desk.add(count=5)
    desk.start()
    desk.end(*desk.rows, outcome="failed")

    assert desk.count("verdict") == 0


def test_a_worker_stops_trying_a_broken_service(queue, engine) -> None:
    tried: list[int] = []

    @queue.task(name="call", queue="mail", retry=Retry(attempts=1))
    def call(number: int) -> None:
        tried.append(number)
        raise ConnectionError

    queue.set_policy(Policy(concurrency=1, breaks_after=3, breaks_for=SECOND * 60), queue="mail")
    queue.enqueue_many(call.s(number) for number in range(20))
    queue.worker("mail", drain=True, **POLLING).run()

    assert len(tried) == 3
    assert value(engine, "select count(*) from sqlqueue.waiting") == 17


def test_a_worker_runs_all_jobs_of_a_limited_queue_within_its_limit(queue, engine) -> None:
    queue.set_policy(Policy(concurrency=2, concurrency_per_key=1), queue="mail")

    @queue.task(name="t", queue="mail")
    def count_leases() -> int:
        return int(value(engine, "select count(*) from sqlqueue.lease"))

    jobs = [count_leases.using(key=key).enqueue() for key in "abc" * 10]
    with queue.worker(poll=timedelta(seconds=0.25)):
        results = [job.wait(timedelta(seconds=10)) for job in jobs]

    assert max(results) == 2
    assert value(engine, "select count(*) from sqlqueue.admitted") == 0


def test_a_draining_worker_waits_for_the_rate(queue, engine) -> None:
    queue.set_policy(Policy(rate=Rate(50, SECOND, burst=1)), queue="mail")

    @queue.task(name="t", queue="mail")
    def greet() -> None: ...

    for _ in range(30):
        greet.enqueue()
    queue.worker(drain=True, poll=timedelta(seconds=0.25)).run()

    assert value(engine, "select count(*) from sqlqueue.run") == 30
    took = value(engine, "select max(started_at) - min(started_at) from sqlqueue.run")
    assert took >= timedelta(seconds=29 / 50 - 0.02)
