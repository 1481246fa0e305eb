"""Bars R1 to R9: processes that die, or are told to."""

import os
import random
import re
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from time import monotonic
from typing import Any

import pytest
from sqlalchemy.orm import Session

from sqlqueue import Job, LeaseLost, Retry, current_run
from tests.faults.cases import Case
from tests.faults.checker import assert_nothing_wrong, drained, judge
from tests.faults.failpoints import ACTIONS, POINTS
from tests.faults.history import Enqueuers
from tests.faults.nemesis import Nemesis
from tests.faults.processes import Forks
from tests.harness import (
    CLOCKS,
    SOON,
    TTL,
    effects,
    is_alive,
    mark,
    members,
    outcomes,
    program,
    rows,
    seconds_from,
    tree,
    value,
    wait_until,
    workers,
    written_by,
)

pytestmark = pytest.mark.alone

SEEDS = [
    pytest.param(20261123, 25, id="short"),
    *(pytest.param(seed, 60, id=f"long {seed}", marks=pytest.mark.nightly) for seed in range(10)),
]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("seed", "seconds"), SEEDS)
def test_r01_no_acknowledged_job_is_lost(
    queue, engine, migrated_url, tables, seed, seconds
) -> None:
    def kill(dice: random.Random) -> str | None:
        alive = sorted(pid for pid in workers(engine).values() if is_alive(pid))
        if not alive:
            return None
        os.kill(victim := dice.choice(alive), signal.SIGKILL)
        return f"worker process {victim}"

    with tree(migrated_url, 4, slots=4):
        wait_until(lambda: len(workers(engine)) == 4, within=20, what="four workers")
        with (
            Enqueuers(queue, seed=seed, rate=50, max_crashes=1000) as enqueuers,
            Nemesis(seed, {"kill": kill}) as nemesis,
        ):
            wait_until(lambda: nemesis.log and nemesis.log[-1][0] > seconds, within=seconds + 30)
        drained(engine)

    crashed = value(engine, "select count(*) from sqlqueue.run where outcome = 'crashed'")
    jobs = len(enqueuers.history.acknowledged)
    print(f"seed {seed}: {jobs} jobs, {nemesis.count('kill')} kills, {crashed} crashed runs")
    assert nemesis.count("kill") >= seconds / 3, f"inconclusive: few were killed\n{nemesis}"
    assert crashed, "inconclusive: nobody was killed at work"
    assert_nothing_wrong(engine, enqueuers.history)


# A tree dies


@pytest.mark.parametrize(
    "clocks",
    [
        pytest.param(CLOCKS, id="short"),
        pytest.param(
            {"ttl": timedelta(seconds=30), "poll": timedelta(seconds=1)},
            marks=pytest.mark.nightly,
            id="default clocks",
        ),
    ],
)
def test_r02_jobs_of_a_dead_worker_are_ready_in_time(app, engine, migrated_url, clocks) -> None:
    """Its whole tree is gone; another one rescues them, and runs them."""
    keys = ["thread 1", "thread 2", "thread 3", "loop", "process"]
    tasks = [app.linger] * 3 + [app.rest, app.linger.using(executor="process")]
    for task, key in zip(tasks, keys, strict=True):
        task.enqueue(key, 90)
    with tree(migrated_url, 2, slots=3, **clocks) as parent:
        for key in keys:
            written_by(engine, key)
        with tree(migrated_url, 1, slots=5, **clocks):
            wait_until(lambda: len(workers(engine)) == 3, within=20, what="another tree")
            mark(engine, "killed")
            os.killpg(parent, signal.SIGKILL)
            within = clocks["ttl"].total_seconds() + 5
            for key in keys:
                wait_until(lambda key=key: len(effects(engine, key)) == 2, within=within + 5)

    sql = (
        "select extract(epoch from max(at) - min(at) filter (where key = 'killed'))"
        " from effect where run is null or run > 1"  # one may be handed back unstarted
    )
    took = float(value(engine, sql))
    print(f"all {len(keys)} ran again after {took:.2f} s, with a ttl of {clocks['ttl']}")
    assert took <= within
    runs = [effects(engine, key) for key in keys]
    assert all(len(one) == 2 and one[0] < one[1] for one in runs), runs


