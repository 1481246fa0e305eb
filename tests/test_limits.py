"""Policies and schedules under real workers, some of them killed: what is promised of them holds.

The long forms are nightly. Clocks: beat 0.5 s, ttl 3 s, poll 0.25 s.
"""

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from itertools import islice
from time import monotonic, process_time
from typing import Any

import pytest
from sqlalchemy import Engine

from sqlqueue import Policy, Queue, Rate, Schedule
from sqlqueue.worker import HORIZON
from tests.harness import (
    CLOCKS,
    POLLING,
    TTL,
    application_table,
    is_alive,
    is_stopped,
    program,
    rows,
    tree,
    value,
    wait_until,
    workers,
)

pytestmark = [pytest.mark.timeout(180), pytest.mark.alone]
SECOND = timedelta(seconds=1)
SEED = 20261123
RUNNING = "select count(*) from sqlqueue.lease where queue = 'few'"

HELD = (
    "select state, reason, count(*) from sqlqueue.live join sqlqueue.admitted on job_id = id"
    " group by 1, 2"
)


@pytest.fixture(autouse=True)
def table(engine: Engine) -> None:
    application_table(engine)


@contextmanager
def watched(engine: Engine, limit: int) -> Iterator[None]:
    """Have the database itself look, at every commit, whether a limit is exceeded."""
    rows(
        engine,
        "create table if not exists breach (leases bigint);"
        "delete from breach;"
        "create or replace function watch() returns trigger language plpgsql as $$ begin"
        " insert into breach select count(*) from sqlqueue.lease where queue = 'few'"
        f" having count(*) > {limit}; return null; end $$;"
        "create constraint trigger watch after insert on sqlqueue.lease"
        " deferrable initially deferred for each row execute function watch()",
    )
    try:
        yield
    finally:
        rows(engine, "drop trigger watch on sqlqueue.lease")


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(20, id="short"), pytest.param(60, id="long", marks=pytest.mark.nightly)],
)
def test_r30_a_concurrency_limit_is_never_exceeded(queue, engine, migrated_url, seconds):
    """Eight claimers share five places; some are killed. All places are in use again in time."""
    limit, dice = 5, random.Random(SEED)
    queue.set_policy(Policy(concurrency=limit), queue="few")
    few = queue.using(queue="few", max_crashes=1000)
    back: list[float] = []
    used: list[int] = []
    sent = 0
    with watched(engine, limit), ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(tree(migrated_url, 4, "few", slots=3))
        end = monotonic() + seconds
        while monotonic() < end:
            waiting = value(engine, "select count(*) from sqlqueue.waiting")
            for _ in range(60 - waiting):
                few.send("write", str(sent), dice.uniform(0.02, 0.2))
                sent += 1
            began = monotonic()
            wait_until(
                lambda: value(engine, RUNNING) == limit,
                within=TTL.total_seconds() + 5,
                what=str(rows(engine, HELD)),
            )
            back.append(monotonic() - began)
            for _ in range(5):
                used.append(value(engine, RUNNING))
                threading.Event().wait(0.02)
            victims = rows(engine, "select distinct worker_id from sqlqueue.lease")
            alive = workers(engine)
            if victims and (pid := alive.get(dice.choice(victims)[0])) and is_alive(pid):
                os.kill(pid, signal.SIGKILL)
            threading.Event().wait(dice.uniform(0.5, 1.5))
        wait_until(lambda: value(engine, "select count(*) from sqlqueue.live") == 0, within=45)

    crashed = value(engine, "select count(*) from sqlqueue.run where outcome = 'crashed'")
    share = sum(used) / len(used) / limit
    print(f"{sent} jobs, {crashed} crashed runs, {share:.2f} used, back in {max(back):.2f} s")
    assert crashed >= 3, "inconclusive: hardly anybody was killed at work"
    assert rows(engine, "select leases from breach") == []
    assert share > 0.8
    assert value(engine, "select count(*) from sqlqueue.admitted") == 0
    assert value(engine, "select count(*) from effect") == sent


