"""Bars R32 to R35: what the tables hold, and what cannot be removed from them."""

import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID

import pytest
from sqlalchemy import Connection, Engine, create_engine, text

from sqlqueue import Options, Queue
from sqlqueue.lanes import TRAIL, Floor
from sqlqueue.literal import new_id
from sqlqueue.store import Executes, Lane, Store
from sqlqueue.upkeep import WINDOW
from tests.faults.cluster import Cluster
from tests.faults.load import Load, migrated, percentile, wait, working
from tests.harness import SOON, rows, value, wait_until
from tests.test_plans import Noted, Notes, make_database, prepare
from tests.test_store import hire

pytestmark = pytest.mark.alone
DEAD_AND_DONE = """
select
    (select n_dead_tup from pg_stat_user_tables where relname = 'ready'),
    count(*)
from sqlqueue.run
where is_final and ended_at between to_timestamp(:low) and to_timestamp(:high)
"""
# Gives upkeep a partition to make: the last week has none.
FUTURE = """
do $$
begin
    execute format('drop table sqlqueue.%I', (
        select max(relname) from pg_class where relname ~ '^job_[0-9]{8}$'
    ));
end
$$
"""


# R32: the horizon pinned

HOUR = timedelta(hours=1)
LANE = Lane("default", 0)
Ask = Callable[[Store, Executes], object]
# Rows that came and went while a snapshot was held open; the worker 2 has been dead for a while.
DEAD = """
insert into sqlqueue.ready (job_id, due_at, priority, queue)
select gen_random_uuid(), now(), 0, 'default' from generate_series(1, 50000);
insert into sqlqueue.scheduled (job_id, due_at, priority, queue, reason)
select gen_random_uuid(), now() - interval '1 min', 0, 'default', 'delay'
from generate_series(1, 50000);
insert into sqlqueue.lease (job_id, due_at, priority, queue, seq, worker_id, claimed_at)
select gen_random_uuid(), now(), 0, 'default', 0, n % 2 + 1, now() - interval '11 min'
from generate_series(1, 100000) as n;
insert into sqlqueue.doorbell (queue, rings_until, worker_id)
select 'bell', now() - n * interval '1 s', 1 from generate_series(1, 50000) as n;
delete from sqlqueue.ready;
delete from sqlqueue.scheduled where due_at < now();
delete from sqlqueue.lease;
delete from sqlqueue.doorbell;
update sqlqueue.worker set died_at = now() - interval '11 min' where id = 2;
"""


def asked_again_and_again(floor: int) -> dict[str, Ask]:
    """Return what workers do all the time, and enqueuers, who look for a bell."""
    plain, bell = Options().params, Options(queue="bell").params
    return {
        "enqueue": lambda store, conn: store.enqueue(conn, [new_id()], ["{}"], "greet", plain),
        "ring": lambda store, conn: store.enqueue(conn, [new_id()], ["{}"], "greet", bell),
        "arm": lambda store, conn: store.arm(conn, ["bell"], 1, HOUR),
        "disarm": lambda store, conn: store.disarm(conn, ["bell"], 1),
        "claim": lambda store, conn: store.claim(conn, LANE, floor, 10, 1),
        "lanes": lambda store, conn: store.lanes(conn, "default", [0], False),
        "promote": lambda store, conn: store.promote(conn, WINDOW, 10),
        "next_due": lambda store, conn: store.next_due(conn),
        "orphans": lambda store, conn: store.orphans(conn, 10, None),
        "beat": lambda store, conn: store.beat(conn, 1, None),
        "leases": lambda store, conn: store.leases(conn, 1, WINDOW),
    }


# The same without what steps over dead rows.
WALKS: dict[str, Ask] = {
    "claim": lambda store, conn: store.claim(conn, LANE, 0, 10, 1),
    "lanes": lambda store, conn: store.lanes(conn, "default", [], False),
    "promote": lambda store, conn: store.promote(conn, None, 10),
    "leases": lambda store, conn: store.leases(conn, 1, None),
}


def touched(engine: Engine, statements: dict[str, Ask]) -> dict[str, int]:
    """Return how many blocks each statement touches, with all the functions it calls."""
    found = {}
    with engine.connect() as conn:
        for verb, ask in statements.items():
            with pytest.raises(Noted) as noted:
                ask(Store(), Notes())
            explain = f"explain (analyze, buffers, format json) {noted.value.statement}"
            blocks = []
            for _ in range(3):  # the first time, catalogs are read too
                prepare(conn, HOUR)
                (plan,) = conn.exec_driver_sql(explain, noted.value.parameters).scalar()
                conn.rollback()
                root = plan["Plan"]
                blocks.append(root["Shared Hit Blocks"] + root["Shared Read Blocks"])
            found[verb] = min(blocks)
    return found


