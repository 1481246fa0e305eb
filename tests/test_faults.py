"""Workers that die, stall and lose their connections: real signals on real process trees.

Clocks: beat 0.5 s, self-fence 2 s, ttl 3 s, poll 0.25 s.
"""

import asyncio
import threading
from datetime import timedelta
from time import monotonic

import pytest
from sqlalchemy import Engine

from sqlqueue import Retry
from tests.harness import (
    CLOCKS,
    SOON,
    TTL,
    application_table,
    program,
    rows,
    tree,
    value,
    wait_until,
    workers,
)

pytestmark = [pytest.mark.timeout(90), pytest.mark.alone]
BEAT = TTL.total_seconds() / 6


@pytest.fixture(autouse=True)
def table(engine: Engine) -> None:
    application_table(engine)


# Death


def test_a_suspect_runs_alone(queue, engine, migrated_url):
    """A job that has seen two workers die shares its process with no other."""
    suspect = queue.send("linger", "suspect", 0.5)
    sql = "update sqlqueue.ready set crashes = 2 where job_id = :id"
    rows(engine, sql, id=suspect.id)
    with tree(migrated_url, slots=5):
        others = [queue.send("linger", f"other {n}", 0.1) for n in range(10)]
        pids = {job.wait(SOON) for job in others}
        assert suspect.wait(timedelta(seconds=20)) not in pids


def test_an_embedded_worker_runs_a_suspect_when_all_else_has_ended(queue, engine):
    neighbours: list[set[int]] = []
    running: set[int] = set()

    @queue.task(name="share")
    def share(number: int) -> None:
        running.add(number)
        for _ in range(5):
            if number == 0:
                neighbours.append(running - {0})
            threading.Event().wait(0.01)
        running.discard(number)

    jobs = [share.enqueue(number) for number in range(6)]
    rows(engine, "update sqlqueue.ready set crashes = 2 where job_id = :id", id=jobs[0].id)
    with queue.worker("default", **CLOCKS, slots=6):
        for job in jobs:
            job.wait(SOON)

    assert neighbours == [set()] * 5


# Stalls


def test_a_worker_that_was_declared_dead_registers_anew_and_goes_on(queue, engine):
    @queue.task(name="fine")
    def fine() -> str:
        return "fine"

    with queue.worker("default", **CLOCKS) as worker:
        first = worker.id
        rows(engine, "update sqlqueue.worker set died_at = now() where id = :id", id=first)
        wait_until(lambda: worker.id != first, within=3, what="it to register anew")
        assert fine.enqueue().wait(SOON) == "fine"
        assert list(workers(engine)) == [worker.id]


def test_a_worker_that_cannot_beat_drops_what_it_holds(queue, engine):
    told, started = threading.Event(), threading.Event()

    @queue.task(name="patient")
    async def patient() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            told.set()

    with queue.worker("default", **CLOCKS) as worker:
        patient.enqueue()
        assert started.wait(10)
        with engine.begin() as conn:  # somebody holds its row: beats get no answer
            conn.exec_driver_sql("select from sqlqueue.worker for update")
            began = monotonic()
            assert told.wait(TTL.total_seconds()), "it did not fence itself"
            print(f"fenced itself after {monotonic() - began:.2f} s without a beat")
        first = worker.id
        worker.stop()
        worker.stop()
    assert first


# Connections


def test_a_worker_whose_connections_are_all_cut_goes_on(queue, engine):
    runs: list[int] = []
    may_end = threading.Event()

    @queue.task(name="through", retry=Retry(attempts=1))
    def through(number: int) -> None:
        assert may_end.wait(20)
        runs.append(number)

    cut = (
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where datname = current_database() and pid <> pg_backend_pid()"
    )
    with queue.worker("default", **CLOCKS, slots=4) as worker:
        first = worker.id
        jobs = [through.enqueue(number) for number in range(4)]
        wait_until(lambda: value(engine, "select count(*) from sqlqueue.lease") == 4)
        for _ in range(3):
            rows(engine, cut)
        may_end.set()
        rows(engine, cut)
        queue.engine.dispose()  # its pool does not know that its connections are gone
        later = [through.enqueue(number) for number in range(4, 8)]
        for job in (*jobs, *later):
            wait_until(lambda job=job: job.refresh().state == "succeeded", what=f"{job}")
        assert worker.id == first

    assert sorted(runs) == list(range(8))


def test_a_signal_that_reaches_another_thread_stops_a_worker_too(migrated_url) -> None:
    # Python calls a handler in the main thread, which the system does not wake for it then.
    code = (
        "import signal, threading;"
        f" worker = app.queue.worker('default', **{CLOCKS!r});"
        " signal.signal(signal.SIGTERM, lambda *_: worker.stop());"
        " raise_here = lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM);"
        " threading.Timer(0.5, raise_here).start();"
        " worker.run()"
    )
    with program(migrated_url, code) as process:
        assert process.wait(10) == 0