def stalls(seconds: float) -> float:
    """Wait; return the longest time that a thread of this process was held up for."""
    pause, late, until = threading.Event(), 0.0, monotonic() + seconds
    while (began := monotonic()) < until:
        pause.wait(0.02)
        late = max(late, monotonic() - began - 0.02)
    return late


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(8, id="short"), pytest.param(30, id="long", marks=pytest.mark.nightly)],
)
def test_a_rate_is_kept_exactly_by_all_workers_together(queue, engine, seconds):
    rate, burst = 100, 10
    queue.set_policy(Policy(rate=Rate(rate, SECOND, burst=burst)), queue="few")

    @queue.task(name="t", queue="few")
    def nothing() -> None: ...

    queue.enqueue_many(nothing.s() for _ in range(rate * (seconds + 2)))
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(queue.worker("few", slots=5, **POLLING))
        wait_until(lambda: value(engine, "select count(*) from sqlqueue.run"))
        cpu = process_time()
        late = stalls(seconds)
        cpu = (process_time() - cpu) / seconds / 4

    starts = [
        float(row[0])
        for row in rows(
            engine,
            "select extract(epoch from started_at - min(started_at) over ()) as at"
            " from sqlqueue.run order by at",
        )
    ]
    count = sum(at < seconds for at in starts)
    fullest = max(sum(at <= other < at + 1 for other in starts[n:]) for n, at in enumerate(starts))
    print(f"{count} in {seconds} s, at most {fullest} in 1 s, {cpu:.1%} of a core for each worker")
    assert abs(count - rate * seconds) <= burst
    assert all(n <= burst + rate * (at + late) + 1 for n, at in enumerate(starts))
    assert fullest <= rate * (1 + late) + burst  # who was held up claims together with the next
    assert cpu < 0.05 * 2  # the threads of four workers share one interpreter here


@pytest.mark.parametrize(
    "many",
    [
        pytest.param(20_000, id="short"),
        pytest.param(1_000_000, id="long", marks=pytest.mark.nightly),
    ],
)
def test_a_tenant_with_many_jobs_does_not_delay_another(queue, engine, many):
    queue.set_policy(Policy(), queue="few")

    @queue.task(name="t", queue="few")
    def brief() -> None:
        threading.Event().wait(0.01)

    for_a, for_b = brief.using(key="a"), brief.using(key="b")
    queue.enqueue_many(for_a.s() for _ in range(many))
    with queue.worker("few", slots=4, **POLLING):
        wait_until(lambda: value(engine, "select count(*) from sqlqueue.run") > 20)
        queue.enqueue_many(for_b.s() for _ in range(10))
        now = value(engine, "select clock_timestamp()")
        ended = "select count(*) from sqlqueue.jobs where key = 'b' and state = 'succeeded'"
        wait_until(lambda: value(engine, ended) == 10)

    # Jobs of one claim have started at the same time. In the claim with the last of b, jobs of a
    # went before each of b; more of a may follow, since a was alone then. A turn that was under
    # way when b came had the room of one: the slots, and what is claimed ahead.
    ((before, between),) = rows(
        engine,
        "select count(*) filter (where key = 'a' and started_at > :now and started_at < first),"
        " count(*) filter (where key = 'a' and started_at >= first and started_at < last)"
        " + count(*) filter (where key = 'b' and started_at = last)"
        " from sqlqueue.jobs, (select min(started_at) as first, max(started_at) as last"
        " from sqlqueue.jobs where key = 'b') as of_b",
        now=now,
    )
    print(f"of a, {before} were started before the first of b, {between} before the tenth")
    assert before <= 4 + int(4 * HORIZON / 0.01)
    assert between <= 10 + 1