def live_jobs(conn: Connection, store: Store) -> None:
    """Have jobs in each place, and a bell."""
    for options in ({}, {"delay": HOUR}):
        ids = [new_id() for _ in range(1000)]
        store.enqueue(conn, ids, ["{}"] * 1000, "greet", Options(**options).params)
    store.claim(conn, LANE, 0, 5, 1)
    store.arm(conn, ["bell"], 1, HOUR)


def test_r32_dead_rows_that_cannot_be_removed_cost_nothing(create_database, store) -> None:
    engine = make_database(create_database)
    with engine.begin() as conn:
        assert [hire(conn, store, HOUR), hire(conn, store, HOUR)] == [1, 2]
        live_jobs(conn, store)
    clean = touched(engine, asked_again_and_again(0))

    with pinned(engine):
        rows(engine, DEAD)
        floor = value(engine, "select last_value from sqlqueue.ready_seq_seq")
        with engine.begin() as conn:
            live_jobs(conn, store)
        dirty = touched(engine, asked_again_and_again(floor))
        walked = touched(engine, WALKS)
    engine.dispose()

    print(", ".join(f"{verb} {clean[verb]}, {dirty[verb]}" for verb in dirty), "blocks")
    for verb, count in walked.items():
        assert count > 5 * clean[verb], f"inconclusive: no dead rows lie before {verb}"
    assert {
        verb: (clean[verb], dirty[verb]) for verb in dirty if dirty[verb] > 2 * clean[verb]
    } == {}


@contextmanager
def pinned(engine: Engine) -> Iterator[None]:
    """Hold a snapshot, as a report or a dump does: what dies meanwhile cannot be removed."""
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as conn:
        conn.execute(text("select count(*) from sqlqueue.queue"))
        yield


def claims(folder: Path, began: float, ended: float) -> list[float]:
    """Return how many seconds each claim took that ended in this time."""
    lines = [line.split() for file in folder.iterdir() for line in file.read_text().splitlines()]
    return [
        float(took)
        for at, took in (line for line in lines if len(line) == 2)
        if began <= float(at) < ended
    ]


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_r32_ten_minutes_at_500_jobs_a_second_with_the_horizon_pinned(
    tmp_path, monkeypatch
) -> None:
    """Without autovacuum, which could remove nothing."""
    monkeypatch.setenv("SQLQUEUE_TEST_CLAIMS", str(tmp_path))
    seconds = float(os.environ.get("SQLQUEUE_PIN_SECONDS", "600"))
    with (
        migrated({"autovacuum": "off"}) as cluster,
        working(cluster.url, "load_timed") as queue,
    ):
        with Load(queue, rate=500) as load:
            wait(seconds / 20)  # while caches warm up
            clean_from = time.time()
            wait(seconds / 10)
            with pinned(queue.engine):
                pinned_from, offered = time.time(), load.sent
                wait(seconds)
                pinned_until, offered = time.time(), load.sent - offered
        dead, done = rows(queue.engine, DEAD_AND_DONE, low=pinned_from, high=pinned_until)[0]

    clean = claims(tmp_path, clean_from, pinned_from)
    held = claims(tmp_path, pinned_from, pinned_until)
    last = claims(tmp_path, pinned_until - seconds / 10, pinned_until)
    ratio = percentile(last, 99) / percentile(clean, 99)
    print(
        f"{dead} dead rows; claim p50 {percentile(clean, 50) * 1000:.2f} ms, p99"
        f" {percentile(clean, 99) * 1000:.2f} ms before the pin;"
        f" {percentile(last, 50) * 1000:.2f}, {percentile(last, 99) * 1000:.2f} ms at its end"
        f" ({ratio:.2f} x), {percentile(held, 99) * 1000:.2f} ms in all of it;"
        f" {done} of {offered} jobs done at {offered / seconds:.0f}/s"
    )
    assert offered >= 0.95 * 500 * seconds, "inconclusive: the load was not offered"
    assert dead > 400 * seconds, "inconclusive: there are no dead rows"
    assert done >= 0.95 * offered
    assert ratio <= 2


