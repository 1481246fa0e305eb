"""Each statement of the store, in a transaction that is rolled back; then two sessions at once."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, text

from sqlqueue import Options
from sqlqueue.literal import array, new_id
from sqlqueue.store import Ended, Executes, Lane, Store
from tests.faults.checks import violations

TTL = timedelta(seconds=30)
SECOND = timedelta(seconds=1)
AT_ONCE = timedelta(0)
LANE = Lane("default", 0)
LIVE = ("ready", "scheduled", "lease")


@pytest.fixture
def conn(conn: Connection) -> Iterator[Connection]:
    """The transaction; at its end no rule is broken."""
    yield conn
    assert violations(conn) == []


def add(conn: Connection, store: Store, count: int = 1, **options: Any) -> list[str]:
    """Enqueue jobs; return their ids."""
    ids = [new_id() for _ in range(count)]
    assert store.enqueue(conn, ids, ["{}"] * count, "greet", Options(**options).params) == count
    return ids


def hire(conn: Connection, store: Store, ttl: timedelta = TTL) -> int:
    """Register a worker; return its id."""
    return store.register(conn, ttl, 1, 10, "host", "name", "0", ["default"], ["greet"])


def claim(
    conn: Connection, store: Store, worker: int, slots: int = 10, lane: Lane = LANE, floor: int = 0
) -> list[Any]:
    return list(store.claim(conn, lane, floor, slots, worker))


def claimed_ids(*args: Any, **kwargs: Any) -> list[str]:
    return [row.job_id for row in claim(*args, **kwargs)]


def silence(conn: Connection, worker: int, for_: timedelta) -> None:
    """Make the worker's last beat older."""
    statement = "update sqlqueue.worker set heartbeat_at = now() - :for_ where id = :id"
    conn.execute(text(statement), {"for_": for_, "id": worker})


def let_pass(conn: Connection, time: timedelta) -> None:
    """Have everything that is scheduled due sooner."""
    conn.execute(text("update sqlqueue.scheduled set due_at = due_at - :time"), {"time": time})


def rows(conn: Connection, table: str) -> list[dict[str, Any]]:
    order = {"run": "run", "doorbell": "queue"}.get(table, "1")
    statement = f"select * from sqlqueue.{table} order by {order}"
    return [dict(row) for row in conn.execute(text(statement)).mappings()]


def row(conn: Connection, table: str) -> dict[str, Any]:
    (found,) = rows(conn, table)
    return found


def ids_in(conn: Connection, table: str) -> list[str]:
    return [str(row["job_id"]) for row in rows(conn, table)]


def job_of(conn: Connection, store: Store, job_id: str) -> Any:
    job = store.jobs(conn, [job_id], [True])[job_id]
    assert job is not None
    return job


# Claim


def test_jobs_of_a_lane_are_claimed_in_the_order_they_came(conn, store) -> None:
    worker = hire(conn, store)
    ids = add(conn, store, 5) + add(conn, store, 2)

    assert claimed_ids(conn, store, worker, slots=3) == ids[:3]
    assert claimed_ids(conn, store, worker) == ids[3:]
    assert claimed_ids(conn, store, worker) == []


def test_a_claim_takes_nothing_from_other_lanes(conn, store) -> None:
    worker = hire(conn, store)
    (mine,) = add(conn, store, queue="mail", priority=3)
    (suspect,) = add(conn, store, queue="mail", priority=3)
    conn.execute(text("update sqlqueue.ready set crashes = 2 where job_id = :id"), {"id": suspect})
    add(conn, store, queue="mail", priority=4)
    add(conn, store, queue="post", priority=3)

    assert claimed_ids(conn, store, worker, lane=Lane("mail", 3)) == [mine]
    assert claimed_ids(conn, store, worker, lane=Lane("mail", 3, is_suspect=True)) == [suspect]
    assert len(rows(conn, "ready")) == 2


def test_a_claim_starts_above_the_floor(conn, store) -> None:
    worker = hire(conn, store)
    ids = add(conn, store, 4)
    floor = min(one["seq"] for one in rows(conn, "ready")) + 1

    assert claimed_ids(conn, store, worker, floor=floor) == ids[2:]
    assert claimed_ids(conn, store, worker, floor=0) == ids[:2]


def test_a_claim_makes_a_lease_of_each_job_it_takes(conn, store) -> None:
    worker = hire(conn, store)
    add(conn, store)
    ready = row(conn, "ready")

    (claimed,) = claim(conn, store, worker)

    lease = row(conn, "lease")
    assert lease.pop("worker_id") == worker
    assert lease.pop("claimed_at").timestamp() == pytest.approx(claimed.claimed_at, abs=1e-5)
    assert lease.pop("run") == claimed.run == 1
    assert lease == {name: ready[name] for name in lease}


