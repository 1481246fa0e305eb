"""Each rule of invariants.sql is broken once, and named."""

import re
from datetime import timedelta

import pytest
from sqlalchemy import Connection, text

from sqlqueue import Options, Policy
from sqlqueue.literal import new_id
from sqlqueue.store import Ended, Lane
from tests.faults.checks import INVARIANTS, violations
from tests.test_store import add, claim, hire

# Beside each rule: what breaks it, of the jobs that `everywhere` makes.
BROKEN = {
    "a job is in no table": "delete from sqlqueue.ready where job_id = :ready",
    "a job is in two tables": "insert into sqlqueue.scheduled (job_id, due_at, priority,"
    " queue, reason) values (:ready, now(), 0, 'default', 'delay')",
    "a row has no job": "delete from sqlqueue.job where id = :leased",
    "a job has ended twice": "update sqlqueue.run set is_final = true where job_id = :ended",
    "a run is there twice": "insert into sqlqueue.run select job_id, run, ended_at + interval '1 s'"
    ", started_at, due_at, worker_id, ran, attempt, crashes, false, outcome from sqlqueue.run"
    " where job_id = :retried",
    "a run has the number of an earlier one": "update sqlqueue.ready set run = 0"
    " where job_id = :retried",
    "a run is not recorded": "delete from sqlqueue.run where job_id = :retried",
    "a place is held by no job": "insert into sqlqueue.admitted values (:waiting, 'task', 'x', '')",
    "a job was admitted and holds no place": "delete from sqlqueue.admitted"
    " where job_id = :admitted",
    "a limit is exceeded": "update sqlqueue.policy set concurrency = 0",
    "a limit of a key is exceeded": "update sqlqueue.policy set concurrency_per_key = 0",
    "a job that has ended holds its unique key": "create or replace function sqlqueue.is_held("
    "claim sqlqueue.unique_claim) returns boolean language sql return true",
    "a job does not hold its unique key": "update sqlqueue.unique_claim set job_id = :ready"
    " where key = 'held'",
}


@pytest.fixture
def jobs(conn, store) -> dict[str, str]:
    """A job in each state, by its name; one that has ended after two runs, two with unique keys."""
    worker = hire(conn, store)
    failed = timedelta(0)

    def end(job_id: str, run: int, outcome: str, wait: timedelta | None = None) -> None:
        assert store.finish(conn, [Ended(job_id, run, outcome, wait)])

    def unique(key: str) -> str:
        job_id = new_id()
        store.take_keys(conn, [key], [job_id], "skip", False, None, None, None)
        store.enqueue(conn, [job_id], ["{}"], "greet", Options().params, [key])
        return job_id

    jobs = dict(zip(("retried", "ended", "leased"), add(conn, store, 3), strict=True))
    jobs["free"] = unique("free")
    claim(conn, store, worker)
    end(jobs["retried"], 1, "returned", failed)
    end(jobs["ended"], 1, "returned", failed)
    end(jobs["free"], 1, "succeeded")
    assert {one.job_id for one in claim(conn, store, worker)} == {jobs["retried"], jobs["ended"]}
    end(jobs["ended"], 2, "failed")
    end(jobs["retried"], 2, "returned", failed)
    (jobs["ready"],) = add(conn, store)
    jobs["held"] = unique("held")
    (jobs["scheduled"],) = add(conn, store, delay=timedelta(hours=1))
    policy = Policy(concurrency=1, concurrency_per_key=1)
    store.set_policy(conn, "queue", "few", policy.to_json())
    jobs["admitted"], jobs["waiting"] = add(conn, store, 2, queue="few", key="k")
    store.admit(conn, "few", 10)
    claim(conn, store, worker, lane=Lane("few", 0))
    return jobs


def rules(conn: Connection) -> set[str]:
    return {rule for rule, _, _ in violations(conn)}


def test_nothing_is_said_of_jobs_in_every_state(conn, jobs) -> None:
    assert violations(conn) == []


@pytest.mark.parametrize("rule", BROKEN)
def test_a_rule_that_is_broken_is_named(conn, jobs, rule) -> None:
    conn.execute(text(BROKEN[rule]), jobs)

    assert rules(conn) == {rule}


def test_each_rule_is_broken_by_a_test() -> None:
    assert set(re.findall(r"^(?:select|    )\s*'(an? [^']+)'", INVARIANTS, re.M)) == set(BROKEN)


def test_a_job_whose_runs_were_dropped_before_it_breaks_no_rule(conn, jobs) -> None:
    conn.execute(text("delete from sqlqueue.run"))
    assert rules(conn) == {"a job is in no table", "a run is not recorded"}

    conn.execute(text("update sqlqueue.setting set retention = interval '12 hours'"))
    assert rules(conn) == set()
