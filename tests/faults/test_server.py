"""Bars R14 to R20: a server that crashes, fails over, ends sessions, and is full."""

import random
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from uuid import UUID

import pytest
from sqlalchemy import Engine, create_engine, make_url
from sqlalchemy.exc import DBAPIError

from sqlqueue import Queue, current_run
from sqlqueue.literal import new_id
from tests.faults.checker import assert_nothing_wrong, drained, judge
from tests.faults.cluster import Cluster
from tests.faults.conftest import prepare
from tests.faults.history import Enqueuers
from tests.faults.nemesis import Nemesis
from tests.faults.proxy import Proxy
from tests.harness import CLOCKS, SOON, is_alive, rows, tree, value, wait_until, workers

pytestmark = pytest.mark.alone

EFFECTS = "select count(*) from effect"
BOTH = ("write", "write_async")
SMALL = {"min_wal_size": "2MB", "max_wal_size": "4MB"}  # the log keeps no room in reserve
CLAIMED = (
    "select exists (select from sqlqueue.lease where claimed_at > :at)"
    " or exists (select from sqlqueue.run where started_at > :at)"
)


def seconds_to_claim(engine: Engine, within: float) -> float:
    """Wait for the next claim; return the seconds until then."""
    began, now = monotonic(), value(engine, "select clock_timestamp()")
    wait_until(lambda: value(engine, CLAIMED, at=now), within, "a claim")
    return monotonic() - began


@contextmanager
def two_workers(engine: Engine, url: str | None = None) -> Iterator[None]:
    """Have two worker processes, of which none may end by itself."""
    with tree(url or engine.url.render_as_string(hide_password=False), 2, slots=4):
        pids = wait_until(lambda: len(found := workers(engine).values()) == 2 and found, 20)
        yield
        assert all(is_alive(pid) for pid in pids), "a worker process has ended"


# R14

# What was acknowledged without having been flushed would be lost: nobody else flushes it soon.
LAZY = {"wal_writer_delay": "10s"}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("cluster", [LAZY], indirect=True, ids=["lazy"])
@pytest.mark.parametrize(
    ("seed", "crashes"),
    [
        pytest.param(14, 5, id="short"),
        pytest.param(1414, 20, id="long", marks=pytest.mark.nightly),
    ],
)
def test_r14_crashes_of_postgres_lose_no_acknowledged_job(cluster, seed, crashes) -> None:
    queue, engine = Queue(cluster.url), create_engine(cluster.url, pool_pre_ping=True)
    claims: list[float] = []
    with two_workers(engine):
        with Enqueuers(queue, seed=seed, rate=60, tasks=BOTH) as enqueuers:
            for _ in range(crashes):
                done = value(engine, EFFECTS)
                wait_until(lambda n=done: value(engine, EFFECTS) > n + 20, within=20)
                cluster.stop("immediate")
                cluster.start()
                claims.append(seconds_to_claim(engine, within=15))
        drained(engine)

    history = enqueuers.history
    jobs, recoveries = len(history.acknowledged), cluster.log.count("automatic recovery")
    print(
        f"seed {seed}: {jobs} jobs, {crashes} crashes, {history.repeated} commits repeated,"
        f" first claim after {max(claims):.2f} s at most"
    )
    assert recoveries == crashes, "inconclusive: it did not crash"
    assert history.repeated, "inconclusive: nobody was at work"
    assert max(claims) < 5
    assert_nothing_wrong(engine, history)


# R15