# R33: bloat

HOT = """
select sum(pg_total_relation_size(oid))
from pg_class
where relname in ('ready', 'waiting', 'scheduled', 'lease', 'doorbell')
"""


@pytest.mark.nightly
@pytest.mark.timeout(2400)
def test_r33_hot_tables_stay_small_through_a_million_jobs_and_a_pin() -> None:
    """At a depth of 1,000 at most; autovacuum runs as it does by default, once in a minute."""
    jobs = int(os.environ.get("SQLQUEUE_BLOAT_JOBS", "1000000"))
    with migrated({}) as cluster, working(cluster.url) as queue:
        sizes, began = [], time.monotonic()
        with Load(queue, rate=1500, batch=15, depth=950) as load:
            while load.sent < jobs:
                wait(10)
                sizes.append(int(value(queue.engine, HOT)))
            rate = jobs / (time.monotonic() - began)
            with pinned(queue.engine):
                wait(60)
                held = int(value(queue.engine, HOT))
            wait(300)
            after = int(value(queue.engine, HOT))

    settled = sizes[12 : len(sizes) // 2 + 6]  # from the third minute to half of the rest
    minutes = ", ".join(f"{size / 1e6:.1f}" for size in sizes[5::6])
    print(
        f"{jobs} jobs at {rate:.0f}/s: hot tables {minutes} MB, minute by minute;"
        f" {held / 1e6:.1f} after a minute's pin, {after / 1e6:.1f} five minutes later"
    )
    assert settled, "inconclusive: it did not last"
    assert sizes[-1] <= 1.1 * max(settled)
    assert held > sizes[-1], "inconclusive: the pin kept nothing"
    assert after <= 2 * sizes[-1]


# R34: an enqueue committed late, below the floor of its lane

MANY_DEAD = """
insert into sqlqueue.ready (job_id, due_at, priority, queue)
select gen_random_uuid(), now(), 0, 'default' from generate_series(1, 200000);
delete from sqlqueue.ready;
"""
STARTED = """
select job_id, extract(epoch from started_at) from sqlqueue.run where started_at is not null
"""


@pytest.fixture
def plain_queue(create_database) -> Iterator[Queue]:
    """A queue with a task that does nothing, in a database that is vacuumed by nobody."""
    queue = Queue(make_database(create_database))

    @queue.task(name="plain")
    async def plain(key: str) -> None: ...

    yield queue
    queue.engine.dispose()


def test_r34_a_job_committed_late_is_found_while_its_lane_is_busy(plain_queue) -> None:
    """Its place is below all that ran meanwhile, and above dead rows that a sweep walks over."""
    queue, engine = plain_queue, plain_queue.engine
    took = []
    with pinned(engine):
        rows(engine, MANY_DEAD)
        with queue.worker("default") as worker, Load(queue, rate=500) as load:
            for _ in range(3):
                with engine.connect() as conn:
                    late = queue.using(conn).send("plain", key="late")
                    sent = load.sent
                    wait_until(lambda until=sent + 500: load.sent > until, within=20)
                    floor = worker.lanes.floors[LANE].value
                    committed = time.time()
                    conn.commit()
                late.wait(SOON)
                took.append(late.started_at.timestamp() - committed)
                assert floor > 200_000 + sent, "inconclusive: the floor did not move"

    print(f"started {', '.join(f'{one:.2f}' for one in took)} s after their commit")
    assert max(took) < 2


def test_r34_a_slow_claim_hides_no_job() -> None:
    """What it saw is as old as its end: who enqueued beside it may commit a TRAIL later."""
    floor, row = Floor(), SimpleNamespace(seq=100)
    began = time.monotonic()
    wait(2 * TRAIL)
    floor.see([row], began)
    floor.see([], time.monotonic())
    assert floor.value == 0
    wait(TRAIL)
    floor.see([], time.monotonic())
    assert floor.value == 100


def test_r34_jobs_of_short_transactions_need_no_sweep(plain_queue) -> None:
    """Sixteen clients hold each transaction open for up to 20 ms; the only sweep is the first."""
    queue = plain_queue
    enqueued: dict[UUID, tuple[float, float]] = {}
    until = time.monotonic() + 3

    def enqueue_slowly(number: int) -> None:
        dice = random.Random(number)
        while time.monotonic() < until:
            with queue.engine.connect() as conn:
                began = time.time()
                job_id = queue.using(conn).send("plain", key="").id
                wait(dice.uniform(0, 0.02))
                conn.commit()
            enqueued[job_id] = (began, time.time())

    def have_started() -> bool:
        started.update({row[0]: float(row[1]) for row in rows(queue.engine, STARTED)})
        return short.keys() <= started.keys()

    started: dict[UUID, float] = {}
    with queue.worker("default", poll=HOUR), ThreadPoolExecutor(16) as threads:
        list(threads.map(enqueue_slowly, range(16)))
        # A busy machine makes some longer: those are for the sweep to find.
        short = {key: times for key, times in enqueued.items() if times[1] - times[0] < TRAIL}
        wait_until(have_started, what="the start of all jobs of short transactions")

    waits = [started[job_id] - committed for job_id, (_, committed) in short.items()]
    passed = 0  # jobs that were committed after a later one of the lane had started
    latest_first = sorted(short, key=lambda job_id: short[job_id][0], reverse=True)
    soonest = float("inf")
    for job_id in latest_first:
        passed += soonest < short[job_id][1]
        soonest = min(soonest, started[job_id])
    longer = len(enqueued) - len(short)
    print(f"{len(waits)} jobs, {passed} below others that had started; at most {max(waits):.3f} s")
    print(f"{longer} longer transactions")
    assert passed > 100, "inconclusive: nothing was committed late"
    assert longer < len(short) / 10, "inconclusive: few transactions were short"
    assert max(waits) < 1


# R35: readers and dumps


def read_and_hold(url: str, seconds: float, until: float, first: float) -> int:
    """Read history in one snapshot after another, each held for some seconds; return how many."""
    engine, count = create_engine(url, isolation_level="REPEATABLE READ"), 0
    wait(first)
    while time.monotonic() < until:
        with engine.connect() as conn:
            conn.execute(
                text("select count(*) from sqlqueue.job left join sqlqueue.run on job_id = id")
            )
            wait(seconds)
        count += 1
    engine.dispose()
    return count


def dump_again_and_again(cluster: Cluster, until: float) -> int:
    """Dump until then; return how often."""
    count = 0
    while time.monotonic() < until:
        cluster.dump()
        wait(3)
        count += 1
    return count


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_r35_readers_and_dumps_hold_up_nobody(tmp_path, monkeypatch) -> None:
    """Upkeep has partitions to make all the time; who waits for a lock for longer is logged."""
    monkeypatch.setenv("SQLQUEUE_TEST_CLAIMS", str(tmp_path))
    seconds = 60.0
    logs = {"log_lock_waits": "on", "deadlock_timeout": "60ms"}
    with migrated(logs) as cluster, working(cluster.url, "load_timed") as queue:
        store, said, took = Store(), [], []
        with Load(queue, rate=300), ThreadPoolExecutor(5) as threads:
            wait(10)
            clean_from = time.time()
            wait(seconds / 2)
            rows(queue.engine, FUTURE)
            read_from, until = time.time(), time.monotonic() + seconds
            reads = [threads.submit(read_and_hold, cluster.url, 8, until, 2 * n) for n in range(4)]
            dumps = threads.submit(dump_again_and_again, cluster, until)
            while time.monotonic() < until:
                wait(5)  # a worker does it every ten minutes
                began = time.monotonic()
                with queue.engine.begin() as conn:
                    said += store.tidy(conn)
                took.append(time.monotonic() - began)
            read_until = time.time()
            counts = [one.result() for one in (*reads, dumps)]
        waits = [line for line in cluster.log.splitlines() if "still waiting for" in line]

    clean, held = claims(tmp_path, clean_from, read_from), claims(tmp_path, read_from, read_until)
    ratio = percentile(held, 99) / percentile(clean, 99)
    print(
        f"{sum(counts[:4])} snapshots, {counts[4]} dumps; upkeep {len(took)} times, put off"
        f" {len(said)} times, at most {max(took) * 1000:.0f} ms; {len(waits)} waits over 60 ms;"
        f" claim p99 {percentile(clean, 99) * 1000:.1f} ms, then {percentile(held, 99) * 1000:.1f}"
        f" ({ratio:.2f} x)"
    )
    assert min(counts) > 1, "inconclusive: nobody read"
    assert any(line.startswith("postponed") for line in said), "inconclusive: nobody was in the way"
    assert waits == []
    assert ratio <= 2