def test_a_claim_returns_what_a_run_needs_to_know(conn, store) -> None:
    worker = hire(conn, store)
    options = Options(
        timeout=1.5 * SECOND, keep=False, headers={"a": "b"}, max_crashes=1, expires=AT_ONCE
    )
    job_id = new_id()
    store.enqueue(conn, [job_id], ['{"n": 1}'], "greet", options.params)

    (claimed,) = claim(conn, store, worker)

    assert (claimed.job_id, claimed.run, claimed.task) == (job_id, 1, "greet")
    assert json.loads(claimed.args) == {"n": 1}
    assert (claimed.queue, claimed.failures, claimed.attempts) == ("default", 0, 10)
    assert (claimed.timeout, claimed.executor, claimed.retry) == (1.5, None, None)
    assert (claimed.keep, json.loads(claimed.headers)) == (False, {"a": "b"})
    assert claimed.is_expired is True
    assert claimed.is_last_crash is True


def test_a_job_that_was_started_in_time_no_longer_expires(conn, store) -> None:
    worker = hire(conn, store)
    (job_id,) = add(conn, store, expires=SECOND)
    (first,) = claim(conn, store, worker)
    store.finish(conn, [Ended(job_id, 1, "crashed", AT_ONCE)])
    conn.execute(text("update sqlqueue.job set expires_at = now() - interval '1 second'"))

    (second,) = claim(conn, store, worker)

    assert (first.is_expired, second.is_expired) == (False, False)


@pytest.mark.parametrize(
    "end",
    [
        lambda conn, store, worker: silence(conn, worker, TTL),
        lambda conn, store, worker: store.rescue(conn, 10, seen_dead=worker),
        lambda conn, store, worker: store.unregister(conn, worker),
    ],
    ids=["silent", "buried", "unregistered"],
)
def test_a_dead_worker_can_neither_claim_nor_beat(conn, store, end) -> None:
    worker = hire(conn, store)
    (job_id,) = add(conn, store)
    assert store.beat(conn, worker, None)

    end(conn, store, worker)

    assert claim(conn, store, worker) == []
    assert not store.beat(conn, worker, None)
    assert ids_in(conn, "ready") == [job_id]
    assert claim(conn, store, worker) == []  # the beat that came too late revived nobody


def test_nothing_is_claimed_from_a_paused_queue(conn, store) -> None:
    worker = hire(conn, store)
    (paused,) = add(conn, store, queue="mail")
    (other,) = add(conn, store)
    mail = Lane("mail", 0)

    store.pause(conn, "queue", "mail", True, "ann", "the printer burns", None)

    assert claim(conn, store, worker, lane=mail) == []
    assert claimed_ids(conn, store, worker) == [other]
    said = row(conn, "queue")
    assert (said["paused_by"], said["paused_why"]) == ("ann", "the printer burns")

    store.pause(conn, "queue", "mail", False, None, None, None)

    assert claimed_ids(conn, store, worker, lane=mail) == [paused]
    assert row(conn, "queue")["paused_at"] is None


def test_a_pause_ends_by_itself(conn, store) -> None:
    worker = hire(conn, store)
    (job_id,) = add(conn, store)
    store.pause(conn, "queue", "default", True, "ann", None, SECOND)
    assert claim(conn, store, worker) == []

    conn.execute(text("update sqlqueue.queue set resumes_at = now()"))

    assert claimed_ids(conn, store, worker) == [job_id]


# Finish


@pytest.mark.parametrize(
    ("outcome", "wait", "place", "failures", "crashes"),
    [
        ("succeeded", None, None, 0, 0),
        ("failed", None, None, 0, 0),
        ("failed", SECOND, "scheduled", 1, 0),
        ("timed_out", None, None, 0, 0),
        ("timed_out", SECOND, "scheduled", 1, 0),
        ("crashed", None, None, 0, 1),
        ("crashed", AT_ONCE, "ready", 0, 1),
        ("snoozed", SECOND, "scheduled", 0, 0),
        ("returned", AT_ONCE, "ready", 0, 0),
        ("cancelled", None, None, 0, 0),
        ("expired", None, None, 0, 0),
    ],
)
def test_a_run_that_ends_is_recorded_and_its_job_moves_on(
    conn, store, outcome, wait, place, failures, crashes
) -> None:
    worker = hire(conn, store)
    add(conn, store, priority=2)
    (claimed,) = claim(conn, store, worker, lane=Lane("default", 2))
    lease = row(conn, "lease")

    ended = Ended(claimed.job_id, 1, outcome, wait, 0.5, '"r"', "E", "error", "trace")
    assert store.finish(conn, [ended]) == {claimed.job_id}

    assert rows(conn, "lease") == []
    run = row(conn, "run")
    assert timedelta(0) <= run.pop("ended_at") - lease["claimed_at"] < TTL
    failure = {name: run.pop(name) for name in ("queue", "task", "fingerprint")}
    has_failed = outcome in ("failed", "timed_out", "crashed")
    assert (failure["queue"], failure["task"]) == (
        ("default", "greet") if has_failed else (None, None)
    )
    assert bool(failure["fingerprint"]) == has_failed
    assert run == {
        "job_id": lease["job_id"],
        "run": 1,
        "started_at": lease["claimed_at"],
        "due_at": lease["due_at"],
        "worker_id": worker,
        "ran": 0.5,
        "attempt": 1,
        "crashes": crashes,
        "is_final": place is None,
        "outcome": outcome,
        "result": "r",
        "error_type": "E",
        "error": "error",
        "traceback": "trace",
    }
    moved = {table: rows(conn, table) for table in LIVE if rows(conn, table)}
    if place is None:
        assert moved == {}
        return
    (there,) = moved.pop(place)
    assert moved == {}
    assert (there["run"], there["failures"], there["crashes"]) == (1, failures, crashes)
    assert (there["queue"], there["priority"]) == ("default", 2)
    if place == "ready":
        assert (there["seq"], there["due_at"]) == (lease["seq"], lease["due_at"])
    else:
        assert wait <= there["due_at"] - lease["due_at"] < wait + TTL
        assert there["reason"] == ("snooze" if outcome == "snoozed" else "retry")


