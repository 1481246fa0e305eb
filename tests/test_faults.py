"""Workers that die, stall and lose their connections: real signals on real process trees.

Clocks: beat 0.5 s, self-fence 2 s, ttl 3 s, poll 0.25 s.
"""

import asyncio
import os
import signal
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
    effects,
    is_stopped,
    outcomes,
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


def the_worker(engine: Engine, other_than: int = 0) -> int:
    """Wait for a live worker to register; return its id."""

    def registered() -> list[int]:
        return [number for number in workers(engine) if number != other_than]

    return wait_until(registered, within=20, what="a worker")[0]


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


def test_a_worker_stopped_for_longer_than_its_ttl_cannot_finish(queue, engine, migrated_url):
    """Its job runs elsewhere; when it goes on, its writes are rolled back."""
    written = "select count(*) from pg_stat_activity where query like 'insert into effect%'"
    job = queue.using(timeout=None).send("write", "paid", 2)
    with program(migrated_url, f"app.work(('default',), {CLOCKS | {'slots': 1}!r})") as stalled:
        first = the_worker(engine)
        wait_until(lambda: value(engine, written + " and state = 'idle in transaction'"))
        os.kill(stalled.pid, signal.SIGSTOP)

        with program(migrated_url, f"app.work(('default',), {CLOCKS!r})"):
            assert job.wait(timedelta(seconds=15)) == 2
            os.kill(stalled.pid, signal.SIGCONT)
            the_worker(engine, other_than=first)
            # It has found out and registered anew; and its transaction has come to an end.
            again = "select count(*) from sqlqueue.worker where pid = :pid and died_at is null"
            wait_until(lambda: value(engine, again, pid=stalled.pid), what="it to register anew")
            open_ = "select count(*) from pg_stat_activity where state = 'idle in transaction'"
            wait_until(lambda: value(engine, open_) == 0, what="the end of its transaction")

    assert effects(engine, "paid") == [2]
    assert outcomes(engine, job.id) == ["crashed", "succeeded"]


@pytest.mark.parametrize(
    ("verb", "task", "outcomes_"),
    [
        ("claim", "linger", ["succeeded"]),
        ("finish", "linger", ["crashed", "succeeded"]),
        ("finish", "write", ["crashed", "succeeded"]),
    ],
    ids=["claim", "finish", "finish of a transactional task"],
)
def test_a_worker_that_stalls_before_its_commit_hides_no_job(
    queue, engine, migrated_url, verb, task, outcomes_
):
    """Locked rows are passed by: the database ends the silent session, then others go on."""
    work = f"app.work(('default',), {CLOCKS!r})"
    with program(migrated_url, f"app.stop_after({verb!r}); {work}") as stalled:
        job = queue.send(task, "stalled", 0)
        wait_until(lambda: is_stopped(stalled.pid), within=20)
        began = monotonic()
        with program(migrated_url, work):
            job.wait(timedelta(seconds=TTL.total_seconds() + 10))
            took = monotonic() - began
            os.kill(stalled.pid, signal.SIGCONT)
            # It finds its session gone, registers anew and goes on.
            sql = "select count(*) from sqlqueue.worker where pid = :pid and died_at is null"
            wait_until(lambda: value(engine, sql, pid=stalled.pid), what="it to go on")

    print(f"{verb}: ran elsewhere after {took:.2f} s")
    assert took < TTL.total_seconds() + 5
    assert outcomes(engine, job.id) == outcomes_
    assert len(effects(engine, "stalled")) == (2 if (verb, task) == ("finish", "linger") else 1)


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
