"""The views: each job once, counts that are right, histograms that merge, and `why`."""

import math
import os
import random
import signal
import threading
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text

from sqlqueue import Cancel, Policy, Queue, Rate, Retry, Snooze
from sqlqueue.flow import bucket
from sqlqueue.reports import Reports
from sqlqueue.reports.verbs import Operator
from sqlqueue.store import Lane
from tests import views_page
from tests.harness import POLLING, SOON, load_app, rows, tree, value, wait_until, work, workers
from tests.test_store import hire

AT_ONCE = Retry(attempts=2, waits=[timedelta(0)])


def states(engine: Engine) -> dict[str, list[tuple[str, str | None]]]:
    """The states in which the view jobs has each job."""
    found: dict[str, list[tuple[str, str | None]]] = {}
    for job_id, state, reason in rows(engine, "select id, state, reason from sqlqueue.jobs"):
        found.setdefault(str(job_id), []).append((state, reason))
    return found


def operator(queue: Queue) -> Operator:
    return Operator(queue, "ana", "a test")


def why(engine: Engine, job: Any) -> dict[str, Any]:
    """The answer that `why` gives for a job."""
    with engine.connect() as conn:
        found = Reports(conn, "sqlqueue").why(job.id)
    return next(row for row in found if not row["is_ok"])


# What there is


def test_m01_the_page_of_the_views_equals_the_catalog(engine) -> None:
    assert views_page.PAGE.read_text() == views_page.page(engine)


def test_m03_through_any_life_a_job_is_in_jobs_exactly_once(engine, queue) -> None:
    @queue.task(name="does", retry=AT_ONCE)
    def does(what: str) -> str:
        if what == "fail":
            raise ValueError(what)
        if what == "cancel":
            raise Cancel("no more")
        if what == "snooze":
            raise Snooze(timedelta(hours=1))
        return what

    queue.set_policy(Policy(concurrency=1), queue="few")
    jobs = {
        what: does.enqueue(what) for what in ("succeed", "fail", "discarded", "cancel", "snooze")
    }
    jobs["discarded"].cancel()
    jobs["discarded"] = does.enqueue("fail")
    jobs["moved"] = does.using(queue="nobody").enqueue("x")
    jobs["later"] = does.using(delay=timedelta(hours=1)).enqueue("x")
    jobs["waits"] = does.using(queue="few").enqueue("x")
    work(queue)
    operator(queue).change("discard", [jobs["discarded"].id])
    operator(queue).change("move", [jobs["moved"].id], how={"queue": "other", "priority": 5})
    jobs["retried"] = does.enqueue("fail")
    work(queue)
    assert operator(queue).change("retry", [jobs["retried"].id]).ids
    with engine.begin() as conn:
        worker = hire(conn, queue.store)
        conn.execute(text("update sqlqueue.worker set queues = '{other}'"))

        (held,) = queue.store.claim(conn, Lane("other", 5), 0, 1, worker)
    assert held.job_id == str(jobs["moved"].id)

    found = states(engine)
    assert {len(one) for one in found.values()} == {1}
    told = {name: found[str(job.id)][0] for name, job in jobs.items()}
    assert told == {
        "succeed": ("succeeded", None),
        "fail": ("failed", "failed"),
        "discarded": ("cancelled", None),
        "cancel": ("cancelled", None),
        "snooze": ("scheduled", "snooze"),
        "moved": ("running", None),
        "later": ("scheduled", "delay"),
        "waits": ("waiting", "policy"),
        "retried": ("ready", None),
    }
    with engine.begin() as conn:  # its worker dies
        (crashed,) = queue.store.rescue(conn, 10, worker)
    assert (crashed.job_id, states(engine)[held.job_id]) == (held.job_id, [("ready", None)])


