"""How an idle worker hears of a job: the bell, and the poll that finds what no bell rang for."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import NotSupportedError

from sqlqueue import Job, Queue, Task
from sqlqueue.embedded import Server
from sqlqueue.integrations.alembic import migrate
from tests.faults.proxy import Proxy
from tests.harness import CLOCKS, SOON, rows, value, wait_until

pytestmark = pytest.mark.alone

POLL = timedelta(seconds=1)
PATIENT = CLOCKS | {"poll": timedelta(seconds=20)}  # only a bell wakes it in time
LATE = 0.3  # seconds that a start may come after a poll


@pytest.fixture
def task(queue: Queue) -> Task[..., Any]:
    @queue.task(name="nothing")
    def nothing() -> None: ...

    return nothing


def sleeps(engine: Engine) -> None:
    """Wait until a worker has hung its bell, and has had the time to fall asleep."""
    wait_until(lambda: value(engine, "select count(*) from sqlqueue.doorbell"), what="a bell")
    threading.Event().wait(0.1)


def waited(engine: Engine, job: Job[Any]) -> float:
    """Return the seconds from the enqueuing transaction to the claim, by the database's clock."""
    job.wait(SOON)
    sql = "select extract(epoch from started_at - created_at) from sqlqueue.jobs where id = :id"
    return float(value(engine, sql, id=job.id))


@contextmanager
def listening(engine: Engine) -> Iterator[Any]:
    """Give a function that returns the notifications since it was last called."""
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("listen sqlqueue")
        end = "0 echo end of the test's notifications"

        def heard() -> list[str]:
            conn.execute("select pg_notify('sqlqueue', %s)", (end,))
            found: list[str] = []
            for one in conn.notifies(timeout=10):
                if one.payload == end:
                    break
                found.append(one.payload)
            return [payload for payload in found if " echo " not in payload]

        yield heard


# The bell


def test_a_job_wakes_an_idle_worker(engine, queue, task):
    with queue.worker("default", **PATIENT):
        took = []
        for _ in range(5):
            sleeps(engine)
            took.append(waited(engine, task.enqueue()))

    print(f"started after {[f'{one * 1000:.1f} ms' for one in took]}")
    assert max(took) < 0.5


def test_one_of_several_idle_workers_is_woken_and_the_rest_wake_for_more(engine, queue):
    """Whoever answers the bell and fills its slots passes it on."""
    running, may_end = threading.Semaphore(0), threading.Event()

    @queue.task(name="hold")
    def hold() -> None:
        running.release()
        assert may_end.wait(10)

    workers = [queue.worker("default", **PATIENT, slots=1) for _ in range(3)]
    for worker in workers:
        worker.start()
    wait_until(lambda: all(w.listener.is_heard for w in workers))
    sleeps(engine)
    queue.enqueue_many(hold.s() for _ in range(3))
    try:
        for _ in range(3):
            assert running.acquire(timeout=3), "a job waits while a worker sleeps"
    finally:
        may_end.set()
        for worker in workers:
            worker.stop()
            worker.join()


def test_nobody_rings_unless_a_worker_sleeps(engine, queue, task):
    may_end = threading.Event()

    @queue.task(name="hold")
    def hold() -> None:
        assert may_end.wait(20)

    with listening(engine) as heard, queue.worker("default", **CLOCKS, slots=1):
        hold.enqueue()
        wait_until(lambda: value(engine, "select count(*) from sqlqueue.lease"))
        heard()
        for _ in range(20):
            task.enqueue()
        assert heard() == []

        may_end.set()
        wait_until(lambda: value(engine, "select count(*) from sqlqueue.live") == 0)
        sleeps(engine)
        task.enqueue()
        assert len(heard()) == 1


def test_the_bell_of_a_dead_worker_rings_no_more(engine, queue, task):
    with listening(engine) as heard:
        bell = "insert into sqlqueue.doorbell values ('default', now() - interval '1 ms', 7)"
        rows(engine, bell)
        task.enqueue()
        assert heard() == []


def test_strange_notifications_are_ignored(engine, queue, task):
    with queue.worker("default", **PATIENT):
        sleeps(engine)
        for payload in ("", "hello", "0", "0 x default", "x 1 default", "0 1000 default"):
            rows(engine, "select pg_notify('sqlqueue', :payload)", payload=payload)
        sleeps(engine)
        assert waited(engine, task.enqueue()) < 0.5


