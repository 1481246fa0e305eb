"""A model of jobs, and a machine that compares it with Postgres after each verb.

The model knows the state of each job from what the verbs promise. Which jobs a claim takes, or a
policy admits, it is told; but how many these must be it knows.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from sqlalchemy import Connection

from sqlqueue import Options, Policy
from sqlqueue.literal import new_id
from sqlqueue.store import Ended, Lane, Store
from tests.conftest import TABLES
from tests.faults.checks import violations
from tests.test_store import hire, let_pass, request_cancel, silence

SECOND = timedelta(seconds=1)
TTL = timedelta(seconds=30)
QUEUE = "default"
UNSTARTED = ("scheduled", "waiting", "ready")
AGAIN = ("failed", "timed_out", "snoozed", "returned", "crashed")
LAST = ("succeeded", "failed", "timed_out", "crashed", "cancelled", "expired")
ENDS = [(one, True) for one in AGAIN] + [(one, False) for one in LAST]
POLICIES = [None, Policy(concurrency=1), Policy(concurrency=2), Policy(keeps_order=True)]
ALL = 100


@dataclass
class Known:
    """What is known of a job.

    state     as the view jobs names it
    run       number of its last run
    failures  as the row says from which the view reads the attempt
    key       under a policy
    unique    its unique key
    place     as in ready.admission: 0 none, 1 until its run ends, 2 until it ends
    is_asked  whether somebody asked to cancel it
    """

    state: str
    key: str = ""
    unique: str | None = None
    run: int = 0
    failures: int = 0
    crashes: int = 0
    worker: int | None = None
    place: int = 0
    is_asked: bool = False

    @property
    def lives(self) -> bool:
        """Whether it has not ended."""
        return self.state in (*UNSTARTED, "running")

    def end(self, outcome: str, goes_on: bool) -> None:
        """Be what a run that ends makes of it."""
        failures = self.failures + (outcome in ("failed", "timed_out"))
        self.crashes += outcome == "crashed"
        if self.is_asked and goes_on:
            outcome, goes_on = "cancelled", False
        if not goes_on:
            self.state = "failed" if outcome in ("timed_out", "crashed") else outcome
            self.place = 0
            return
        self.failures, self.worker = failures, None
        self.state = "ready" if outcome in ("returned", "crashed") else "scheduled"
        if self.state == "scheduled" and self.place == 1:
            self.place = 0

    def cancel(self) -> bool:
        """Be what a cancel makes of it; say whether that was possible."""
        could = self.lives
        if self.state in UNSTARTED:
            self.state, self.run, self.place = "cancelled", self.run + 1, 0
        elif could:
            self.is_asked = True
        return could


class Jobs(RuleBasedStateMachine):
    """Verbs of the store, one after another, in one transaction for each example.

    did  how often each verb had an effect, over all examples
    """

    did: ClassVar[Counter[str]] = Counter()
    ids: Bundle[str] = Bundle("ids")

    def __init__(self, conn: Connection) -> None:
        super().__init__()
        self.conn, self.store = conn, Store()
        self.jobs: dict[str, Known] = {}
        self.holders: dict[str, tuple[str, bool]] = {}  # job, and whether until it has started
        self.workers: dict[int, bool] = {}  # whether it lives
        self.policy: Policy | None = None
        self.is_paused = False

    @initialize(
        target=ids,
        are_delayed=st.lists(st.booleans(), min_size=3, max_size=3),
        policy=st.sampled_from(POLICIES),
        running=st.integers(1, 3),
    )
    def begin(self, are_delayed: list[bool], policy: Policy | None, running: int) -> Any:
        self.conn.rollback()  # of an example that failed
        self.conn.exec_driver_sql(";".join(f"delete from sqlqueue.{name}" for name in TABLES))
        self.hire()
        made = [self.enqueue(one, "", None, False, "skip") for one in are_delayed]
        self.set_policy(policy)
        self.admit(running)
        self.claim(0, running)
        return multiple(*made)

    def teardown(self) -> None:
        """Do what workers do until all has ended."""
        if sys.exception():
            return  # which says more
        self.pause(False)
        for _ in range(len(self.jobs) + 1):
            if not any(job.lives for job in self.jobs.values()):
                break
            self.hire()
            self.promote()
            self.admit(ALL)
            self.claim(0, ALL)
            for job_id in self._in("running"):
                self.finish(job_id, False, ("succeeded", False))
        self.agrees()
        assert not any(job.lives for job in self.jobs.values()), "jobs are left that cannot end"
        self.conn.commit()  # a rollback would make the driver forget what it prepared

    def _in(self, state: str) -> Iterator[str]:
        return (job_id for job_id, job in list(self.jobs.items()) if job.state == state)

    # Enqueuing

    @rule(
        target=ids,
        is_delayed=st.booleans(),
        key=st.sampled_from(["", "a"]),
        unique=st.sampled_from([None, None, "u", "v"]),
        until_started=st.booleans(),
        on_conflict=st.sampled_from(["skip", "replace"]),
    )
    def enqueue(
        self, is_delayed: bool, key: str, unique: str | None, until_started: bool, on_conflict: str
    ) -> Any:
        job_id = new_id()
        if unique:
            how = (on_conflict, until_started, None, None, None)
            taken = self.store.take_keys(self.conn, [unique], [job_id], *how)
            if (holder := self._holder(unique)) and on_conflict == "skip":
                assert taken == [holder]
                self.did["skipped"] += 1
                return multiple()
            assert taken == [job_id]
            if holder:
                self.jobs[holder].cancel()
                self.did["replaced"] += 1
            self.holders[unique] = (job_id, until_started)
        options = Options(delay=SECOND if is_delayed else None, key=key or None)
        self.store.enqueue(self.conn, [job_id], ["{}"], "greet", options.params, [unique])
        state = "scheduled" if is_delayed else self._next
        self.jobs[job_id] = Known(state, key=key, unique=unique)
        return job_id

    def _holder(self, unique: str) -> str | None:
        """Return the job that holds a unique key."""
        job_id, until_started = self.holders.get(unique, ("", False))
        job = self.jobs.get(job_id)
        if not job or not job.lives:
            return None
        has_started = job.run > 0 or job.state == "running"
        return None if until_started and has_started else job_id

    @property
    def _next(self) -> str:
        return "waiting" if self.policy else "ready"

    @rule(job_id=ids)
    def retry(self, job_id: str) -> None:
        job = self.jobs[job_id]
        can = job.state in ("failed", "cancelled")
        if can and job.unique:
            can = self._holder(job.unique) in (None, job_id)
        assert self.store.retry(self.conn, job_id) is can
        if can:
            if job.unique:
                self.holders[job.unique] = (job_id, False)
            self.jobs[job_id] = Known(self._next, job.key, job.unique, job.run)
            self.did["retried"] += 1

    @rule(job_id=ids)
    def cancel(self, job_id: str) -> None:
        assert self.store.cancel(self.conn, job_id, "no more") is self.jobs[job_id].cancel()
        self.did["cancelled"] += 1

    @rule(job_id=ids)
    def ask_to_cancel(self, job_id: str) -> None:
        """As a cancel does first, of a job that moves before it is found."""
        if self.jobs[job_id].lives:
            request_cancel(self.conn, job_id, "no more")
            self.jobs[job_id].is_asked = True

    # Workers

    @rule()
    def hire(self) -> None:
        self.workers = {hire(self.conn, self.store, TTL): True} | self.workers

    @rule(worker=st.integers(0, 1), slots=st.integers(1, 4))
    def claim(self, worker: int, slots: int) -> None:
        """Claim as many from either lane, that of suspects first."""
        number, lives = self._worker(worker)
        for is_suspect in (True, False):
            ready = {one for one in self._in("ready") if (self.jobs[one].crashes > 1) == is_suspect}
            rows = self.store.claim(self.conn, Lane(QUEUE, 0, is_suspect), 0, slots, number)
            assert len(rows) == (min(slots, len(ready)) if lives and not self.is_paused else 0)
            assert {row.job_id for row in rows} <= ready
            for row in rows:
                job = self.jobs[row.job_id]
                assert (row.run, row.failures) == (job.run + 1, job.failures)
                assert row.is_cancelled == job.is_asked
                job.state, job.run, job.worker = "running", row.run, number
                self.did["claimed"] += 1

    def _worker(self, index: int) -> tuple[int, bool]:
        return list(self.workers.items())[index % len(self.workers)]

    @rule(job_id=ids, is_stale=st.sampled_from([False, False, True]), end=st.sampled_from(ENDS))
    def finish(self, job_id: str, is_stale: bool, end: tuple[str, bool]) -> None:
        outcome, goes_on = end
        job = self.jobs[job_id]
        run = max(job.run - is_stale, 0)
        holds = job.state == "running" and run == job.run
        ended = Ended(job_id, run, outcome, SECOND if goes_on else None)
        assert self.store.finish(self.conn, [ended]) == ({job_id} if holds else set())
        if holds:
            job.end(outcome, goes_on)
        self.did["finished" if holds else "refused"] += 1

    @rule(worker=st.integers(0, 1))
    def fall_silent(self, worker: int) -> None:
        number, _ = self._worker(worker)
        silence(self.conn, number, 2 * TTL)
        self.workers[number] = False

    @rule(worker=st.integers(0, 1))
    def beat(self, worker: int) -> None:
        number, lives = self._worker(worker)
        assert (self.store.beat(self.conn, number, None) is not None) is lives

    @rule(dies=st.booleans())
    def rescue(self, dies: bool) -> None:
        """Rescue, having seen a worker end or not: one with a job, if there is any."""
        busy = [self.jobs[one].worker for one in self._in("running")]
        number = busy[0] if busy else self._worker(0)[0]
        if dies:
            self.workers[number] = False
        orphans = [one for one in self._in("running") if not self.workers[self.jobs[one].worker]]
        found = self.store.rescue(self.conn, ALL, number if dies else None)
        assert sorted(one.job_id for one in found) == sorted(orphans)
        for orphan in orphans:
            self.jobs[orphan].end("crashed", goes_on=self.jobs[orphan].crashes < 2)
            self.did["rescued"] += 1

    @rule()
    def promote(self) -> None:
        let_pass(self.conn, SECOND)
        self.store.promote(self.conn, None, ALL)
        for job_id in self._in("scheduled"):
            job = self.jobs[job_id]
            job.state = "ready" if job.place else self._next
            self.did["promoted"] += 1

    # Policies

    @rule(is_paused=st.sampled_from([True, False, False]))
    def pause(self, is_paused: bool) -> None:
        self.store.pause(self.conn, "queue", QUEUE, is_paused, "", None, None)
        self.is_paused = is_paused

    @rule(policy=st.sampled_from(POLICIES))
    def set_policy(self, policy: Policy | None) -> None:
        """Set a policy, unless it allows less than what is held: that is no violation."""
        before, self.policy = self.policy, policy
        if min(self._free(), self._free(""), self._free("a")) < 0:
            self.policy = before
            return
        self.store.set_policy(self.conn, "queue", QUEUE, policy and policy.to_json())
        for job in self.jobs.values():
            if job.state in ("ready", "waiting") and not job.place:
                job.state = self._next

    def _free(self, key: str | None = None) -> int:
        """Return how many more jobs the policy admits, of a key or of all."""
        held = [job.key for job in self.jobs.values() if job.place]
        if self.policy and self.policy.concurrency and key is None:
            return self.policy.concurrency - len(held)
        if self.policy and self.policy.keeps_order and key is not None:
            return 1 - held.count(key)
        return ALL

    @rule(room=st.integers(1, 4))
    def admit(self, room: int) -> None:
        waiting = Counter(self.jobs[one].key for one in self._in("waiting"))
        fit = sum(min(count, self._free(key)) for key, count in waiting.items())
        expected = 0 if self.is_paused else min(room, fit, self._free())
        self.store.admit(self.conn, QUEUE, room)
        ready = self.conn.exec_driver_sql("select job_id from sqlqueue.ready").scalars()
        moved = {str(one) for one in ready} & set(self._in("waiting"))
        assert len(moved) == expected
        for job_id in moved:
            job = self.jobs[job_id]
            job.state, job.place = "ready", 2 if self.policy and self.policy.keeps_order else 1
            self.did["admitted"] += 1

    # What is compared

    @invariant()
    def agrees(self) -> None:
        """The view and the model say the same, and no rule is broken."""
        sql = "select id, state, run, attempt, crashes, worker_id from sqlqueue.jobs"
        found = {str(row[0]): tuple(row[1:]) for row in self.conn.exec_driver_sql(sql)}
        assert found == {
            job_id: (job.state, job.run, job.failures + 1, job.crashes, job.worker)
            for job_id, job in self.jobs.items()
        }
        assert violations(self.conn) == []