def test_m04_merged_histograms_equal_that_of_all_values(engine) -> None:
    rng = random.Random(4)
    values = [rng.lognormvariate(-3, 2) for _ in range(2000)]

    def hist(some: list[float]) -> list[int]:
        return [sum(bucket(one) == place for one in some) for place in range(48)]

    parts = [values[start : start + 100] for start in range(0, 2000, 100)]
    short = [hist(part)[: rng.randint(20, 48)] for part in parts]
    trimmed = [
        [*one, *(hist(part)[len(one) :])] if sum(hist(part)[len(one) :]) else one
        for one, part in zip(short, parts, strict=True)
    ]
    merged = value(
        engine,
        "select sqlqueue.hist_sum(cast(one as bigint[]))"
        " from unnest(cast(:hists as text[])) as one",
        hists=["{" + ",".join(map(str, one)) + "}" for one in trimmed],
    )

    assert [int(one) for one in merged] + [0] * (48 - len(merged)) == hist(values)
    for q in (0.0, 0.1, 0.5, 0.95, 0.99, 1.0):
        told = value(
            engine,
            "select extract(epoch from sqlqueue.hist_quantile(cast(:hist as bigint[]), :q))",
            hist=hist(values),
            q=q,
        )
        exact = sorted(values)[max(math.ceil(q * 2000) - 1, 0)]
        assert bucket(float(told)) in (bucket(exact), bucket(exact) + 1)
    assert value(engine, "select sqlqueue.hist_quantile('{}', 0.5)") is None


def test_what_came_and_went_is_counted(engine, queue) -> None:
    @queue.task(name="does", retry=AT_ONCE)
    def does(fails: bool) -> None:
        if fails:
            raise ValueError

    for fails in (False, False, True):
        does.enqueue(fails)
    cancelled = does.using(queue="other").enqueue(False)
    cancelled.cancel()
    work(queue)

    counted = "select sum(started), sum(succeeded), sum(failed), sum(retried), sum(cancelled)"
    assert rows(engine, f"{counted} from sqlqueue.minutes") == [(4, 2, 1, 1, 1)]
    assert rows(engine, f"{counted} from sqlqueue.hours") == [(4, 2, 1, 1, 1)]
    assert rows(engine, f"{counted} from sqlqueue.counters") == [(4, 2, 1, 1, 1)]
    hist = "select sum(one) from sqlqueue.minutes, unnest({}) as one"
    assert value(engine, hist.format("waited_hist")) == value(engine, hist.format("ran_hist")) == 4


def test_minutes_are_folded_and_counted_once_and_counters_keep_what_is_dropped(engine, queue):
    @queue.task(name="does")
    def does() -> None:
        pass

    queue.set_policy(Policy(concurrency=1), queue="few")
    does.enqueue()
    work(queue)
    rows(engine, "update sqlqueue.flow set at = at - interval '3 minutes'")
    rows(engine, "update sqlqueue.job set created_at = created_at - interval '3 minutes'")
    before = "date_trunc('minute', now(), 'UTC') - interval '5 minutes'"
    observe = f"update sqlqueue.setting set observed_at = {before}; select sqlqueue.observe()"
    for _ in range(3):
        rows(engine, observe)

    sums = "select sum(enqueued), sum(succeeded), count(*) from sqlqueue.{}"
    assert rows(engine, sums.format("minutes")) == [(1, 1, 1)]
    assert rows(engine, sums.format("counters")) == [(1, 1, 1)]
    assert rows(engine, "select step from sqlqueue.flow") == [("minute",)]
    rows(engine, "update sqlqueue.flow set at = at - interval '5 hours'")
    rows(engine, "update sqlqueue.job set created_at = created_at - interval '5 hours'")
    rows(engine, observe)
    assert rows(engine, sums.format("hours")) == [(1, 1, 1)]
    rows(engine, "update sqlqueue.flow set at = at - interval '100 days'")
    rows(engine, observe)
    assert rows(engine, sums.format("minutes"))[0][2] == 0
    assert rows(engine, sums.format("counters")) == [(1, 1, 1)]  # m25: they never fall
    assert value(engine, "select count(*) from sqlqueue.depths") > 0