PAIRS, WINDOW = 7, 9.0  # of seconds without and with the fault


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_r15_sessions_that_are_ended_cost_less_than_half_of_the_throughput(private) -> None:
    seed = 15
    others = create_engine(private, connect_args={"application_name": "others"})
    sessions = (
        "from pg_stat_activity where datname = current_database() and application_name <> 'others'"
    )

    def end_one(dice: random.Random) -> str | None:
        number = dice.randrange(value(others, f"select count(*) {sessions}") or 1)
        terminate = f"select pg_terminate_backend(pid) {sessions} order by pid offset :n limit 1"
        return "a session" if rows(others, terminate, n=number) else None

    def rate() -> float:
        """Return the jobs per second of one window, with a backlog at all times."""
        done = "select count(*) from sqlqueue.run where outcome = 'succeeded'"
        began, before = monotonic(), value(others, done)
        while monotonic() < began + WINDOW:
            if value(others, "select count(*) from sqlqueue.ready") < 1000:
                bulk.enqueue_many(bulk.call("nothing", "{}", bulk.options) for _ in range(2000))
        return float(value(others, done) - before) / (monotonic() - began)

    bulk = Queue(others)
    pairs: list[tuple[float, float]] = []
    ended = 0
    with two_workers(others):
        with Enqueuers(Queue(private), seed=seed, rate=20) as enqueuers:
            for number in range(PAIRS):
                without = rate()
                with Nemesis(seed + number, {"end": end_one}, every=(0.2, 0.2)) as nemesis:
                    pairs.append((without, rate()))
                ended += nemesis.count("end")
        drained(others)

    half = statistics.median(during / without for without, during in pairs)
    rates = ", ".join(f"{without:.0f}/{during:.0f}" for without, during in pairs)
    took = f"{ended} sessions ended in {PAIRS * WINDOW:.0f} s"
    print(f"seed {seed}: {took}; throughput {half:.2f} of that without (jobs/s: {rates})")
    assert ended > 4 * PAIRS * WINDOW, "inconclusive: few sessions were ended"
    assert half >= 0.5
    assert judge(others, enqueuers.history).wrong().keys() <= {"half"}  # the backlog has no rows


# R16 and R17


def either(one: Cluster, other: Cluster) -> str:
    """Return the url of whichever of two servers takes writes."""
    places = [f"localhost:{url.port}" for url in (make_url(one.url), make_url(other.url))]
    query = {"host": places, "target_session_attrs": "read-write", "connect_timeout": "3"}
    url = make_url(one.url).set(host=None, port=None).update_query_dict(query)
    return url.render_as_string(hide_password=False)


def seconds_to_fail_over(old: Cluster, new: Cluster, proxy: Proxy) -> float:
    """Crash a server and promote its standby; return the seconds until the first claim there."""
    began = monotonic()
    old.stop("immediate")
    new.promote()
    proxy.lead_to(new.url)
    seconds_to_claim(create_engine(new.url), within=30)
    return monotonic() - began


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "leads",
    [
        pytest.param("a url of both", id="url"),
        pytest.param("a proxy", id="proxy", marks=pytest.mark.nightly),
    ],
)
def test_r16_the_promotion_of_a_synchronous_standby_loses_nothing(cluster, leads) -> None:
    with Proxy(cluster.url) as proxy, cluster.standby() as standby:
        cluster.synchronous()
        url = proxy.url if leads == "a proxy" else either(cluster, standby)
        old, new = create_engine(cluster.url), create_engine(standby.url)
        with two_workers(old, url):
            with Enqueuers(Queue(url), seed=16, rate=60, tasks=BOTH) as enqueuers:
                wait_until(lambda: value(old, EFFECTS) > 30, within=20, what="work")
                took = seconds_to_fail_over(cluster, standby, proxy)
                done = value(new, EFFECTS)
                wait_until(lambda: value(new, EFFECTS) > done + 30, within=20, what="work")
            drained(new)
        history = enqueuers.history
        assert history.repeated, "inconclusive: nobody was at work"
        assert_nothing_wrong(new, history)

    jobs, repeated = len(history.acknowledged), history.repeated
    print(
        f"{leads} leads to the new server: {jobs} jobs, {repeated} commits repeated;"
        f" first claim {took:.2f} s after the crash"
    )
    assert took < 15


