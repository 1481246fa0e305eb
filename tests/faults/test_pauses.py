"""Bars R10 to R13: processes that stand still, threads that are blocked, clocks that are wrong."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from time import monotonic

import pytest
from sqlalchemy import create_engine, make_url, text

from sqlqueue import Queue, Retry, Schedule, current_run
from tests.faults.cases import IN_TASK, old_id
from tests.faults.checker import assert_nothing_wrong, drained
from tests.faults.history import Enqueuers
from tests.faults.nemesis import Nemesis
from tests.faults.processes import Forks
from tests.harness import (
    CLOCKS,
    SOON,
    TTL,
    effects,
    is_alive,
    is_stopped,
    mark,
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

pytestmark = [pytest.mark.alone, pytest.mark.timeout(180)]

STRICT = "app.queue.around_run.append(app.noting_refusals)"
REFUSED = "select count(*) from refusal"


@pytest.fixture
def forks(migrated_url, tables) -> Iterator[Forks]:
    with Forks(migrated_url) as forks:
        yield forks


def working(*names: str, **options: object) -> str:
    """The code of a worker that notes when it is refused."""
    return f"{STRICT}; app.work({names or ('default',)!r}, {CLOCKS | options!r})"


def goes_on(engine, pid: int) -> None:
    """Wait until a worker that was given up has found out, and registered anew."""
    wait_until(lambda: pid in workers(engine).values(), what=f"process {pid} to register anew")


# A worker stands still


def test_r10_a_worker_stopped_for_longer_than_its_ttl_cannot_finish(queue, engine, forks) -> None:
    """When it goes on, its jobs run elsewhere, and its writes are rolled back."""
    jobs = [queue.using(timeout=None).send("write", f"paid {n}", 3) for n in range(6)]
    stalled = forks.run(working(slots=6))
    wait_until(lambda: value(engine, IN_TASK) == 6, what="six jobs, each in its middle")
    os.kill(stalled, signal.SIGSTOP)
    wait_until(lambda: is_stopped(stalled))
    began = monotonic()
    forks.run(working(slots=6))
    wait_until(lambda: value(engine, IN_TASK) == 12, what="their next runs")
    stood = monotonic() - began
    os.kill(stalled, signal.SIGCONT)
    wait_until(lambda: value(engine, REFUSED) == 6, what="six refusals")
    assert value(engine, "select count(*) from sqlqueue.lease where run = 2") == 6
    assert [job.wait(SOON) for job in jobs] == [2] * 6
    goes_on(engine, stalled)

    print(f"stopped for {stood / TTL.total_seconds():.1f} ttl: {value(engine, REFUSED)} refused")
    assert stood > TTL.total_seconds()
    assert [outcomes(engine, job.id) for job in jobs] == [["crashed", "succeeded"]] * 6
    assert [effects(engine, f"paid {n}") for n in range(6)] == [[2]] * 6


class Crew:
    """Workers without a parent, struck at random; who is killed is replaced."""

    def __init__(self, forks: Forks, engine, size: int) -> None:
        self._forks, self._engine = forks, engine
        self._stopped: dict[int, threading.Timer] = {}
        self.pids = [forks.run(working(slots=8)) for _ in range(size)]

    def kill(self, dice: random.Random) -> str:
        """Kill one at work."""
        victim = self._at_work(dice)
        os.kill(victim, signal.SIGKILL)
        self.pids[self.pids.index(victim)] = self._forks.run(working(slots=8))
        return f"worker {victim}"

    def stop(self, dice: random.Random) -> str | None:
        """Stop one at work for one to three ttl, but not the last."""
        if len(self._stopped) == len(self.pids) - 1:
            return None
        victim, seconds = self._at_work(dice), TTL.total_seconds() * dice.uniform(1, 3)
        os.kill(victim, signal.SIGSTOP)
        self._stopped[victim] = threading.Timer(seconds, self._go_on, (victim,))
        self._stopped[victim].start()
        return f"worker {victim} for {seconds:.1f} s"

    def cut(self, dice: random.Random) -> str | None:
        """End one session of a worker or an enqueuer."""
        sql = "select pid from pg_stat_activity where application_name = 'storm' order by pid"
        pids = [row[0] for row in rows(self._engine, sql)]
        victim = dice.choice(pids) if pids else None
        rows(self._engine, "select pg_terminate_backend(:pid)", pid=victim)
        return f"session {victim}"

    def heal(self) -> None:
        """Return when all that were stopped go on."""
        for timer in list(self._stopped.values()):
            timer.join()

    def _go_on(self, victim: int) -> None:
        os.kill(victim, signal.SIGCONT)
        del self._stopped[victim]

    def _at_work(self, dice: random.Random) -> int:
        return dice.choice([pid for pid in self.pids if pid not in self._stopped])


SEEDS = [
    pytest.param(20261123, 20, id="short"),
    *(pytest.param(seed, 60, id=f"long {seed}", marks=pytest.mark.nightly) for seed in range(10)),
]


@pytest.mark.parametrize(("seed", "seconds"), SEEDS)
def test_r10_nothing_is_wrong_after_mixed_faults(
    engine, migrated_url, tables, seed, seconds
) -> None:
    """Killed and paused workers, sessions ended: all effects of transactional tasks once."""
    named = make_url(migrated_url).update_query_dict({"application_name": "storm"})
    url = named.render_as_string(hide_password=False)
    queue = Queue(url)
    retry = Retry(attempts=1000, waits=[timedelta(seconds=0.1)])
    with Forks(url) as forks:
        crew = Crew(forks, engine, 4)
        wait_until(lambda: len(workers(engine)) == 4, within=20, what="four workers")
        load = {"rate": 40, "seconds": 0.6, "max_crashes": 1000, "retry": retry}
        strikes = {"kill": crew.kill, "stop": crew.stop, "cut": crew.cut}
        with (
            Enqueuers(queue, seed=seed, **load) as enqueuers,
            Nemesis(seed, strikes, heal=crew.heal) as nemesis,
        ):
            wait_until(lambda: nemesis.log and nemesis.log[-1][0] > seconds, within=seconds + 30)
        drained(engine)
        for pid in crew.pids:
            goes_on(engine, pid)
    queue.engine.dispose()

    counts = {name: nemesis.count(name) for name in strikes}
    refused, history = value(engine, REFUSED), enqueuers.history
    print(f"seed {seed}: {len(history.acknowledged)} jobs, {counts}, {refused} finishes refused")
    assert all(count >= seconds / 10 for count in counts.values()), f"inconclusive\n{nemesis}"
    assert refused >= 5, "inconclusive: hardly any zombie tried to finish"
    assert_nothing_wrong(engine, history)


# A process stops where it holds locks


def test_r11_a_worker_that_stalls_before_its_commit_hides_no_job(
    queue, engine, forks, tmp_path
) -> None:
    """The database ends the silent sessions; then others go on, who pass by what is locked."""
    cases = {  # queue: point, task, how its runs end
        "claim": ("claim_before_commit", "linger", ["succeeded"]),
        "finish": ("finish_before_commit", "linger", ["crashed", "succeeded"]),
        "transaction": ("finish_before_commit", "write", ["crashed", "succeeded"]),
    }
    jobs, stalled = {}, []
    for name, (point, task, _) in cases.items():
        struck = str(tmp_path / name)
        code = f"app.be_struck(failpoints.Failpoint({point!r}, 'stop', {struck!r}))"
        jobs[name] = queue.using(queue=name).send(task, name, 0)
        stalled.append(forks.run(f"{code}; {working(name)}"))
    wait_until(lambda: all(map(is_stopped, stalled)), what="three to stall")
    began = monotonic()
    silent = (
        "select count(*) from pg_stat_activity where state = 'idle in transaction'"
        " and (query like 'with picked%' or query like 'with counted%')"
    )
    assert value(engine, silent) >= len(cases)  # more, if other turns were in the middle
    forks.run(working(*cases))
    wait_until(lambda: value(engine, silent) == 0, what="the end of their sessions")
    ended = monotonic() - began
    for job in jobs.values():
        job.wait(timedelta(seconds=15))
    ran = monotonic() - began
    for pid in stalled:
        os.kill(pid, signal.SIGCONT)
    for pid in stalled:
        goes_on(engine, pid)

    print(f"sessions ended after {ended:.2f} s, all ran elsewhere after {ran:.2f} s")
    fence, ttl = TTL.total_seconds() * 2 / 3, TTL.total_seconds()
    assert ended <= fence + 1
    assert ran <= ttl + 5
    for name, (_, task, expected) in cases.items():
        assert outcomes(engine, jobs[name].id) == expected
        twice = (name, task) == ("finish", "linger")
        assert len(effects(engine, name)) == (2 if twice else 1)


def test_r11_a_worker_that_stalls_while_it_drops_history_stops_nobody_for_long(
    queue, engine, forks, tmp_path
) -> None:
    """Nobody can enqueue or claim while a week is detached: its session is ended after a second."""
    with engine.begin() as conn:
        queue.using(conn, id=old_id(conn), delay=timedelta(hours=1)).send("write", "old")
        conn.execute(text("update sqlqueue.setting set retention = default"))
    point = ("in_drop_after_lock", "stop", str(tmp_path / "struck"))
    stalled = forks.run(f"app.be_struck(failpoints.Failpoint{point}); {working()}")
    wait_until(lambda: is_stopped(stalled), what="it to stall")
    began = monotonic()
    job = queue.send("linger", "after", 0)
    took = monotonic() - began
    forks.run(working())
    job.wait(SOON)
    os.kill(stalled, signal.SIGCONT)

    print(f"enqueued after {took:.2f} s, with a ttl of {TTL.total_seconds():.0f} s")
    assert 0.1 < took <= 1.5


# Threads are blocked


def test_r12_tasks_that_block_for_three_ttl_keep_their_leases(
    migrated_url, engine, tables, app
) -> None:
    """Blocked slots, loop, pool and upkeep, and a held interpreter: nobody is rescued falsely.

    Beats come from a thread of their own, and from the supervisor where no thread can run.
    """
    seconds = 3 * TTL.total_seconds()
    queue = Queue(create_engine(migrated_url, pool_size=1, max_overflow=0))

    @queue.task(name="thread")
    def in_thread() -> int:
        current_run().log.info("a line that upkeep cannot write")
        with queue.engine.connect():  # the pool has one
            threading.Event().wait(seconds)
        return current_run().number

    @queue.task(name="loop")
    async def on_loop() -> int:
        threading.Event().wait(seconds)  # no await: nothing else runs on the loop
        return current_run().number

    blocked = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
    line = "insert into sqlqueue.log (job_id, run, seq, at, level) values (:id, 1, 1, now(), '')"
    with engine.connect() as conn, tree(migrated_url, 1, "supervised", slots=1):
        held = app.hold_interpreter.using(queue="supervised").enqueue(int(seconds), "held")
        jobs = [in_thread.using(conn).enqueue(), on_loop.using(conn).enqueue(), held]
        conn.commit()
        conn.execute(text(line), {"id": jobs[0].id})  # its worker has to wait for this transaction
        with (
            queue.worker("default", **CLOCKS, slots=2) as worker,
            app.queue.worker("other", **CLOCKS),  # would rescue what seems dead
        ):
            wait_until(lambda: value(engine, blocked) == 1, what="blocked upkeep")
            written_by(engine, "held")
            numbers = workers(engine), worker.id
            for job in jobs:
                wait_until(lambda job=job: outcomes(engine, job.id), within=seconds + 10)
            assert value(engine, blocked) == 1
            conn.rollback()
            assert numbers == (workers(engine), worker.id)
    queue.engine.dispose()

    print(f"{len(jobs)} jobs blocked their workers for {seconds:.0f} s, and ended once")
    assert [outcomes(engine, job.id) for job in jobs] == [["succeeded"]] * 3


def test_r12_a_turn_that_hangs_is_seen_after_a_ttl_and_not_before(
    app, engine, migrated_url, forks, tmp_path
) -> None:
    """A lock that somebody else holds stops all claims. Beats go on meanwhile.

    A process with a parent ends at once, to be replaced; any other worker stops, and says why.
    """
    ttl = TTL.total_seconds()
    job = app.linger.enqueue("beside", ttl + 1)
    lock = text("lock table sqlqueue.queue in access exclusive mode")
    here = app.queue.worker("here", **CLOCKS)
    said = tmp_path / "said"
    code = f"app.supervise(1, ('default',), {CLOCKS!r})"
    with said.open("w") as log, program(migrated_url, code, stderr=log), here:
        pids = [written_by(engine, "beside"), forks.run(working("alone"))]
        for name in ("here", "alone"):  # a worker looks where there has been a job
            app.linger.using(queue=name).enqueue(name, 0).wait(SOON)
        numbers = workers(engine)
        assert len(numbers) == 3
        with engine.connect() as conn:
            conn.execute(lock)
            began = monotonic()
            wait_until(lambda: monotonic() > began + 0.9 * ttl)
        job.wait(SOON)
        assert workers(engine) == numbers

        with engine.connect() as conn:
            conn.execute(lock)
            began = monotonic()
            wait_until(lambda: here.stopped.is_set() and not any(map(is_alive, pids)))
            took = monotonic() - began
        app.linger.enqueue("after", 0).wait(SOON)

    print(f"blocked for {0.9 * ttl:.1f} s and let be; then seen after {took:.2f} s")
    assert outcomes(engine, job.id) == ["succeeded"]
    assert ttl - 0.5 <= took <= ttl + 1
    assert "no turn for" in str(here.error)
    assert "no turn for" in said.read_text()


# Clocks

HOUR = timedelta(hours=1)


def off_by(wrong: timedelta) -> dict[str, str]:
    """The environment of a process whose clock is wrong, but for the monotonic one."""
    found = [str(path) for path in Path("/usr/lib").glob("*/faketime/libfaketime.so.1")]
    assert found, "inconclusive: libfaketime is missing; on Debian: apt-get install libfaketime"
    seconds = f"{wrong.total_seconds():+.0f}"
    return {"LD_PRELOAD": found[0], "FAKETIME": seconds, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


@pytest.mark.nightly
@pytest.mark.parametrize("wrong", [HOUR, -HOUR], ids=["ahead", "behind"])
def test_r13_a_wrong_clock_changes_nothing(engine, migrated_url, forks, tmp_path, wrong) -> None:
    """That of a worker and of an enqueuer, beside a right one: nothing is early, late or twice."""
    ttl, soon, names = TTL.total_seconds(), timedelta(seconds=4), ("crooked", "right")
    queue, clock = Queue(engine), tmp_path / "clock"
    call = queue.task(name="linger")(lambda key, seconds: None).s("tick", 0)
    queue.set_schedule("ticks", call, Schedule(every=timedelta(seconds=1)))
    with Forks(migrated_url, off_by(wrong)) as crooked:
        crooked.run(f"import time; open({str(clock)!r}, 'w').write(str(time.time()))")
        read = float(wait_until(lambda: clock.exists() and clock.read_text()))
        assert abs(read - time.time() - wrong.total_seconds()) < 60, "inconclusive: it is right"

        pids = {"crooked": crooked.run(working("crooked")), "right": forks.run(working("right"))}
        wait_until(lambda: len(workers(engine)) == 2, within=20)
        for name in names:
            send = f"app.queue.using(queue={name!r}"
            crooked.run(f"{send}).send('linger', 'long {name}', {3 * ttl})")
            crooked.run(f"{send}).send('linger', 'now {name}', 0)")
            crooked.run(f"{send}, delay={soon!r}).send('linger', 'soon {name}', 0)")
            once = f"timeout={soon!r}, retry=app.Retry(attempts=1)"
            crooked.run(f"{send}, {once}).send('rest', 'timed {name}', 60)")
            queue.using(queue=name, delay=soon).send("linger", f"here {name}", 0)
        ended = "select count(*) from sqlqueue.jobs where queue <> 'default' and ended_at < now()"
        wait_until(lambda: value(engine, ended) == 10, within=3 * ttl + 20)
        found = rows(engine, "select * from sqlqueue.jobs where queue <> 'default'")
        ticks = rows(
            engine, "select at, created_at from sqlqueue.tick join sqlqueue.job on id = job_id"
        )

        rescued = []
        for name in names:  # each dies, and the other one sees it in time
            job = queue.using(queue=name).send("linger", f"lost {name}", 60)
            written_by(engine, f"lost {name}")
            mark(engine, f"killed {name}")
            os.kill(pids[name], signal.SIGKILL)
            wait_until(lambda job=job: outcomes(engine, job.id) == ["crashed"], within=ttl + 10)
            rescued.append(seconds_from(engine, f"killed {name}", job.id))
            (crooked if name == "crooked" else forks).run(working("another"))
            wait_until(lambda: len(workers(engine)) == 2)

    print(
        f"{wrong.total_seconds():+.0f} s: {len(found)} jobs and {len(ticks)} instants in time,"
        f" rescued after {', '.join(f'{one:.1f}' for one in rescued)} s"
    )
    assert len(found) == 10
    for job in found:
        is_timed = job.task == "rest"
        assert outcomes(engine, job.id) == ["timed_out" if is_timed else "succeeded"], job
        assert timedelta(0) <= job.started_at - job.due_at <= timedelta(seconds=1.5)
        assert job.due_at - job.created_at in (timedelta(0), soon)
        assert not is_timed or soon <= job.ended_at - job.started_at <= soon + timedelta(seconds=1)
    assert len(ticks) >= 3 * ttl
    assert all(timedelta(0) <= one.created_at - one.at <= timedelta(seconds=2) for one in ticks)
    assert all(ttl - 0.7 <= one <= ttl + 5 for one in rescued)