@pytest.mark.alone
def test_m05_after_sigkill_of_a_busy_worker_counts_are_exact(engine, migrated_url) -> None:
    app = load_app(migrated_url)
    from tests.harness import application_table

    application_table(engine)
    with tree(migrated_url, slots=4):
        (pid,) = wait_until(lambda: workers(engine)).values()
        jobs = [app.linger.enqueue(f"m05 {n}", 0.05) for n in range(60)]
        wait_until(lambda: value(engine, "select count(*) from effect") > 20, within=30)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: value(engine, "select count(*) from sqlqueue.live") == 0, within=60)
        counted = "select sum(succeeded) from sqlqueue.minutes"
        wait_until(lambda: (value(engine, counted) or 0) >= 1, within=25)
    told = value(engine, "select overview from sqlqueue.totals")
    assert (told["ready"], told["running"], told["scheduled"]) == (0, 0, 0)
    ended = value(engine, "select count(*) from sqlqueue.run where is_final")
    assert ended == len(jobs)
    # Only what the dead one had not written yet, of at most ten seconds, is missing.
    assert len(jobs) - 60 <= value(engine, counted) <= len(jobs)


# Failures


def test_failures_with_one_cause_are_one_group(engine, queue) -> None:
    @queue.task(name="one", retry=Retry(attempts=1))
    def one(n: int) -> None:
        raise ValueError(f"message {n}")

    @queue.task(name="two", retry=Retry(attempts=1))
    def two(n: int) -> None:
        if n:
            raise KeyError(n)
        raise ValueError("x")

    for n in range(3):
        one.enqueue(n)
        two.enqueue(n)
    work(queue)

    found = rows(
        engine, "select task, error_type, source, jobs from sqlqueue.failures order by 1, 2"
    )
    assert found == [
        ("one", "ValueError", "test_views.py one", 3),
        ("two", "KeyError", "test_views.py two", 2),
        ("two", "ValueError", "test_views.py two", 1),
    ]
    failed = "select queue, failed from sqlqueue.queues where failed > 0"
    assert rows(engine, failed) == [("default", 6)]


# Why


def test_m06_why_names_the_cause(engine, queue) -> None:
    @queue.task(name="does")
    def does() -> None:
        pass

    assert (
        why(engine, type("Nobody", (), {"id": "019a0000-0000-7000-8000-000000000000"}))["reason"]
        == "unknown"
    )
    done = does.enqueue()
    work(queue)
    assert why(engine, done)["reason"] == "ended"
    later = does.using(delay=timedelta(hours=1)).enqueue()
    assert why(engine, later)["reason"] == "not due"
    assert "run-now" in why(engine, later)["hint"]
    job = does.enqueue()
    assert why(engine, job)["reason"] == "no worker"
    queue.pause("default", by="ana", why="upgrade")
    answer = why(engine, job)
    assert answer["reason"] == "queue paused"
    assert "ana" in answer["detail"]
    assert "upgrade" in answer["detail"]
    queue.resume("default")
    queue.pause(task="does")
    assert why(engine, job)["reason"] == "task paused"
    queue.resume(task="does")
    queue.set_policy(None, task="does")
    with engine.begin() as conn:
        worker = hire(conn, queue.store)
        conn.execute(text("update sqlqueue.worker set queues = '{default,few}', tasks = '{}'"))
    assert why(engine, job)["reason"] == "unknown task"
    rows(engine, "update sqlqueue.worker set tasks = '{does}', slots = 1")
    assert why(engine, job)["reason"] == "in line"
    with engine.begin() as conn:
        queue.store.claim(conn, Lane("default", 0), 0, 1, worker)
    assert why(engine, job)["reason"] == "running"
    assert why(engine, does.enqueue())["reason"] == "no free slot"


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (Policy(concurrency=1), "queue limit"),
        (Policy(concurrency_per_key=1), "key limit"),
        (Policy(rate=Rate(1, timedelta(hours=1), burst=1)), "rate limit"),
        (Policy(rate_per_key=Rate(1, timedelta(hours=1), burst=1)), "rate limit"),
        (Policy(keeps_order=True), "order"),
        (Policy(), "fair share"),
    ],
    ids=["queue", "key", "rate", "rate of a key", "order", "turns"],
)
def test_m06_why_names_the_policy(engine, queue, policy, reason) -> None:
    queue.set_policy(policy, queue="few")

    @queue.task(name="does", queue="few", key="k")
    def does() -> None:
        pass

    does.enqueue()
    with engine.begin() as conn:
        hire(conn, queue.store)
        conn.execute(
            text("update sqlqueue.worker set queues = '{few}', tasks = '{does}', slots = 9")
        )
        queue.store.admit(conn, "few", 1)
    assert why(engine, does.enqueue())["reason"] == reason