@pytest.mark.nightly
@pytest.mark.timeout(120)
def test_r17_the_promotion_of_an_asynchronous_standby_loses_whole_transactions(cluster) -> None:
    """Of those that it had not been sent; application row, job and effect together."""
    with Proxy(cluster.url) as stream, cluster.standby(stream.url) as standby:
        url = either(cluster, standby)
        old, new = create_engine(cluster.url), create_engine(standby.url)
        sent = "select flush_lsn >= cast(:at as pg_lsn) from pg_stat_replication"
        with two_workers(old, url):
            with Enqueuers(Queue(url), seed=17, rate=60, tasks=BOTH) as enqueuers:
                wait_until(lambda: value(old, EFFECTS) > 30, within=20, what="work")
                safe = set(enqueuers.history.acknowledged)
                at = value(old, "select cast(pg_current_wal_flush_lsn() as text)")
                wait_until(lambda: value(old, sent, at=at), what="the standby to follow")
                stream.black_hole()
                known = len(enqueuers.history.acknowledged)
                wait_until(lambda: len(enqueuers.history.acknowledged) > known + 30, within=20)
                took = seconds_to_fail_over(cluster, standby, stream)
                done = value(new, EFFECTS)
                wait_until(lambda: value(new, EFFECTS) > done + 30, within=20, what="work")
            drained(new)
        wrong = judge(new, enqueuers.history).wrong()

    lost = wrong.pop("lost", set())
    jobs = len(enqueuers.history.acknowledged)
    print(f"{jobs} jobs, {len(lost)} lost; first claim {took:.2f} s after the crash")
    assert lost, "inconclusive: nothing was lost"
    assert not lost & safe
    assert wrong == {}
    assert took < 15


# R18

# Errors from one in a hundred statements on each table of the hot path. Counters are sequences:
# what a transaction took from them is not given back when it is rolled back.
BROKEN = """
    create sequence faults;
    create sequence fault_40001;
    create sequence "fault_40P01";
    create sequence fault_57014;
    create function break_down() returns trigger language plpgsql as $$
    begin
        case abs(hashint8extended(nextval('faults'), {seed})) % 100
        when 0 then
            perform nextval('fault_40001');
            raise exception 'injected' using errcode = '40001';
        when 1 then
            perform nextval('"fault_40P01"');
            raise exception 'injected' using errcode = '40P01';
        when 2 then
            perform nextval('fault_57014');
            perform pg_sleep(60);
        else
        end case;
        return null;
    end $$;
    create trigger broken before insert on sqlqueue.job execute function break_down();
    create trigger broken before insert on sqlqueue.ready execute function break_down();
    create trigger broken before insert on sqlqueue.lease execute function break_down();
    create trigger broken before insert on sqlqueue.run execute function break_down();
"""


def test_r18_errors_of_one_statement_in_a_hundred_are_tried_again_or_left_to_the_user(
    private,
) -> None:
    """Ours are tried again; the user's own transactions get the SQLSTATE."""
    seed, url = 18, make_url(private)
    engine = create_engine(url)
    rows(engine, BROKEN.format(seed=seed))
    rows(engine, f"alter database {url.database} set statement_timeout = '250ms'")
    engine.dispose()

    queue = Queue(private)
    with two_workers(engine):
        with Enqueuers(queue, seed=seed, rate=80, tasks=BOTH) as enqueuers:
            for _ in range(400):
                job_id = UUID(new_id())
                rows(engine, "insert into request values (:id)", id=job_id)
                queue.using(id=job_id).send("write", str(job_id))
                enqueuers.history.acknowledged.add(job_id)
            seen, states = enqueuers.history.errors, {"40001", "40P01", "57014"}
            wait_until(lambda: seen.keys() >= states, within=30, what="inconclusive: errors seen")
        drained(engine)

    injected = {one: value(engine, f'select last_value from "fault_{one}"') for one in states}
    print(f"seed {seed}: injected {injected}, of which users saw {dict(seen)}")
    assert min(injected.values()) >= 10, "inconclusive: few errors"
    assert seen.keys() == states
    assert_nothing_wrong(engine, enqueuers.history)


def test_r18_an_enqueue_is_given_up_after_five_retries(private) -> None:
    engine = create_engine(private)
    always = BROKEN.replace("% 100", "* 0").format(seed=18)
    rows(engine, always)

    with pytest.raises(DBAPIError) as raised:
        Queue(private).send("write")

    assert raised.value.orig.sqlstate == "40001"
    assert value(engine, "select last_value from fault_40001") == 6