def test_a_job_handed_back_is_the_next_to_be_claimed(conn, store) -> None:
    worker = hire(conn, store)
    first, second = add(conn, store, 2)
    (claimed,) = claim(conn, store, worker, slots=1)

    store.finish(conn, [Ended(first, claimed.run, "returned", AT_ONCE)])

    again, then = claim(conn, store, worker)
    assert (again.job_id, again.run, then.job_id) == (first, 2, second)


def test_failures_and_crashes_add_up_over_the_runs(conn, store) -> None:
    worker = hire(conn, store)
    (job_id,) = add(conn, store)

    for run, (outcome, wait) in enumerate(
        [("failed", SECOND), ("crashed", AT_ONCE), ("snoozed", SECOND), ("timed_out", SECOND)], 1
    ):
        assert claimed_ids(conn, store, worker) == [job_id]
        assert store.finish(conn, [Ended(job_id, run, outcome, wait)])
        let_pass(conn, SECOND)
        store.promote(conn, None, 10)

    ready = row(conn, "ready")
    assert (ready["run"], ready["failures"], ready["crashes"]) == (4, 2, 1)
    assert [run["attempt"] for run in rows(conn, "run")] == [1, 2, 2, 2]
    assert [run["crashes"] for run in rows(conn, "run")] == [0, 1, 1, 1]


def test_a_run_with_an_old_number_ends_nothing(conn, store) -> None:
    worker = hire(conn, store)
    (job_id,) = add(conn, store)
    claim(conn, store, worker)
    store.finish(conn, [Ended(job_id, 1, "returned", AT_ONCE)])
    assert store.finish(conn, [Ended(job_id, 1, "succeeded")]) == set()  # while it is ready
    claim(conn, store, worker)
    before = row(conn, "lease"), rows(conn, "run")

    assert store.finish(conn, [Ended(job_id, 1, "succeeded")]) == set()  # while run 2 goes on
    assert set(store.leases(conn, worker, None)) == {(job_id, 2)}

    assert (row(conn, "lease"), rows(conn, "run")) == before


def test_a_batch_ends_the_runs_that_are_held_and_names_them(conn, store) -> None:
    worker = hire(conn, store)
    ids = add(conn, store, 5)
    claim(conn, store, worker)
    stale = Ended(ids[1], 1, "returned", AT_ONCE)
    store.finish(conn, [stale])

    batch = [
        Ended(ids[0], 1, "succeeded", result='{"n": 1}'),
        stale,
        Ended(ids[2], 1, "failed", SECOND, error="no"),
        Ended(str(uuid4()), 1, "succeeded"),
        Ended(ids[3], 1, "crashed", AT_ONCE),
    ]

    assert store.finish(conn, batch) == {ids[0], ids[2], ids[3]}
    assert ids_in(conn, "lease") == [ids[4]]
    assert ids_in(conn, "scheduled") == [ids[2]]
    assert set(ids_in(conn, "ready")) == {ids[1], ids[3]}
    assert store.finish(conn, batch) == set()


def test_a_wait_beyond_the_calendar_does_not_fail_the_batch(conn, store) -> None:
    worker = hire(conn, store)
    ids = add(conn, store, 2)
    claim(conn, store, worker)

    batch = [Ended(ids[0], 1, "succeeded"), Ended(ids[1], 1, "snoozed", timedelta.max)]

    assert store.finish(conn, batch) == set(ids)
    assert ids_in(conn, "scheduled") == [ids[1]]


