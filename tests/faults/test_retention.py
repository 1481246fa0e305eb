"""Bar R36: partitions that are dropped or missing take no job with them that has not ended."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection, Engine, create_engine, text

from sqlqueue import IdOutOfRange, Options
from sqlqueue.integrations.alembic import migrate
from sqlqueue.store import Ended, Lane, Store
from tests.test_store import (
    SECOND,
    add,
    claim,
    claimed_ids,
    hire,
    ids_in,
    job_of,
    let_pass,
    rows,
)  # fmt: skip

LONG_AGO = timedelta(days=60)


@pytest.fixture
def old(create_database: Callable[[], str]) -> Iterator[Engine]:
    """A database that keeps history for 100 days, with partitions for it."""
    engine = create_engine(create_database())
    migrate(engine)
    with engine.begin() as conn:
        conn.execute(text("update sqlqueue.setting set retention = interval '100 days'"))
        Store().tidy(conn)
    yield engine
    engine.dispose()


def id_at(conn: Connection, ago: timedelta) -> str:
    """A new id as it would have been made some time ago."""
    low = conn.scalar(text("select sqlqueue.uuid_at(now() - :ago)"), {"ago": ago})
    return str(low)[:-12] + uuid4().hex[-12:]


def add_at(conn: Connection, store: Store, ago: timedelta, **options: Any) -> str:
    """Enqueue a job with an id of some time ago."""
    job_id = id_at(conn, ago)
    store.enqueue(conn, [job_id], ["{}"], "greet", Options(**options).params)
    return job_id


def forget(conn: Connection, store: Store, days: int) -> list[str]:
    """Shorten the retention and tidy; return what tidy said."""
    statement = "update sqlqueue.setting set retention = make_interval(days => :days)"
    conn.execute(text(statement), {"days": days})
    return store.tidy(conn)


def days_of(conn: Connection, parent: str) -> list[Any]:
    """The Mondays that the partitions begin at."""
    statement = (
        "select to_date(right(relname, 8), 'YYYYMMDD') from pg_inherits join pg_class"
        " on oid = inhrelid where inhparent = cast(:parent as regclass) and relname ~ '[0-9]{8}$'"
        " order by 1"
    )
    return list(conn.scalars(text(statement), {"parent": f"sqlqueue.{parent}"}))


WEEK = timedelta(weeks=1)
PLACES = ("ready", "waiting", "scheduled", "lease")
LANES = ("retried", "failed", "snoozed", "returned")


@pytest.mark.parametrize("parent", ["job", "run"])
def test_r36_partitions_are_there_eight_weeks_ahead(old, store, parent) -> None:
    with old.connect() as conn:
        days = days_of(conn, parent)
        today = conn.scalar(text("select cast(now() at time zone 'UTC' as date)"))

    assert all(day.weekday() == 0 for day in days)
    assert [b - a for a, b in pairwise(days)] == [WEEK] * (len(days) - 1)
    assert days[-1] >= today + 7 * WEEK
    assert days[0] <= today - (timedelta(days=100) if parent == "job" else WEEK)


def test_r36_history_older_than_the_retention_is_dropped(old, store) -> None:
    with old.begin() as conn:
        kept, dropped = (add_at(conn, store, timedelta(days=days)) for days in (20, 60))
        claim(conn, store, hire(conn, store))
        store.finish(conn, [Ended(job_id, 1, "succeeded") for job_id in (kept, dropped)])
        conn.execute(
            text(
                "select sqlqueue.keep_partition('run', 'run_20200106', '2020-01-06', '2020-01-13')"
            )
        )
        conn.execute(
            text("update sqlqueue.run set ended_at = '2020-01-07' where job_id = :id"),
            {"id": dropped},
        )

    with old.begin() as conn:
        said = forget(conn, store, days=30)
        assert "dropped run_20200106" in said
        assert len(said) > 10
        assert all(line.startswith("dropped ") for line in said)
        assert [str(job["id"]) for job in rows(conn, "job")] == [kept]
        assert ids_in(conn, "run") == [kept]
        assert store.jobs(conn, [dropped], [True]) == {dropped: None}
        assert store.tidy(conn) == []


def test_r36_retention_never_drops_a_live_job(old, store) -> None:
    """Wherever it is: leased, ready, retried by an operator, waiting, or scheduled in some way."""
    with old.begin() as conn:
        worker = hire(conn, store)
        store.set_policy(conn, "queue", "limited", '{"concurrency": 1}')

        def leased(lane: str) -> str:
            job_id = add_at(conn, store, LONG_AGO, queue=lane)
            assert claimed_ids(conn, store, worker, lane=Lane(lane, 0)) == [job_id]
            return job_id

        ended = leased("ended")
        retried = leased("retried")
        failed = leased("failed")
        snoozed = leased("snoozed")
        returned = leased("returned")
        held = leased("held")
        store.finish(
            conn,
            [
                Ended(ended, 1, "succeeded"),
                Ended(retried, 1, "failed"),
                Ended(failed, 1, "failed", SECOND),
                Ended(snoozed, 1, "snoozed", SECOND),
                Ended(returned, 1, "returned", timedelta(0)),
            ],
        )
        assert store.retry(conn, retried)
        waiting = {add_at(conn, store, LONG_AGO, queue="limited") for _ in range(2)}
        assert [row.moved for row in store.admit(conn, "limited", 10) if row.moved] == [1]
        ready = add_at(conn, store, LONG_AGO)
        scheduled = add_at(conn, store, LONG_AGO, delay=SECOND)
        live = {retried, failed, snoozed, returned, held, ready, scheduled} | waiting
        places = {table: len(rows(conn, table)) for table in PLACES}
        assert places == {"ready": 4, "waiting": 1, "scheduled": 3, "lease": 1}

    with old.begin() as conn:
        dropped = forget(conn, store, days=30)
        assert any(line.startswith("dropped job_") for line in dropped)
        assert {str(job["id"]) for job in rows(conn, "job_default")} == live
        assert store.tidy(conn) == []
        assert {str(job["id"]) for job in rows(conn, "job")} == live
        assert {table: len(rows(conn, table)) for table in PLACES} == places

    with old.begin() as conn:
        let_pass(conn, SECOND)
        store.promote(conn, None, 10)
        done = {held}
        assert store.finish(conn, [Ended(held, 1, "succeeded")]) == {held}
        while len(done) < len(live):
            store.admit(conn, "limited", 10)
            lanes = store.lanes(conn, "limited", [], False)
            for lane in (*lanes, *(Lane(name, 0) for name in ("default", *LANES))):
                for row in claim(conn, store, worker, lane=lane):
                    assert row.task == "greet"
                    done |= store.finish(conn, [Ended(row.job_id, row.run, "succeeded")])
        assert done == live
        store.tidy(conn)
        assert rows(conn, "job") == []
    print(f"{len(dropped)} partitions dropped, {len(live)} live jobs in {len(PLACES)} places")


def test_r36_strays_are_refused_and_old_ids_are_kept(old, store) -> None:
    """An id from before the retention or from after tomorrow would lie in no partition."""
    with old.begin() as conn:
        forget(conn, store, days=30)
        for ago in (timedelta(days=31), LONG_AGO, -timedelta(days=2)):
            with pytest.raises(IdOutOfRange):
                add_at(conn, store, ago)
        kept = [add_at(conn, store, ago) for ago in (timedelta(days=29), -timedelta(hours=23))]
        store.tidy(conn)
        assert rows(conn, "job_default") == []
        assert claimed_ids(conn, store, hire(conn, store)) == kept


def test_r36_a_job_whose_row_is_gone_is_claimed_and_rescued_as_any_other(old, store) -> None:
    """Somebody has dropped a partition by hand. A claim makes a lease for each row it takes."""
    with old.begin() as conn:
        claimed, left = add(conn, store, 2)
        conn.execute(text("delete from sqlqueue.job"))
        dead, worker = hire(conn, store), hire(conn, store)
        assert claimed_ids(conn, store, dead, slots=1) == [claimed]
        assert ids_in(conn, "lease") == [claimed]

        assert [one.job_id for one in store.rescue(conn, 10, seen_dead=dead)] == [claimed]

        found = claim(conn, store, worker)
        assert {row.job_id for row in found} == {left}
        assert [row.task for row in found] == [None]
        assert set(ids_in(conn, "lease")) == {left}
        final = {str(run["job_id"]): run["is_final"] for run in rows(conn, "run")}
        assert final == {claimed: True}


def test_r36_a_partition_in_use_is_dropped_another_time(old, store) -> None:
    with old.begin() as conn:
        live = add_at(conn, store, LONG_AGO)

    with old.connect() as reader, old.begin() as conn:
        reader.execute(text("select count(*) from sqlqueue.job"))
        said = forget(conn, store, days=30)
        assert len(said) == 1
        assert said[0].startswith("postponed job_")
        reader.rollback()
        assert any(line.startswith("dropped job_") for line in store.tidy(conn))
        assert job_of(conn, store, live).state == "ready"


def test_r36_a_partition_that_cannot_be_made_now_is_made_another_time(old, store) -> None:
    """As long as a dump reads the default partition; all else is tidied, and nothing is lost."""
    with old.begin() as conn:
        missing = f"job_{days_of(conn, 'job')[-9]:%Y%m%d}"  # of this week
        conn.execute(text(f"drop table sqlqueue.{missing}"))
        worker = hire(conn, store)
        live, ended = add(conn, store, 2)
        claim(conn, store, worker)
        store.finish(conn, [Ended(ended, 1, "succeeded")])
        store.unregister(conn, hire(conn, store))
        conn.execute(text("update sqlqueue.worker set died_at = died_at - interval '2 days'"))

    with old.connect() as reader, old.begin() as conn:
        reader.execute(text("select count(*) from sqlqueue.job, sqlqueue.run"))
        assert [line.split(":")[0] for line in store.tidy(conn)] == [f"postponed {missing}"]
        assert {str(job["id"]) for job in rows(conn, "job_default")} == {live, ended}
        assert [one["id"] for one in rows(conn, "worker")] == [worker]
        reader.rollback()
        assert store.tidy(conn) == []
        assert {str(job["id"]) for job in rows(conn, missing)} == {live, ended}


def test_r36_a_partition_with_many_live_jobs_is_kept(old, store) -> None:
    with old.begin() as conn:
        ids = [id_at(conn, LONG_AGO) for _ in range(2)]
        ids = [f"{ids[0][:24]}{n:012x}" for n in range(10_001)]
        store.enqueue(conn, ids, ["{}"] * len(ids), "greet", Options().params)

    with old.begin() as conn:
        kept = [line for line in forget(conn, store, days=30) if not line.startswith("dropped")]
        assert len(kept) == 1
        assert "10001 live jobs" in kept[0]
        assert conn.scalar(text("select count(*) from sqlqueue.job")) == 10_001
        assert conn.scalar(text("select count(*) from sqlqueue.job_default")) == 0


def test_r36_a_job_that_strayed_is_moved_when_its_partition_is_made(old, store) -> None:
    with old.begin() as conn:
        monday = days_of(conn, "job")[-9]  # this week
        conn.execute(text(f"drop table sqlqueue.job_{monday:%Y%m%d}"))
        (job_id,) = add(conn, store)
        assert [str(job["id"]) for job in rows(conn, "job_default")] == [job_id]

    with old.begin() as conn:
        assert store.tidy(conn) == []
        assert rows(conn, "job_default") == []
        assert [str(job["id"]) for job in rows(conn, f"job_{monday:%Y%m%d}")] == [job_id]
        assert claimed_ids(conn, store, hire(conn, store)) == [job_id]
