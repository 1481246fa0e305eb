"""Trees of worker processes that grow, shrink and renew themselves."""

import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy import Engine

from sqlqueue import Policy
from sqlqueue.cli.supervisor import Processes
from tests.harness import (
    CLOCKS,
    application_table,
    effects,
    is_alive,
    load_app,
    program,
    rows,
    tree,
    value,
    wait_until,
    workers,
)

pytestmark = pytest.mark.alone

QUICK: dict[str, Any] = {
    "grow_after": timedelta(seconds=0.3),
    "shrink_after": timedelta(seconds=0.5),
}


@pytest.fixture
def app(engine: Engine, migrated_url: str) -> Iterator[ModuleType]:
    """The application of the tests, whose tasks the worker processes run."""
    application_table(engine)
    loaded = load_app(migrated_url)
    yield loaded
    loaded.queue.engine.dispose()


def alive(engine: Engine) -> set[int]:
    """The worker processes that have registered and are there."""
    return {pid for pid in workers(engine).values() if is_alive(pid)}


def has_ended(engine: Engine) -> bool:
    return value(engine, "select count(*) from sqlqueue.live") == 0


def ran_once_each(engine: Engine, count: int) -> bool:
    """Whether so many jobs have run, each exactly once; a run handed back unstarted is none."""
    found = rows(engine, "select key, count(*) from effect group by key")
    return len(found) == count and all(row[1] == 1 for row in found)


def test_processes_are_started_while_none_has_room_and_stopped_when_there_is_too_much(
    app, engine, migrated_url
) -> None:
    app.queue.enqueue_many(app.linger.s(str(n), 0.5) for n in range(24))
    counts = set()

    with tree(migrated_url, {"least": 1, "most": 3} | QUICK, slots=2):
        wait_until(lambda: counts.add(len(alive(engine))) or has_ended(engine), within=30)
        wait_until(lambda: len(alive(engine)) == 1, within=20)

    assert counts <= {0, 1, 2, 3}
    assert max(counts) == 3
    assert ran_once_each(engine, 24)


def test_a_process_with_room_is_enough(app, engine, migrated_url) -> None:
    with tree(migrated_url, {"least": 1, "most": 3} | QUICK, slots=4):
        wait_until(lambda: len(alive(engine)) == 1)
        for number in range(3):
            app.linger.enqueue(str(number), 1.0)
        wait_until(lambda: has_ended(engine))

        assert value(engine, "select count(*) from sqlqueue.worker") == 1


def test_jobs_that_are_paused_or_wait_under_a_policy_start_no_process(
    app, engine, migrated_url
) -> None:
    app.queue.pause("paused")
    app.queue.set_policy(Policy(concurrency=1), queue="limited")
    for number in range(6):
        app.linger.using(queue="paused").enqueue(f"paused {number}", 0)
        app.linger.using(queue="limited").enqueue(f"limited {number}", 0.3)
    names = ("limited", "paused")

    with tree(migrated_url, {"least": 1, "most": 3} | QUICK, *names, slots=2):
        wait_until(lambda: effects(engine, "limited 5") == [1], within=20)

    assert value(engine, "select count(*) from sqlqueue.worker") == 1
    assert value(engine, "select count(*) from sqlqueue.live where queue = 'paused'") == 6


def test_a_process_that_was_killed_is_replaced_and_not_counted_twice(
    app, engine, migrated_url
) -> None:
    app.queue.enqueue_many(app.linger.s(str(n), 0.5) for n in range(30))

    with tree(migrated_url, {"least": 2, "most": 2} | QUICK, slots=2):
        wait_until(lambda: len(alive(engine)) == 2)
        killed = min(alive(engine))
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: len(alive(engine) - {killed}) == 2, within=20)
        wait_until(lambda: has_ended(engine), within=30)

        assert value(engine, "select count(*) from sqlqueue.worker") == 3


def test_an_old_process_is_replaced_and_no_job_is_lost_or_run_twice(
    app, engine, migrated_url
) -> None:
    app.queue.enqueue_many(app.linger.s(str(n), 0.2) for n in range(60))

    with tree(migrated_url, {"max_age": timedelta(seconds=1.5)}, slots=2):
        wait_until(lambda: has_ended(engine), within=40)

    assert value(engine, "select count(*) from sqlqueue.worker") > 2
    assert ran_once_each(engine, 60)


def test_a_large_process_is_replaced_and_no_job_is_lost_or_run_twice(
    app, engine, migrated_url
) -> None:
    with tree(migrated_url, {"max_bytes": 400 << 20}, slots=2):
        wait_until(lambda: alive(engine))
        before = app.hog.enqueue(10).wait(timedelta(seconds=10))
        assert app.hog.enqueue(500).wait(timedelta(seconds=10)) == before
        app.queue.enqueue_many(app.linger.s(str(n), 0.2) for n in range(20))
        wait_until(lambda: alive(engine) and before not in alive(engine), within=20)

        assert app.hog.enqueue(10).wait(timedelta(seconds=20)) != before
        wait_until(lambda: has_ended(engine))

    assert ran_once_each(engine, 20)