# One process dies


def test_r03_jobs_of_a_killed_worker_process_are_ready_again_at_once(app, engine, migrated_url):
    """Only once its child processes are dead, even one whose code holds the interpreter."""
    jobs = {
        "thread": app.linger.enqueue("thread", 60),
        "process": app.stubborn.enqueue("process"),
        "held": app.hold_interpreter.using(executor="process").enqueue(10, "held"),
    }
    with tree(migrated_url, slots=3) as parent:
        victim = written_by(engine, "thread")
        wait_until(lambda: value(engine, "select count(*) from effect") == 4)
        children = {row[0] for row in rows(engine, "select pid from effect")} - {victim}
        assert children <= set(members(parent))
        mark(engine, "killed")
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: value(engine, "select count(*) from sqlqueue.run"))
        left = [pid for pid in children if is_alive(pid)]
        for job in jobs.values():
            wait_until(lambda job=job: outcomes(engine, job.id), what="the hand-back")

    took = {name: seconds_from(engine, "killed", job.id) for name, job in jobs.items()}
    print(
        f"{len(children)} child processes dead, jobs ready again after {max(took.values()):.2f} s"
    )
    assert len(children) == 3
    assert not left, "jobs are ready while their last runs go on"
    assert max(took.values()) <= 1
    assert all(outcomes(engine, job.id) == ["crashed"] for job in jobs.values())
    assert all(job.refresh().attempt == 1 for job in jobs.values())


def test_r03_nothing_is_left_of_the_tree_of_a_killed_supervisor(app, engine, migrated_url) -> None:
    with tree(migrated_url, 2, slots=4) as parent:
        wait_until(lambda: len(workers(engine)) == 2, within=20)
        app.stubborn.enqueue("a child and its child")
        app.hold_interpreter.using(executor="process").enqueue(10, "a child")
        wait_until(lambda: value(engine, "select count(*) from effect") == 3)
        app.hold_interpreter.enqueue(10, "a worker")
        written_by(engine, "a worker")
        count = len(members(parent))
        os.kill(parent, signal.SIGKILL)
        began = monotonic()
        wait_until(lambda: not members(parent), within=5, what="the end of the tree")
        took = monotonic() - began

    print(f"all {count} processes were gone after {took:.2f} s")
    assert count >= 6
    assert took <= 1


def test_r04_a_child_that_dies_is_a_crash_of_its_run_alone(app, engine) -> None:
    """A segfault, an exit, a kill as for lack of memory; no more memory alone is a failure."""
    ways = {"segfault": -signal.SIGSEGV, "exit": 3, "killed": -signal.SIGKILL, "memory": None}
    figures = []
    with app.queue.worker("default", **CLOCKS, slots=3):
        neighbours = [app.stay.enqueue("thread")]
        neighbours.append(app.stay.using(executor="process").enqueue("process"))
        for how, code in ways.items():
            job = app.die.enqueue(how)
            after = app.linger.using(executor="process").enqueue(f"after {how}", 0)
            after.wait(SOON)
            wait_until(lambda job=job: job.refresh().has_ended)
            assert outcomes(engine, job.id) == ["crashed" if code else "failed"]
            what = f"its process ended with exit code {code}"
            assert (job.error_type, job.error) in [("crashed", what), ("MemoryError", "")]
            figures.append((seconds_from(engine, how, job.id), seconds_from(engine, how, after.id)))
        mark(engine, "go")
        for one in neighbours:
            one.wait(SOON)
            assert outcomes(engine, one.id) == ["succeeded"]

    recorded, usable = map(max, zip(*figures, strict=True))
    print(f"recorded after {recorded:.2f} s, the slot was used again after {usable:.2f} s")
    assert recorded <= 1
    assert usable <= 2