# Postgres holds neither NUL nor lone surrogates; nobody sends them.
words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.none() | words | st.sampled_from(["NULL", '"', "\\", "{}", "a,b", " "])))
def test_text_survives_the_way_into_an_array(engine, texts: list[str | None]) -> None:
    with engine.connect() as conn:
        statement = "select cast(%(texts)s as text[])"
        (back,) = conn.exec_driver_sql(statement, {"texts": array(texts)}).one()

    assert back == (texts if any(text is not None for text in texts) else [])


# Cancel


def request_cancel(conn: Executes, job_id: str, reason: str) -> None:
    """Do what `cancel` does first, as if the job moved while it looks for it."""
    sql = "insert into sqlqueue.cancel_request (job_id, reason) values (%s, %s)"
    conn.exec_driver_sql(f"{sql} on conflict do nothing", (job_id, reason))


@pytest.mark.parametrize("outcome", ["failed", "timed_out", "snoozed", "crashed", "returned"])
def test_a_job_to_be_cancelled_does_not_run_again(conn, store, outcome) -> None:
    worker = hire(conn, store)
    (job_id,) = add(conn, store)
    claim(conn, store, worker)
    assert store.leases(conn, worker, None) == {(job_id, 1): False}

    request_cancel(conn, job_id, "no more")

    assert store.leases(conn, worker, None) == {(job_id, 1): True}
    assert store.finish(conn, [Ended(job_id, 1, outcome, AT_ONCE)]) == {job_id}
    assert job_of(conn, store, job_id).state == "cancelled"
    assert row(conn, "run")["is_final"]


def test_a_run_that_succeeds_first_is_not_cancelled(conn, store) -> None:
    worker = hire(conn, store)
    (job_id,) = add(conn, store)
    claim(conn, store, worker)
    request_cancel(conn, job_id, "no more")

    store.finish(conn, [Ended(job_id, 1, "succeeded")])

    assert job_of(conn, store, job_id).state == "succeeded"


def test_a_ready_job_is_cancelled_at_once(conn, store) -> None:
    job_id, other = add(conn, store, 2)

    assert store.cancel(conn, job_id, "no more")
    assert not store.cancel(conn, job_id, "no more")

    assert ids_in(conn, "ready") == [other]
    run = row(conn, "run")
    assert (run["run"], run["started_at"], run["is_final"]) == (1, None, True)
    assert (run["outcome"], run["error_type"], run["error"]) == (
        "cancelled", "cancelled", "no more"
    )  # fmt: skip


def test_a_scheduled_job_is_cancelled_at_once(conn, store) -> None:
    job_id, other = add(conn, store, 2, delay=SECOND)

    assert store.cancel(conn, job_id, "no more")
    assert not store.cancel(conn, job_id, "no more")

    assert ids_in(conn, "scheduled") == [other]
    job = job_of(conn, store, job_id)
    assert (job.state, job.run, job.started_at, job.error) == ("cancelled", 1, None, "no more")


def test_a_job_promoted_after_a_request_to_cancel_is_not_run(conn, store) -> None:
    job_id, other = add(conn, store, 2, delay=SECOND)
    request_cancel(conn, job_id, "no more")
    let_pass(conn, SECOND)

    assert store.promote(conn, None, 10) == [(LANE, 2)]

    claimed = claim(conn, store, hire(conn, store))
    assert {one.job_id: one.is_cancelled for one in claimed} == {job_id: True, other: False}


def test_a_request_to_cancel_what_has_ended_or_never_was_changes_nothing(conn, store) -> None:
    (job_id,) = add(conn, store)
    store.cancel(conn, job_id, "no more")

    request_cancel(conn, job_id, "no more")

    assert not store.cancel(conn, job_id, "no more")
    assert not store.cancel(conn, str(uuid4()), "who?")
    assert store.retry(conn, job_id)
    assert rows(conn, "cancel_request") == []


def test_a_request_to_cancel_may_be_repeated(conn, store) -> None:
    (job_id,) = add(conn, store)

    request_cancel(conn, job_id, "first")
    request_cancel(conn, job_id, "second")

    assert row(conn, "cancel_request")["reason"] == "first"


# Promote


def test_jobs_become_ready_when_their_time_has_come(conn, store) -> None:
    (soon,) = add(conn, store, delay=SECOND, priority=1)
    (later,) = add(conn, store, delay=2 * SECOND, queue="mail")
    assert store.promote(conn, None, 10) == []
    assert store.next_due(conn) == SECOND

    let_pass(conn, SECOND)

    assert store.next_due(conn) == SECOND
    assert store.promote(conn, None, 10) == [(Lane("default", 1), 1)]
    assert ids_in(conn, "ready") == [soon]
    assert ids_in(conn, "scheduled") == [later]
    let_pass(conn, SECOND)
    assert store.promote(conn, None, 10) == [(Lane("mail", 0), 1)]
    assert store.next_due(conn) is None