def test_shares_are_kept_by_workers(queue, engine):
    queue.set_policy(Policy(shares={"a": 3}), queue="few")

    @queue.task(name="t", queue="few")
    async def nothing() -> None: ...

    for key in "ab":
        one = nothing.using(key=key)
        queue.enqueue_many(one.s() for _ in range(3000))
    with queue.worker("few", max_jobs=2000, slots=20) as worker:
        assert worker.join(30)

    counted = "select key, count(*) from sqlqueue.jobs where state = 'succeeded' group by key"
    found = dict(map(tuple, rows(engine, counted)))
    assert found["a"] / found["b"] == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(12, id="short"), pytest.param(60, id="long", marks=pytest.mark.nightly)],
)
def test_r29_a_schedule_fires_once_per_instant(queue, engine, migrated_url, seconds):
    """Three workers look after three schedules; one after another is killed or stands still."""
    dice = random.Random(SEED)
    call = queue.task(name="process_id")(lambda: None).s()
    for name in "abc":
        queue.set_schedule(name, call, Schedule(every=SECOND, missed="all"))
    code = f"app.work(('default',), {CLOCKS | {'grace': timedelta(0)}!r})"

    def start() -> Any:
        return stack.enter_context(program(migrated_url, code))

    strikes = 0
    with ExitStack() as stack:
        running = [start() for _ in range(3)]
        end = monotonic() + seconds
        wait_until(lambda: value(engine, "select count(*) from sqlqueue.tick") > 3, within=30)
        while monotonic() < end:
            threading.Event().wait(dice.uniform(0.3, 1.2))
            victim = dice.choice(running)
            strikes += 1
            if dice.random() < 0.5:
                victim.kill()
                running[running.index(victim)] = start()
            else:
                os.kill(victim.pid, signal.SIGSTOP)
                wait_until(lambda pid=victim.pid: is_stopped(pid))
                threading.Event().wait(dice.uniform(0.1, 2))
                os.kill(victim.pid, signal.SIGCONT)
        last = value(engine, "select now()")
        caught_up = "select count(*) from sqlqueue.schedule where next_at > :last"
        wait_until(lambda: value(engine, caught_up, last=last) == 3, within=20)

    sql = "select min(at), max(at), count(*), count(distinct job_id) from sqlqueue.tick"
    for name in "abc":
        low, high, ticks, jobs = rows(engine, f"{sql} where schedule = '{name}'")[0]
        assert ticks == jobs == (high - low) / SECOND + 1
        assert high >= last - SECOND
    print(f"{strikes} strikes")
    assert strikes >= 4, "inconclusive"
    fired = "select count(*) from sqlqueue.job"
    assert value(engine, fired) == value(engine, "select count(*) from sqlqueue.tick")


@pytest.mark.nightly
def test_delayed_jobs_start_on_time_however_many_there_are(queue, engine):
    @queue.task(name="t")
    async def nothing() -> None: ...

    def spread(count: int, first: float, over: float) -> Iterator[Any]:
        for number in range(count):
            yield nothing.using(delay=timedelta(seconds=first + over * number / count)).s()

    far = nothing.using(delay=timedelta(days=30))
    queue.enqueue_many(far.s() for _ in range(1_000_000))
    near = list(islice(spread(100_000, 90, 60), 100_000))
    with queue.engine.begin() as conn:
        queue.using(conn).enqueue_many(near)
    with queue.worker():
        drained = "select count(*) from sqlqueue.scheduled where due_at < now() + interval '1 hour'"
        wait_until(lambda: value(engine, drained) == 0, within=170)

    late = value(
        engine,
        "select percentile_disc(0.99) within group (order by started_at - due_at)"
        " from sqlqueue.run",
    )
    print(f"p99 {late}")
    assert late < timedelta(milliseconds=50)


def test_a_limited_queue_is_no_storm_while_it_waits(queue: Queue, engine: Engine) -> None:
    queue.set_policy(Policy(concurrency=1), queue="few")
    may_end = threading.Event()

    @queue.task(name="t", queue="few")
    def slow() -> None:
        may_end.wait(20)

    for _ in range(5):
        slow.enqueue()
    with queue.worker("few", poll=SECOND), queue.worker("few", poll=SECOND):
        wait_until(lambda: value(engine, "select count(*) from sqlqueue.lease") == 1)
        threading.Event().wait(1)
        cpu = process_time()
        threading.Event().wait(2)
        cpu = process_time() - cpu
        may_end.set()
        wait_until(lambda: value(engine, "select count(*) from sqlqueue.run") == 5)

    assert cpu < 0.2