@pytest.mark.parametrize("poison", ["poison", "topple"], ids=["worker", "tree"])
def test_r05_a_poison_job_fails_alone(queue, engine, tables, migrated_url, poison) -> None:
    """It kills its worker, or the whole tree, every time; those in the same batch lose nothing."""
    neighbours = [queue.send("linger", f"neighbour {n}", 1.0) for n in range(4)]
    job = queue.send(poison)
    neighbours += [queue.send("linger", f"later {n}", 0) for n in range(20)]
    options = CLOCKS | {"slots": 5, "ttl": timedelta(seconds=2)}
    trees = 0

    def all_ended() -> bool:
        return value(engine, "select count(*) from sqlqueue.live") == 0

    while not all_ended():
        trees += 1
        with program(migrated_url, f"app.supervise(1, ('default',), {options!r})") as parent:
            what = f"the end of tree {trees}, or of all jobs"
            wait_until(lambda: parent.poll() is not None or all_ended(), within=40, what=what)

    crashed = "select count(*) from sqlqueue.run where outcome = 'crashed' and job_id <> :id"
    print(f"{trees} trees; {value(engine, crashed, id=job.id)} runs of neighbours crashed")
    assert trees == (4 if poison == "topple" else 1)
    assert value(engine, crashed, id=job.id), "inconclusive: it took nobody down with it"
    assert (job.refresh().state, job.error_type) == ("failed", "crashed")
    assert outcomes(engine, job.id) == ["crashed"] * 3
    for one in neighbours:
        assert (one.refresh().state, one.attempt) == ("succeeded", 1)


# A fault at each point

# What becomes of a job's runs, as a regular expression, after SIGKILL, SIGSTOP until after its
# ttl, cut connections, a crash of Postgres. The task is transactional, so that its effect is there
# once, but where it is said to be plain: there the turn finishes the job, and each run has one.
# While Postgres is down, a run of a transactional task fails, or its worker gives it up.
DONE, AGAIN, FAILED = "succeeded", "crashed succeeded", "failed succeeded"
EITHER, MAYBE = "((failed|crashed) )+succeeded", "((failed|crashed) )*succeeded"
LATE = "(crashed )*succeeded"
ENDS = {
    "before_enqueue_commit": ("", DONE, DONE, DONE),
    "after_enqueue_commit": (DONE, DONE, DONE, DONE),
    "before_claim": (DONE, DONE, DONE, DONE),
    "claim_before_commit": (DONE, DONE, DONE, DONE),
    "claim_after_commit": (AGAIN, AGAIN, DONE, MAYBE),
    "before_task": (AGAIN, AGAIN, DONE, MAYBE),
    "in_task": (AGAIN, AGAIN, FAILED, EITHER),
    "before_finish": (AGAIN, AGAIN, FAILED, EITHER),
    "finish_before_commit": (AGAIN, AGAIN, FAILED, EITHER),
    "finish_after_commit": (DONE, DONE, DONE, DONE),
    "before_finish, plain": (AGAIN, AGAIN, DONE, LATE),
    "finish_before_commit, plain": (AGAIN, AGAIN, DONE, LATE),
    "finish_after_commit, plain": (DONE, DONE, DONE, DONE),
    "in_beat": (AGAIN, AGAIN, FAILED, EITHER),
    "in_rescue_before_commit": (AGAIN, AGAIN, AGAIN, AGAIN),
    "in_promote_before_commit": (DONE, DONE, DONE, DONE),
    "in_fire_before_commit": (DONE, DONE, DONE, DONE),
    "in_drop_after_lock": (DONE, DONE, DONE, DONE),
    "in_hand_back": (AGAIN, AGAIN, "returned succeeded", "(returned|crashed) succeeded"),
}
SEED = 20261123
DRAWN = dict(zip(ENDS, random.Random(SEED).choices(ACTIONS, k=len(ENDS)), strict=True))
CASES = [
    pytest.param(
        point,
        action,
        id=f"{point} {action}",
        marks=[] if action == DRAWN[point] else pytest.mark.nightly,
    )
    for point in ENDS
    for action in ACTIONS
]