def test_a_promotion_takes_the_longest_due_first_and_no_more_than_asked(conn, store) -> None:
    ids = [add(conn, store, delay=n * SECOND)[0] for n in (3, 1, 2)]
    let_pass(conn, 5 * SECOND)

    assert store.promote(conn, None, 2) == [(LANE, 2)]

    assert ids_in(conn, "scheduled") == [ids[0]]


def test_a_promotion_within_a_time_steps_over_what_was_due_before(conn, store) -> None:
    (old,) = add(conn, store, delay=SECOND)
    (new,) = add(conn, store, delay=20 * SECOND)
    let_pass(conn, 25 * SECOND)

    assert store.promote(conn, 10 * SECOND, 10) == [(LANE, 1)]
    assert ids_in(conn, "ready") == [new]
    assert store.promote(conn, None, 10) == [(LANE, 1)]
    assert set(ids_in(conn, "ready")) == {old, new}


def test_a_promoted_job_keeps_its_numbers(conn, store) -> None:
    (job_id,) = add(conn, store, priority=4, queue="mail")
    claim(conn, store, hire(conn, store), lane=Lane("mail", 4))
    store.finish(conn, [Ended(job_id, 1, "failed", SECOND)])
    conn.execute(text("update sqlqueue.scheduled set failures = 5, crashes = 1"))
    let_pass(conn, SECOND)
    before = row(conn, "scheduled")

    store.promote(conn, None, 10)

    ready = row(conn, "ready")
    del before["reason"]
    assert {name: ready[name] for name in before} == before


# Rescue


def test_jobs_of_a_silent_worker_are_ready_again(conn, store) -> None:
    dead, alive = hire(conn, store), hire(conn, store)
    lost, kept = add(conn, store, 2)
    claim(conn, store, dead, slots=1)
    claim(conn, store, alive, slots=1)
    seq = next(lease["seq"] for lease in rows(conn, "lease") if lease["worker_id"] == dead)
    assert store.rescue(conn, 10) == []

    silence(conn, dead, TTL + SECOND)
    rescued = store.rescue(conn, 10)

    assert [(one.job_id, one.run, one.outcome) for one in rescued] == [(lost, 1, "crashed")]
    assert ids_in(conn, "lease") == [kept]
    ready = row(conn, "ready")
    assert (str(ready["job_id"]), ready["run"], ready["crashes"]) == (lost, 1, 1)
    assert (ready["failures"], ready["seq"]) == (0, seq)
    assert f"worker {dead} died" in row(conn, "run")["error"]
    assert store.rescue(conn, 10) == []


def test_a_worker_whose_end_was_seen_need_not_be_silent(conn, store) -> None:
    dead, alive = hire(conn, store), hire(conn, store)
    lost, kept = add(conn, store, 2)
    claim(conn, store, dead, slots=1)
    claim(conn, store, alive, slots=1)

    assert [one.job_id for one in store.rescue(conn, 10, seen_dead=dead)] == [lost]
    assert ids_in(conn, "lease") == [kept]


def test_a_lease_that_a_worker_left_behind_is_rescued_however_long_ago_it_stopped(
    conn, store
) -> None:
    gone = hire(conn, store)
    (job_id,) = add(conn, store)
    claim(conn, store, gone)
    store.unregister(conn, gone)
    two_days_pass = text("update sqlqueue.worker set died_at = died_at - interval '2 days'")
    conn.execute(two_days_pass)
    assert store.rescue(conn, 10) == []  # dead rows may lie there
    store.tidy(conn)

    assert [one.job_id for one in store.rescue(conn, 10)] == [job_id]
    assert ids_in(conn, "ready") == [job_id]
    conn.execute(two_days_pass)
    store.tidy(conn)
    assert rows(conn, "worker") == []


def test_a_lease_of_a_worker_whose_row_is_missing_is_rescued_after_a_tidying(conn, store) -> None:
    worker = hire(conn, store)
    (job_id,) = add(conn, store)
    claim(conn, store, worker)
    conn.execute(text("delete from sqlqueue.worker"))

    store.tidy(conn)

    assert [one.job_id for one in store.rescue(conn, 10)] == [job_id]


def test_a_rescue_takes_no_more_than_asked(conn, store) -> None:
    first, second = hire(conn, store), hire(conn, store)
    add(conn, store, 6)
    claim(conn, store, first, slots=3)
    claim(conn, store, second, slots=3)
    silence(conn, first, 2 * TTL)
    silence(conn, second, 2 * TTL)

    assert [len(store.rescue(conn, 4)) for _ in range(3)] == [4, 2, 0]


