"""How an idle worker hears of a job: the bell, and the poll that finds what no bell rang for."""

import logging
import threading
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine

from sqlqueue import Job, Queue, Task
from tests.faults.proxy import Proxy
from tests.harness import CLOCKS, SOON, rows, sleeps, value, wait_until

pytestmark = pytest.mark.alone

POLL = timedelta(seconds=1)
PATIENT = CLOCKS | {"poll": timedelta(seconds=20)}  # only a bell wakes it in time
LATE = 0.3  # seconds that a start may come after a poll


@pytest.fixture
def task(queue: Queue) -> Task[..., Any]:
    @queue.task(name="nothing")
    def nothing() -> None: ...

    return nothing


def waited(engine: Engine, job: Job[Any]) -> float:
    """Return the seconds from the enqueuing transaction to the claim, by the database's clock."""
    job.wait(SOON)
    sql = "select extract(epoch from started_at - created_at) from sqlqueue.jobs where id = :id"
    return float(value(engine, sql, id=job.id))


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