def test_a_worker_listens_again_after_its_connection_was_cut(engine, queue, task):
    cut = "select pg_terminate_backend(pid) from pg_stat_activity where query = 'listen sqlqueue'"
    with queue.worker("default", **PATIENT) as worker:
        sleeps(engine)
        rows(engine, cut)
        wait_until(lambda: not worker.listener.is_heard)
        wait_until(lambda: worker.listener.is_heard)
        sleeps(engine)
        assert waited(engine, task.enqueue()) < 0.5


# The poll


@pytest.mark.parametrize("why", ["deaf", "silent", "old snapshot"])
def test_a_missed_ring_costs_at_most_one_poll(engine, queue, task, why):
    """The worker does not listen; nobody rings; or the enqueuer does not see the fresh bell."""
    options = CLOCKS | {"poll": POLL, "listen": why != "deaf"}
    took = []
    with engine.connect() as conn, queue.worker("default", **options) as worker:
        for lane, pause in enumerate((0, 0.7)):  # in a lane that it has not seen yet
            turns = worker.progress
            if why == "old snapshot":
                rows(engine, "delete from sqlqueue.doorbell")
                conn.execution_options(isolation_level="REPEATABLE READ")
                conn.execute(text("select 1"))
            wait_until(lambda until=turns + pause: worker.progress > until)
            if why != "deaf":
                sleeps(engine)
            if why == "silent":
                conn.execute(text("set local sqlqueue.ring = 'off'"))
            job = task.using(conn, priority=lane).enqueue()
            committed = value(engine, "select clock_timestamp()")
            conn.commit()
            job.wait(SOON)
            took.append((job.started_at - committed).total_seconds())

    print(f"{why}: started after {[f'{one:.2f} s' for one in took]}")
    assert max(took) < POLL.total_seconds() + LATE


def test_a_job_committed_late_is_found_while_its_lane_is_busy(engine, queue, task):
    """Its place is below all that ran meanwhile: the floor of the lane must not hide it."""
    with engine.connect() as conn, queue.worker("default", **CLOCKS | {"poll": POLL}):
        late = task.using(conn).enqueue()
        end = monotonic() + 2
        while monotonic() < end:
            queue.enqueue_many(task.s() for _ in range(10))
            threading.Event().wait(0.02)
        committed = value(engine, "select clock_timestamp()")
        conn.commit()
        busy = threading.Event()

        def keep_busy() -> None:
            while not busy.wait(0.02):
                queue.enqueue_many(task.s() for _ in range(10))

        thread = threading.Thread(target=keep_busy)
        thread.start()
        try:
            late.wait(SOON)
        finally:
            busy.set()
            thread.join()

    took = (late.started_at - committed).total_seconds()
    print(f"started {took:.2f} s after its commit")
    assert took < 2


def test_a_worker_behind_a_pooler_polls(engine, migrated_url, caplog):
    caplog.set_level(logging.INFO)
    with Proxy(migrated_url, drops_notifications=True) as pooler:
        queue = Queue(pooler.url)

        @queue.task(name="nothing")
        def nothing() -> None: ...

        with queue.worker("default", **CLOCKS | {"poll": POLL}):
            wait_until(lambda: "hears no notification" in caplog.text)
            took = [waited(engine, nothing.enqueue()) for _ in range(3)]
            assert value(engine, "select count(*) from sqlqueue.doorbell") == 0
        queue.engine.dispose()

    print(f"polling: started after {[f'{one:.2f} s' for one in took]}")
    assert max(took) < POLL.total_seconds() + LATE


def test_an_enqueue_that_does_not_ring_can_be_prepared_for_two_phase_commit():
    with Server(durable=False, settings={"max_prepared_transactions": "2"}) as server:
        engine = create_engine(server.create_database("prepared"))
        migrate(engine)
        queue = Queue(engine)

        @queue.task(name="nothing")
        def nothing() -> None: ...

        with queue.worker("default", **CLOCKS | {"poll": POLL}):
            sleeps(engine)
            with engine.connect() as conn:
                nothing.using(conn).enqueue()
                with pytest.raises(NotSupportedError, match="PREPARE a transaction that"):
                    conn.exec_driver_sql("prepare transaction 'loud'")
            with engine.connect() as conn:
                conn.execute(text("set local sqlqueue.ring = 'off'"))
                job = nothing.using(conn).enqueue()
                conn.exec_driver_sql("prepare transaction 'quiet'")
            with queue.autocommit() as conn:
                committed = value(engine, "select clock_timestamp()")
                conn.exec_driver_sql("commit prepared 'quiet'")
            job.wait(SOON)
            assert (job.started_at - committed).total_seconds() < POLL.total_seconds() + LATE
        engine.dispose()