def test_a_job_that_crashes_too_often_fails_for_good(conn, store) -> None:
    (job_id,) = add(conn, store, max_crashes=3)

    for crashes in (1, 2, 3):
        worker = hire(conn, store)
        suspect = Lane("default", 0, is_suspect=True)
        lane = suspect if crashes == 3 else LANE
        assert claimed_ids(conn, store, worker, lane=lane) == [job_id]
        store.rescue(conn, 10, seen_dead=worker)

    job = job_of(conn, store, job_id)
    assert (job.state, job.run, job.error_type) == ("failed", 3, "crashed")
    assert [run["is_final"] for run in rows(conn, "run")] == [False, False, True]


def test_a_rescue_honours_a_request_to_cancel(conn, store) -> None:
    worker = hire(conn, store)
    (job_id,) = add(conn, store)
    claim(conn, store, worker)
    request_cancel(conn, job_id, "no more")

    store.rescue(conn, 10, seen_dead=worker)

    assert job_of(conn, store, job_id).state == "cancelled"


def test_a_worker_knows_what_it_holds(conn, store) -> None:
    worker, other = hire(conn, store), hire(conn, store)
    first, second = add(conn, store, 2)
    claim(conn, store, worker, slots=1)
    claim(conn, store, other, slots=1)

    assert store.leases(conn, worker, None) == {(first, 1): False}
    assert store.leases(conn, other, None) == {(second, 1): False}


def test_a_worker_sees_what_it_claimed_lately_and_all_that_is_to_be_cancelled(conn, store) -> None:
    worker = hire(conn, store)
    old, cancelled, _ = add(conn, store, 3)
    claim(conn, store, worker, slots=2)
    conn.execute(text("update sqlqueue.lease set claimed_at = now() - interval '1 h'"))
    ((lately, *_),) = claim(conn, store, worker)
    request_cancel(conn, cancelled, "no more")

    assert store.leases(conn, worker, TTL) == {(lately, 1): False, (cancelled, 1): True}
    assert store.leases(conn, worker, None).keys() == {(old, 1), (lately, 1), (cancelled, 1)}


def test_the_number_of_a_worker_is_never_used_again(conn, store) -> None:
    first = hire(conn, store)
    store.unregister(conn, first)

    assert hire(conn, store) > first


# Lanes


@pytest.mark.parametrize("is_suspect", [False, True])
@pytest.mark.parametrize("known", [set(), {0}, {-100, 100}])
def test_every_lane_of_a_queue_is_found(conn, store, known, is_suspect) -> None:
    present = {-100, -99, -1, 0, 1, 2, 7, 100}
    for priority in present:
        add(conn, store, priority=priority, queue="mail")
    if is_suspect:
        conn.execute(text("update sqlqueue.ready set crashes = 2"))
    assert store.lanes(conn, "mail", sorted(known), not is_suspect) == []
    assert store.lanes(conn, "post", sorted(known), is_suspect) == []

    while found := store.lanes(conn, "mail", sorted(known), is_suspect):
        assert all(lane == Lane("mail", lane.priority, is_suspect) for lane in found)
        assert known.isdisjoint(lane.priority for lane in found)
        known = known | {lane.priority for lane in found}

    assert known >= present


# The bell


def bells(conn: Connection) -> dict[str, int]:
    return {bell["queue"]: bell["worker_id"] for bell in rows(conn, "doorbell")}


def test_a_queue_has_one_bell(conn, store) -> None:
    store.arm(conn, ["mail", "post"], 1, SECOND)
    store.arm(conn, ["mail", "default"], 2, 2 * SECOND)

    assert len(rows(conn, "doorbell")) == 3
    assert bells(conn) == {"mail": 1, "post": 1, "default": 2}


def test_a_worker_that_arms_again_has_its_bell_for_longer(conn, store) -> None:
    store.arm(conn, ["mail"], 1, SECOND)
    before = row(conn, "doorbell")["rings_until"]

    store.arm(conn, ["mail"], 1, 3 * SECOND)

    assert row(conn, "doorbell")["rings_until"] == before + 2 * SECOND


def test_the_bell_of_a_worker_that_has_gone_makes_room(conn, store) -> None:
    store.arm(conn, ["mail"], 1, SECOND)
    conn.execute(text("update sqlqueue.doorbell set rings_until = now()"))

    store.arm(conn, ["mail"], 2, SECOND)

    assert [bell["worker_id"] for bell in rows(conn, "doorbell")] == [1, 2]


def test_a_worker_takes_only_its_own_bells_away(conn, store) -> None:
    store.arm(conn, ["mail"], 1, SECOND)
    store.arm(conn, ["post"], 2, SECOND)

    store.disarm(conn, ["mail", "post"], 2)
    assert bells(conn) == {"mail": 1}
    store.disarm(conn, ["post"], 1)
    assert bells(conn) == {"mail": 1}
    store.disarm(conn, ["mail", "post"], 1)
    assert bells(conn) == {}