@pytest.fixture
def killed(engine) -> Iterator[None]:
    """Kill what wrote its process id and is left: this process would wait for it to end."""
    yield
    for row in rows(engine, "select pid from effect where pid is not null"):
        if is_alive(row.pid) and row.pid != os.getpid():
            os.kill(row.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def forks(shared_cluster) -> Iterator[Forks]:
    with Forks(shared_cluster.url) as forks:
        yield forks


@pytest.mark.parametrize(("point", "action"), CASES)
def test_r06_a_fault_at_a_point_has_a_known_end(
    shared_cluster, forks, tmp_path, point, action
) -> None:
    place, _, is_plain = point.partition(", ")
    task = "linger" if is_plain else "write"
    case = Case(shared_cluster, forks, place, action, task, tmp_path)
    with case.empty():
        case.strike()
        case.heal()
        found = " ".join(case.outcomes)
        print(f"seed {SEED}: {point}, {action}: {found or 'no job'}")
        assert re.fullmatch(ENDS[point][ACTIONS.index(action)], found)
        assert set(ENDS) >= set(POINTS)
        runs = len(case.outcomes)
        assert len(effects(case.engine, str(case.job_id))) == (runs if is_plain else min(runs, 1))
        wrong = judge(case.engine, case.history).wrong()
        assert wrong.keys() <= ({"duplicate_effects"} if is_plain else set())


# Processes are told to stop


def test_r07_a_tree_lets_jobs_end_until_it_is_told_again(app, engine, migrated_url) -> None:
    """After the second signal it hands back what still runs, with no attempt used."""
    options = CLOCKS | {"grace": timedelta(minutes=1)}
    with program(migrated_url, f"app.supervise(2, ('default',), {options!r})") as parent:
        short = [app.linger.enqueue("thread", 1), app.rest.enqueue("loop", 1)]
        long = [app.linger.enqueue("long thread", 60), app.rest.enqueue("long loop", 60)]
        long.append(app.linger.using(executor="process").enqueue("long process", 60))
        wait_until(lambda: value(engine, "select count(*) from effect") == 5, within=20)
        parent.send_signal(signal.SIGTERM)
        for job in short:
            job.wait(SOON)
        assert parent.poll() is None
        assert not any(outcomes(engine, job.id) for job in long)
        mark(engine, "told again")
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(10) == 0

    took = max(seconds_from(engine, "told again", job.id) for job in long)
    print(f"{len(long)} jobs were handed back {took:.2f} s after the second signal")
    assert 0 <= took <= 1
    assert all(outcomes(engine, job.id) == ["succeeded"] for job in short)
    assert all(outcomes(engine, job.id) == ["returned"] for job in long)
    assert all((job.refresh().state, job.attempt) == ("ready", 1) for job in long)
    assert workers(engine) == {}


# Jobs are told to stop


def test_r08_a_stubborn_process_is_killed_with_all_it_started(app, engine, killed) -> None:
    """It ignores SIGTERM and has a child of its own; the next job has a fresh process."""
    limit = 2.0

    def started(key: str) -> list[int]:
        return [row[0] for row in rows(engine, "select pid from effect where key = :k", k=key)]

    with app.queue.worker("default", **CLOCKS, slots=2):
        timed = app.stubborn.using(timeout=timedelta(seconds=limit)).enqueue("timed")
        cancelled = app.stubborn.using(timeout=None).enqueue("cancelled")
        for key in ("timed", "cancelled"):
            wait_until(lambda key=key: len(started(key)) == 2, what="the process and its child")
        pids = {key: started(key) for key in ("timed", "cancelled")}
        mark(engine, "cancel")
        assert cancelled.cancel()
        began = monotonic()
        wait_until(lambda: not any(map(is_alive, pids["cancelled"])), within=5)
        took = monotonic() - began
        for job in (timed, cancelled):
            wait_until(lambda job=job: job.refresh().has_ended, what=f"the end of {job}")
        left = [pid for pid in pids["timed"] if is_alive(pid)]
        fresh = {app.process_id.enqueue().wait(SOON) for _ in range(2)}

    ran = value(engine, "select ran from sqlqueue.run where outcome = 'timed_out'") - limit
    print(f"gone {took:.2f} s after the cancel, {ran:.2f} s after the time limit")
    assert took <= 1
    assert 0 <= ran <= 1
    assert not left, "its outcome is recorded, and it goes on"
    assert not fresh & {*pids["timed"], *pids["cancelled"]}
    assert (timed.state, outcomes(engine, timed.id)) == ("failed", ["timed_out"])
    assert (cancelled.state, outcomes(engine, cancelled.id)) == ("cancelled", ["cancelled"])


PATIENCE = TTL.total_seconds() / 6  # of a worker with a run that goes on after its end
LIMITED: dict[str, Any] = {"timeout": timedelta(seconds=0.3), "retry": Retry(attempts=1)}


def test_r09_a_run_that_ignores_its_time_loses_its_lease(queue, engine) -> None:
    """A thread or a coroutine; what it does afterwards is refused."""
    refused: list[LeaseLost] = []
    may_end, has_ended = threading.Event(), threading.Semaphore(0)

    def go_on() -> None:
        assert may_end.wait(10)
        with Session(engine) as session:
            try:
                current_run().finish(session)
            except LeaseLost as error:
                refused.append(error)
        has_ended.release()

    @queue.task(name="deaf_thread", **LIMITED)
    def in_thread() -> None:
        go_on()

    @queue.task(name="deaf_loop", **LIMITED)
    async def on_loop() -> None:
        go_on()  # no await: the loop can tell it nothing

    with queue.worker("default", **CLOCKS):
        jobs: list[Job[None]] = [in_thread.enqueue(), on_loop.enqueue()]
        for job in jobs:
            wait_until(lambda job=job: job.refresh().has_ended)
        may_end.set()
        for _ in jobs:
            assert has_ended.acquire(timeout=10)

    least = LIMITED["timeout"].total_seconds() + PATIENCE
    took = [float(row[0]) for row in rows(engine, "select ran from sqlqueue.run")]
    print(f"given up after {max(took):.2f} s, with a limit and patience of {least:.2f} s")
    assert [outcomes(engine, job.id) for job in jobs] == [["timed_out"]] * 2
    assert {error.job_id for error in refused} == {job.id for job in jobs}
    assert all(least <= one <= least + 1 for one in took)


def test_r09_a_process_with_a_run_that_never_ends_says_so_and_is_replaced(
    queue, engine, tables, migrated_url, tmp_path
) -> None:
    options = CLOCKS | {"grace": timedelta(seconds=0.5), "slots": 2}
    log = tmp_path / "log"
    code = f"app.supervise(1, ('default',), {options!r})"
    with log.open("w") as file, program(migrated_url, code, stderr=file):
        stuck = queue.using(**LIMITED).send("wedge", "stuck")
        wedged = written_by(engine, "stuck")
        began = monotonic()
        wait_until(lambda: not is_alive(wedged), what="the end of the stuck process")
        took = monotonic() - began
        assert queue.send("linger", "fine", 0).wait(timedelta(seconds=15)) != wedged
        assert wedged not in workers(engine).values()

    print(f"the stuck process ended {took:.2f} s after its start")
    assert outcomes(engine, stuck.id) == ["timed_out"]
    assert f"job {stuck.id}: run 1 goes on after it was timed_out" in log.read_text()