def test_a_process_that_holds_the_interpreter_has_no_room(
    app, engine, migrated_url, tmp_path
) -> None:
    released = tmp_path / "released"
    with tree(migrated_url, {"least": 1, "most": 2} | QUICK, slots=4):
        wait_until(lambda: len(alive(engine)) == 1)
        holding = app.hold_until.enqueue(str(released))
        wait_until(released.with_name("released.held").exists)
        app.linger.enqueue("beside", 0)
        wait_until(lambda: effects(engine, "beside") == [1], within=30)

        assert holding.refresh().state == "running"
        released.touch()
        wait_until(lambda: has_ended(engine))


def test_of_two_processes_the_one_with_less_to_do_is_stopped(app, engine, migrated_url) -> None:
    grace = timedelta(seconds=0.5)
    with tree(migrated_url, {"least": 1, "most": 2} | QUICK, slots=2, grace=grace):
        app.queue.enqueue_many(app.linger.s(str(n), 3) for n in range(2))
        wait_until(lambda: len(alive(engine)) == 2)
        (first,) = {row[0] for row in rows(engine, "select pid from effect")}
        long = app.linger.enqueue("long", 8)

        assert long.wait(timedelta(seconds=20)) != first
        assert alive(engine) == {long.result}
        assert effects(engine, "long") == [1]


def test_all_processes_may_die_at_once(app, engine, migrated_url) -> None:
    given = {"least": 1, "most": 2, "grow_after": timedelta(0), "shrink_after": timedelta(0)}
    app.queue.enqueue_many(app.linger.s(key, 60) for key in ("a", "b"))

    with tree(migrated_url, given, slots=1) as supervisor:
        wait_until(lambda: effects(engine, "a") == effects(engine, "b") == [1])
        os.kill(supervisor, signal.SIGSTOP)
        for pid in alive(engine):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not alive(engine))
        os.kill(supervisor, signal.SIGCONT)

        wait_until(lambda: 2 in effects(engine, "a") + effects(engine, "b"))
        assert is_alive(supervisor)


def test_a_process_that_still_starts_is_not_stopped(app, engine, migrated_url) -> None:
    given, names = {"least": 1, "most": 2} | QUICK, ("default",)
    options = CLOCKS | {"slots": 1}

    with program(migrated_url, f"app.supervise({given}, {names}, {options!r}, app.load_slowly)"):
        wait_until(lambda: len(alive(engine)) == 1)
        app.linger.enqueue("job", 1)
        wait_until(lambda: len(alive(engine)) == 2, within=20)
        wait_until(lambda: len(alive(engine)) == 1, within=20)


def test_a_process_that_was_told_to_stop_keeps_its_grace_period_when_it_is_old(
    app, engine, migrated_url
) -> None:
    app.linger.enqueue("job", 3)

    with tree(migrated_url, {"max_age": timedelta(seconds=2)}) as supervisor:
        wait_until(lambda: effects(engine, "job") == [1])
        os.kill(supervisor, signal.SIGTERM)
        wait_until(lambda: not is_alive(supervisor))

    assert [row[0] for row in rows(engine, "select outcome from sqlqueue.run")] == ["succeeded"]


def test_a_process_is_not_replaced_before_it_works(app, engine, migrated_url) -> None:
    given, names = {"max_bytes": 1 << 20}, ("default",)  # any process has more

    with program(migrated_url, f"app.supervise({given}, {names}, {CLOCKS!r}, app.load_slowly)"):
        wait_until(lambda: value(engine, "select count(*) from sqlqueue.worker") == 2, within=20)


def test_processes_that_drained_are_not_started_again(app, engine, migrated_url) -> None:
    app.queue.enqueue_many(app.linger.s(str(n), 0.2) for n in range(20))
    given = {"least": 2, "most": 4, "grow_after": QUICK["grow_after"]}
    code = f"app.supervise({given!r}, ('default',), {CLOCKS | {'drain': True, 'slots': 2}!r})"

    with program(migrated_url, code) as process:
        assert process.wait(40) == 0

    assert ran_once_each(engine, 20)
    assert value(engine, "select count(*) from sqlqueue.worker") <= 4


def test_hooks_are_told_of_a_worker_process_that_dies(app, engine, migrated_url) -> None:
    code = f"app.queue.after_run.append(app.told); app.supervise(1, ('default',), {CLOCKS!r})"
    app.linger.enqueue("job", 60)

    with program(migrated_url, code):
        wait_until(lambda: effects(engine, "job") == [1])
        (pid,) = alive(engine)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: effects(engine, "crashed") == [1])


@pytest.mark.parametrize("wrong", [(0,), (2, 1), (-1, 3), (1, 0)])
def test_numbers_of_processes_that_make_no_sense_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="lower number first"):
        Processes(*wrong)


@pytest.mark.parametrize("wrong", [{"max_age": timedelta(0)}, {"max_bytes": 0}], ids=str)
def test_a_limit_that_any_process_is_beyond_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match="must be more than 0"):
        Processes(**wrong)