# Retry by an operator


def end(conn: Connection, store: Store, outcome: str) -> str:
    """Run a job that ends with an outcome, at its first run, having failed four times."""
    (job_id,) = add(conn, store)
    conn.execute(text("update sqlqueue.ready set failures = 4, crashes = 1"))
    claim(conn, store, hire(conn, store))
    store.finish(conn, [Ended(job_id, 1, outcome)])
    return job_id


@pytest.mark.parametrize("outcome", ["failed", "timed_out", "crashed", "cancelled"])
def test_a_job_that_is_retried_starts_afresh_and_keeps_its_past(conn, store, outcome) -> None:
    job_id = end(conn, store, outcome)

    assert store.retry(conn, job_id)

    ready = row(conn, "ready")
    assert (ready["run"], ready["failures"], ready["crashes"]) == (1, 0, 0)
    past = row(conn, "run")
    assert (past["run"], past["outcome"], past["is_final"]) == (1, outcome, False)
    (claimed,) = claim(conn, store, hire(conn, store))
    assert claimed.run == 2
    store.finish(conn, [Ended(job_id, 2, "succeeded")])
    assert job_of(conn, store, job_id).state == "succeeded"


def test_only_a_job_that_failed_or_was_cancelled_is_retried(conn, store) -> None:
    succeeded, failed = end(conn, store, "succeeded"), end(conn, store, "failed")
    expired = end(conn, store, "expired")
    (ready,) = add(conn, store, queue="mail")

    assert not store.retry(conn, succeeded)
    assert not store.retry(conn, expired)
    assert not store.retry(conn, ready)
    assert not store.retry(conn, str(uuid4()))
    assert store.retry(conn, failed)
    assert not store.retry(conn, failed)


def test_a_job_cancelled_and_then_retried_is_not_cancelled_again(conn, store) -> None:
    (job_id,) = add(conn, store)
    request_cancel(conn, job_id, "no more")
    store.cancel(conn, job_id, "no more")

    store.retry(conn, job_id)

    worker = hire(conn, store)
    claim(conn, store, worker)
    assert store.leases(conn, worker, None) == {(job_id, 2): False}


def test_a_retry_of_a_job_whose_row_was_dropped_changes_nothing(conn, store) -> None:
    job_id = end(conn, store, "failed")
    conn.execute(text("delete from sqlqueue.job"))

    assert not store.retry(conn, job_id)

    assert row(conn, "run")["is_final"]


def test_a_job_knows_since_when_nobody_knew_its_task(conn, store) -> None:
    worker = hire(conn, store)
    (job_id,) = add(conn, store)
    assert store.unknown_since(conn, job_id) == 0

    for run in (1, 2):
        claim(conn, store, worker)
        store.finish(conn, [Ended(job_id, run, "snoozed", AT_ONCE, error_type="unknown_task")])
        conn.execute(text("update sqlqueue.run set ended_at = ended_at - interval '1 minute'"))
        store.promote(conn, None, 10)

    assert store.unknown_since(conn, job_id) == pytest.approx(120, abs=30)


# All of it


def test_the_view_names_each_state(conn, store) -> None:
    worker = hire(conn, store)
    (scheduled,) = add(conn, store, delay=SECOND)
    outcomes = ("succeeded", "failed", "timed_out", "crashed", "cancelled", "expired")
    ended = dict(zip(outcomes, add(conn, store, len(outcomes)), strict=True))
    claim(conn, store, worker)
    store.finish(conn, [Ended(job_id, 1, outcome) for outcome, job_id in ended.items()])
    (running,) = add(conn, store)
    claim(conn, store, worker)
    (ready,) = add(conn, store)

    said = {str(job["id"]): (job["state"], job["reason"]) for job in rows(conn, "jobs")}

    assert said == {
        scheduled: ("scheduled", "delay"),
        ready: ("ready", None),
        running: ("running", None),
        ended["succeeded"]: ("succeeded", None),
        ended["failed"]: ("failed", "failed"),
        ended["timed_out"]: ("failed", "timed_out"),
        ended["crashed"]: ("failed", "crashed"),
        ended["cancelled"]: ("cancelled", None),
        ended["expired"]: ("expired", None),
    }
    live = {str(job["id"]): job["state"] for job in rows(conn, "live")}
    assert live == {scheduled: "scheduled", ready: "ready", running: "running"}
    unknown = str(uuid4())
    given = [*live, *ended.values(), unknown]
    read = store.jobs(conn, given, [True] * len(given))
    assert [one for one, job in read.items() if job is None] == [unknown]
    assert store.jobs(conn, given, []).keys() == {*ended.values(), unknown}


# Two sessions


