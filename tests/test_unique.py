"""Unique keys: of jobs with the same key only one exists at a time."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, text

from sqlqueue import DuplicateJob, IdOutOfRange, Job, Queue, Retry, Unique, UniqueKeyBusy
from tests.harness import POLLING, SOON, load_app, program, rows, value, wait_until, work

SECOND = timedelta(seconds=1)
UNENDED = "select count(*) from sqlqueue.live"


def greeter(queue: Queue, unique: Unique, **options: Any) -> Any:
    @queue.task(name="greet", unique=unique, **options)
    def greet(name: str, times: int = 1) -> None: ...

    return greet


# What is the same


def test_the_same_arguments_make_one_job(queue, engine) -> None:
    greet = greeter(queue, Unique())

    first, same, other = greet.enqueue("a"), greet.enqueue(name="a"), greet.enqueue("b")

    assert same.id == first.id != other.id
    assert value(engine, UNENDED) == 2


@pytest.mark.parametrize(
    ("unique", "jobs"),
    [(Unique(by=("name",)), 2), (Unique(by=()), 1), (Unique(key="the one"), 1), (Unique(), 3)],
)
def test_the_key_is_made_of_what_was_chosen(queue, engine, unique, jobs) -> None:
    greet = greeter(queue, unique)

    greet.enqueue("a", 1)
    greet.enqueue("a", 2)
    greet.enqueue("b", 1)

    assert value(engine, UNENDED) == jobs


def test_many_at_once_make_one_job_for_each_key(queue, engine) -> None:
    greet = greeter(queue, Unique())
    greet.enqueue("a")

    assert queue.enqueue_many(greet.s(name) for name in "abcabc") == 2
    assert value(engine, UNENDED) == 3


@pytest.mark.parametrize("wrong", [{"until": "never"}, {"on_conflict": "x"}, {"by": "name"}])
def test_a_rule_that_makes_no_sense_is_refused(wrong) -> None:
    with pytest.raises((ValueError, TypeError)):
        Unique(**wrong)


# For how long


def test_the_key_is_free_once_the_job_has_ended(queue, engine) -> None:
    greet = greeter(queue, Unique())
    first = greet.enqueue("a")
    work(queue)

    assert greet.enqueue("a").id != first.id


@pytest.mark.parametrize(("until", "are_same"), [("ended", True), ("started", False)])
def test_a_running_job_holds_its_key_until_it_has_ended(queue, until, are_same) -> None:
    has_begun, may_end = threading.Event(), threading.Event()

    @queue.task(unique=Unique(until=until))
    def slow() -> None:
        has_begun.set()
        may_end.wait(10)

    first = slow.enqueue()
    with queue.worker():
        assert has_begun.wait(10)
        second = slow.enqueue()
        may_end.set()
        second.wait(10 * SECOND)

    assert (second.id == first.id) is are_same


def test_a_job_that_waits_for_its_retry_holds_its_key(queue, engine) -> None:
    @queue.task(unique=Unique(), retry=Retry(waits=[timedelta(hours=1)]))
    def fail() -> None:
        raise ValueError

    first = fail.enqueue()
    queue.worker(max_jobs=1).run()

    assert first.refresh().state == "scheduled"
    assert fail.enqueue().id == first.id


def test_within_the_period_an_ended_job_holds_its_key(queue, engine) -> None:
    greet = greeter(queue, Unique(period=timedelta(hours=1)))
    first = greet.enqueue("a")
    work(queue)

    assert greet.enqueue("a").id == first.id
    rows(engine, "update sqlqueue.unique_claim set lasts_until = now()")
    assert greet.enqueue("a").id != first.id


def test_an_operator_cannot_retry_a_job_whose_key_is_taken(queue, engine) -> None:
    greet = greeter(queue, Unique())
    first = greet.enqueue("a")
    first.cancel()
    second = greet.enqueue("a")

    assert not first.retry()
    assert first.refresh().state == "cancelled"

    second.cancel()
    assert first.retry()
    assert first.refresh().state == "ready"
    assert greet.enqueue("a").id == first.id


# On conflict


def test_a_second_job_can_be_an_error(queue, engine) -> None:
    greet = greeter(queue, Unique(on_conflict="raise"))
    first = greet.enqueue("a")

    with queue.engine.begin() as conn:
        conn.execute(text("create table if not exists mine (n integer)"))
        with pytest.raises(DuplicateJob, match=str(first.id)) as error:
            greet.using(conn).enqueue("a")
        conn.execute(text("drop table mine"))  # the transaction can go on

    assert error.value.job_id == first.id
    assert value(engine, UNENDED) == 1


def test_a_second_job_can_replace_the_first(queue, engine) -> None:
    greet = greeter(queue, Unique(by=(), on_conflict="replace"))
    first = greet.enqueue("a")

    second = greet.enqueue("b")

    assert first.refresh().state == "cancelled"
    assert second.refresh().state == "ready"


def test_a_running_job_that_is_replaced_is_cancelled(queue) -> None:
    has_begun = threading.Event()

    @queue.task(unique=Unique(by=(), on_conflict="replace"))
    async def wait(name: str) -> str:
        if name == "a":
            has_begun.set()
            await asyncio.Event().wait()
        return name

    first = wait.enqueue("a")
    with queue.worker():
        assert has_begun.wait(10)
        second = wait.enqueue("b")
        assert second.wait(10 * SECOND) == "b"
        wait_until(lambda: first.refresh().state == "cancelled")


def test_debouncing_puts_the_job_off_but_not_for_ever(queue, engine) -> None:
    greet = greeter(
        queue,
        Unique(on_conflict="debounce", longest=timedelta(minutes=3)),
        delay=timedelta(minutes=2),
    )
    first = greet.enqueue("a")
    due = "select round(extract(epoch from due_at - now())) from sqlqueue.scheduled"
    rows(engine, "update sqlqueue.scheduled set due_at = due_at - interval '1 minute'")

    assert greet.enqueue("a").id == first.id
    assert 119 <= value(engine, due) <= 120
    rows(engine, "update sqlqueue.unique_claim set taken_at = now() - interval '2 minutes'")
    greet.enqueue("a")
    assert 59 <= value(engine, due) <= 60


def test_debouncing_needs_a_delay(queue) -> None:
    with pytest.raises(ValueError, match="delay"):
        greeter(queue, Unique(on_conflict="debounce"))


# Transactions


def test_a_job_that_was_rolled_back_holds_no_key(queue, engine) -> None:
    greet = greeter(queue, Unique())
    with queue.engine.connect() as conn, conn.begin() as transaction:
        gone = greet.using(conn).enqueue("a")
        transaction.rollback()

    assert greet.enqueue("a").id != gone.id


def test_a_refused_enqueue_takes_no_key(queue, engine) -> None:
    greet = greeter(queue, Unique())
    old = Job(queue, "018f0000-0000-7000-8000-000000000000").id

    with pytest.raises(IdOutOfRange):
        greet.using(id=old).enqueue("a")

    assert value(engine, "select count(*) from sqlqueue.unique_claim") == 0


def test_r31_waiting_for_a_stranger_ends_in_a_typed_error(queue, engine) -> None:
    greet = greeter(queue, Unique())
    with queue.engine.connect() as stranger, stranger.begin():
        theirs = greet.using(stranger).enqueue("a")
        with queue.engine.begin() as conn:
            with pytest.raises(UniqueKeyBusy):
                greet.using(conn).enqueue("a")
            assert greet.using(conn).enqueue("b").id  # the transaction can go on
        stranger.commit()

    assert greet.enqueue("a").id == theirs.id


def test_r31_no_turn_waits_for_a_key_that_a_stranger_holds(queue, engine) -> None:
    # Not where the job that has the key is claimed and ends, nor where one that has ended had it.
    greet = greeter(queue, Unique())
    first = greet.enqueue("a")
    with queue.engine.connect() as stranger, stranger.begin():
        stranger.execute(text("select * from sqlqueue.unique_claim for update"))
        with queue.worker(**POLLING):
            first.wait(SOON)
            greet.using(unique=None).enqueue("a").wait(SOON)
        waited = (
            "select count(*) from pg_stat_activity"
            " where datname = current_database() and wait_event_type = 'Lock'"
        )
        assert value(engine, waited) == 0
        with pytest.raises(UniqueKeyBusy):
            greet.enqueue("a")

    assert greet.enqueue("a").id != first.id


def unended_twice(engine: Engine) -> list[Any]:
    """The keys that more than one unended job has."""
    return rows(
        engine,
        "select live.unique_key from sqlqueue.job join sqlqueue.live using (id)"
        " group by live.unique_key having count(*) > 1",
    )


def test_r31_a_unique_key_has_one_unended_job(queue, engine, migrated_url) -> None:
    # Transactions that commit, roll back and are killed, while a worker ends the jobs there are.
    greet = greeter(queue, Unique())
    seen: list[Any] = []
    ended: set[Any] = set()

    def enqueue(number: int) -> None:
        for turn in range(25):
            try:
                with queue.engine.connect() as conn, conn.begin() as transaction:
                    job = greet.using(conn).enqueue("a")
                    way = (number + turn) % 4
                    if way == 0:
                        transaction.rollback()
                    elif way == 1:
                        conn.connection.driver_connection.pgconn.finish()
                    else:
                        transaction.commit()
                        ended.add(job.id)
            except (UniqueKeyBusy, psycopg.Error, Exception) as error:
                if not isinstance(error, UniqueKeyBusy) and "closed" not in str(error):
                    seen.append(error)
            seen.extend(unended_twice(engine))

    with queue.worker(poll=timedelta(seconds=0.25)), ThreadPoolExecutor(16) as pool:
        list(pool.map(enqueue, range(16)))
        wait_until(lambda: value(engine, UNENDED) == 0)

    assert seen == []
    assert len(ended) > 1
    assert value(engine, "select count(*) from sqlqueue.job") >= len(ended)


def test_r31_a_unique_key_has_one_unended_job_though_processes_die_over_it(engine, migrated_url):
    app = load_app(migrated_url)
    twice: list[Any] = []
    code = "import sys; sys.exit(app.enqueue_in_many_processes(16, 6) < 10)"

    with app.queue.worker(**POLLING), program(migrated_url, code) as process:
        while process.poll() is None:
            twice += unended_twice(engine)
        wait_until(lambda: value(engine, UNENDED) == 0)
    app.queue.engine.dispose()

    assert process.returncode == 0, "inconclusive: hardly any process died"
    assert twice == []
    assert value(engine, "select count(*) from sqlqueue.job") > 10


def test_a_key_that_nobody_has_taken_for_long_is_forgotten_unless_it_is_held(queue, engine) -> None:
    greet = greeter(queue, Unique())
    for name in "ab":
        greet.enqueue(name)
    work(queue)
    held = greet.enqueue("c")
    rows(engine, "update sqlqueue.unique_claim set taken_at = now() - interval '31 days'")
    again = greet.enqueue("b")

    with engine.begin() as conn:
        assert "forgot 1 unique keys" in queue.store.tidy(conn)

    kept = {row[0] for row in rows(engine, "select job_id from sqlqueue.unique_claim")}
    assert kept == {held.id, again.id}