# Levels


def test_levels_are_those_of_the_tables(engine, queue) -> None:
    @queue.task(name="does")
    def does() -> None:
        pass

    for priority in (0, 0, 5, -5):
        does.using(priority=priority).enqueue()
    does.using(queue="b").enqueue()
    for _ in range(3):
        does.using(queue="b", delay=timedelta(hours=1)).enqueue()
    queue.set_policy(Policy(concurrency=1), queue="c")
    does.using(queue="c").enqueue()

    found = rows(engine, "select queue, ready, waiting, scheduled from sqlqueue.queues order by 1")
    assert found == [("b", 1, 0, 3), ("c", 0, 1, 0), ("default", 4, 0, 0)]
    told = value(engine, "select overview from sqlqueue.totals")
    assert (told["ready"], told["waiting"], told["scheduled"]) == (5, 1, 3)
    assert value(engine, "select sqlqueue.queue_lag('b')") == 1
    assert value(engine, "select sqlqueue.queue_lag('nobody')") == 0
    assert value(engine, "select sqlqueue.queue_wait('nobody')") == 0
    rows(engine, "update sqlqueue.ready set due_at = now() - interval '1 minute'")
    assert 60 <= value(engine, "select sqlqueue.queue_wait('b')") < 120


def test_a_worker_that_is_told_to_drain_ends(engine, queue) -> None:
    @queue.task(name="waits")
    def waits() -> None:
        threading.Event().wait(0.5)

    job = waits.enqueue()
    with queue.worker("default", **POLLING | {"ttl": timedelta(seconds=1)}) as worker:
        wait_until(lambda: job.refresh().state == "running")
        assert operator(queue).call("tell_worker", worker=worker.id, what="drain")
        assert worker.stopped.wait(SOON.total_seconds())
    assert job.refresh().state == "succeeded"
    assert value(engine, "select count(*) from sqlqueue.workers") == 0
    assert rows(engine, "select actor, verb, affected from sqlqueue.actions") == [
        ("ana", "drain", 1)
    ]
    assert not operator(queue).call("tell_worker", worker=worker.id, what="stop")


def test_a_job_that_runs_is_not_deleted(engine, queue) -> None:
    job = queue.send("does")
    with engine.begin() as conn:
        worker = hire(conn, queue.store)
        assert queue.store.claim(conn, Lane("default", 0), 0, 1, worker)
    assert operator(queue).change("delete", [job.id]).skipped == [job.id]
    assert job.refresh().state == "running"
    with engine.begin() as claimer:  # just being claimed: its place is locked
        other = queue.send("does")
        assert queue.store.claim(claimer, Lane("default", 0), 0, 1, worker)
        deleting = threading.Thread(
            target=operator(queue).change, args=("delete", [other.id]), daemon=True
        )
        deleting.start()
        threading.Event().wait(0.3)
    deleting.join(10)
    assert other.refresh().state == "running"


def test_a_worker_says_what_it_uses(queue, engine) -> None:
    @queue.task(name="does")
    def does() -> None:
        pass

    does.enqueue()
    with queue.worker("default", **POLLING | {"ttl": timedelta(seconds=1)}):
        used = "select rss_bytes, cpu, jobs_done from sqlqueue.workers where jobs_done = 1"
        wait_until(lambda: any(row.cpu is not None for row in rows(engine, used)))
        ((memory, cpu, _),) = rows(engine, used)
        assert 10_000_000 < memory < 10_000_000_000
        assert 0 <= cpu < 64