@pytest.fixture
def sessions(engine: Engine) -> Iterator[tuple[Connection, Connection]]:
    """Two sessions in which nobody waits for long; what they do not commit is undone."""
    with ExitStack() as stack:
        both = [stack.enter_context(engine.connect()) for _ in range(2)]
        for one in both:
            one.execute(text("set lock_timeout = '5s'"))
            one.commit()
        yield both[0], both[1]


def never_waits(conn: Connection) -> None:
    """Let whatever would wait fail instead."""
    conn.execute(text("set local lock_timeout = '1ms'"))


def prepare(engine: Engine, store: Store, jobs: int, **options: Any) -> tuple[int, list[str]]:
    """Commit a worker and some jobs."""
    with engine.begin() as conn:
        return hire(conn, store), add(conn, store, jobs, **options)


def test_a_claim_steps_over_jobs_that_another_is_claiming(engine, sessions, store) -> None:
    one, other = sessions
    worker, ids = prepare(engine, store, 4)

    assert claimed_ids(one, store, worker, slots=2) == ids[:2]
    never_waits(other)
    assert claimed_ids(other, store, worker, slots=10) == ids[2:]
    one.rollback()
    assert claimed_ids(other, store, worker, slots=10) == ids[:2]


def test_a_finish_never_waits_and_says_what_is_held(engine, sessions, store) -> None:
    one, other = sessions
    worker, ids = prepare(engine, store, 2)
    with engine.begin() as conn:
        claim(conn, store, worker)

    one.execute(text("select from sqlqueue.lease where job_id = :id for update"), {"id": ids[0]})
    never_waits(other)

    batch = [Ended(job_id, 1, "succeeded") for job_id in ids]
    assert store.finish(other, batch) == {ids[1]}
    assert set(store.leases(other, worker, None)) == {(ids[0], 1)}
    one.rollback()
    assert store.finish(other, batch) == {ids[0]}
    assert store.leases(other, worker, None) == {}


def test_a_promotion_steps_over_jobs_that_another_is_promoting(engine, sessions, store) -> None:
    one, other = sessions
    prepare(engine, store, 3, delay=SECOND)
    with engine.begin() as conn:
        let_pass(conn, SECOND)

    assert store.promote(one, None, 2) == [(LANE, 2)]
    never_waits(other)
    assert store.promote(other, None, 10) == [(LANE, 1)]
    one.commit()
    other.commit()

    with engine.connect() as conn:
        assert len(rows(conn, "ready")) == 3


def test_two_rescues_share_what_is_to_be_rescued(engine, sessions, store) -> None:
    one, other = sessions
    worker, ids = prepare(engine, store, 3)
    with engine.begin() as conn:
        claim(conn, store, worker)
        store.rescue(conn, 0, seen_dead=worker)

    first = store.rescue(one, 2)
    never_waits(other)
    second = store.rescue(other, 10)

    assert len(first) == 2
    assert sorted(ended.job_id for ended in first + second) == sorted(ids)


def test_workers_that_arm_at_once_hang_a_bell(engine, sessions, store) -> None:
    one, other = sessions

    store.arm(one, ["default"], 1, SECOND)
    never_waits(other)
    store.arm(other, ["default"], 2, SECOND)
    one.rollback()
    other.commit()

    assert bells(other) == {"default": 2}


def test_of_two_that_tidy_at_once_one_does(engine, sessions, store) -> None:
    one, other = sessions
    with engine.begin() as conn:
        store.unregister(conn, hire(conn, store))
        conn.execute(text("update sqlqueue.worker set died_at = died_at - interval '2 days'"))

    store.tidy(one)
    assert rows(one, "worker") == []
    assert store.tidy(other) == []
    assert len(rows(other, "worker")) == 1


# What is left over


def test_what_is_left_over_is_removed(conn, store) -> None:
    worker = hire(conn, store)
    live, ended = add(conn, store, 2)
    for job_id in (live, ended):
        request_cancel(conn, job_id, "no more")
    conn.execute(text("update sqlqueue.cancel_request set requested_at = now() - interval '1 h'"))
    store.cancel(conn, ended, "no more")
    store.arm(conn, ["mail"], worker, SECOND)
    conn.execute(text("update sqlqueue.doorbell set rings_until = now() - interval '1 h'"))
    store.arm(conn, ["mail"], worker, SECOND)
    buried = hire(conn, store)
    store.rescue(conn, 10, seen_dead=buried)
    conn.execute(text("update sqlqueue.worker set died_at = died_at - interval '2 days'"))
    buried_lately = hire(conn, store)
    store.rescue(conn, 10, seen_dead=buried_lately)

    store.tidy(conn)

    assert ids_in(conn, "cancel_request") == [live]
    assert len(rows(conn, "doorbell")) == 1
    assert [one["id"] for one in rows(conn, "worker")] == [worker, buried_lately]