# R19


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "seconds",
    [pytest.param(6, id="short"), pytest.param(30, id="long", marks=pytest.mark.nightly)],
)
def test_r19_no_job_is_rescued_while_there_is_no_connection_to_be_had(cluster, seconds) -> None:
    cluster.run("create role app login password 'app'")
    cluster.run("create database app owner app")
    url = make_url(cluster.url).set(username="app", password="app", database="app")
    prepare(url.render_as_string(hide_password=False))
    engine, runs, may_end = create_engine(url), [], threading.Event()
    sender = Queue(engine)
    queues = [Queue(create_engine(url)) for _ in range(2)]
    for queue in queues:

        @queue.task(name="patient")
        def patient() -> None:
            runs.append(current_run().number)
            assert may_end.wait(seconds + 30)

        @queue.task(name="quick")
        def quick() -> None: ...

    with queues[0].worker("default", **CLOCKS) as one, queues[1].worker("default", **CLOCKS) as two:
        ids = [one.id, two.id]
        jobs = [sender.send("patient") for _ in range(10)]
        wait_until(lambda: len(runs) == 10)
        cluster.run("alter role app connection limit 0")
        began = monotonic()
        for worker in (one, two):  # their heartbeats keep what they have
            worker.queue.engine.dispose()
            worker.link.cut()
            worker.upkeep.link.cut()
        waiting = [sender.send("quick") for _ in range(10)]
        threading.Event().wait(began + seconds - monotonic())
        assert not any(job.refresh().has_ended for job in waiting), "inconclusive: turns went on"

        cluster.run("alter role app connection limit -1")
        took = seconds_to_claim(engine, within=15)
        may_end.set()
        for job in (*jobs, *waiting):
            job.wait(SOON)
        assert [one.id, two.id] == ids

    refused = cluster.log.count("too many connections for role")
    print(f"{refused} connections refused in {seconds} s; first claim after {took:.2f} s")
    assert refused > seconds, "inconclusive: few connections were refused"
    assert runs == [1] * 10
    assert took < 5


# R20


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """The folder of a file system of 500 MB."""
    with tempfile.TemporaryDirectory(prefix="sqlqueue-disk-") as name:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500m", "tmpfs", name])
        assert mounted.returncode == 0, "inconclusive: only root can mount a small disk"
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "--lazy", name], check=True)


def fill(disk: Path) -> Path:
    """Leave no room on a disk; return the file that takes it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


@pytest.mark.nightly
@pytest.mark.timeout(180)
@pytest.mark.parametrize("what", ["tables", "everything"])
def test_r20_a_full_disk_loses_nothing_and_ends_no_worker(small_disk, what) -> None:
    """The server refuses, if its tables are there; if its log is there too, it crashes."""
    with Cluster(SMALL, small_disk) if what == "everything" else Cluster() as cluster:
        url = cluster.url
        if what == "tables":
            cluster.own(small_disk)
            cluster.run(f"create tablespace small location '{small_disk}'")
            cluster.run("create database app tablespace small")
            url = make_url(url).set(database="app").render_as_string(hide_password=False)
        prepare(url)
        queue, engine = Queue(url), create_engine(url, pool_pre_ping=True)
        with two_workers(engine):
            with Enqueuers(
                queue, seed=20, rate=60, tasks=BOTH, headers={"weight": "x" * 4000}
            ) as enqueuers:
                wait_until(lambda: value(engine, EFFECTS) > 30, within=20, what="work")
                filler = fill(small_disk)
                threading.Event().wait(30)
                known = enqueuers.history.repeated
                filler.unlink()
                if cluster.ended():
                    cluster.start()
                took = seconds_to_claim(engine, within=30)
            drained(engine)
        history, crashes = enqueuers.history, cluster.log.count("automatic recovery")
        assert_nothing_wrong(engine, history)

    errors = {state or "broken": count for state, count in history.errors.items()}
    print(
        f"{what}: {len(history.acknowledged)} jobs, {known} errors in 30 s: {errors},"
        f" {crashes} crashes of the server; first claim after {took:.2f} s"
    )
    assert known > 30, "inconclusive: the disk was not full"
    assert history.errors["53100"] or what == "everything"
    assert took < 10
