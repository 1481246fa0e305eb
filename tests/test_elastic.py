"""Trees of worker processes that grow, shrink and renew themselves."""

import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy import Engine

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
    """Whether so many jobs have run, each exactly once."""
    found = rows(engine, "select key, count(*), max(run) from effect group by key")
    return len(found) == count and all((row[1], row[2]) == (1, 1) for row in found)


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


def test_a_large_process_is_replaced(app, engine, migrated_url) -> None:
    with tree(migrated_url, {"max_bytes": 400 << 20}, slots=2):
        wait_until(lambda: alive(engine))
        before = app.hog.enqueue(10).wait(timedelta(seconds=10))
        assert app.hog.enqueue(500).wait(timedelta(seconds=10)) == before
        wait_until(lambda: alive(engine) and before not in alive(engine), within=20)

        assert app.hog.enqueue(10).wait(timedelta(seconds=10)) != before


def test_processes_that_drained_are_not_started_again(app, engine, migrated_url) -> None:
    app.queue.enqueue_many(app.linger.s(str(n), 0.2) for n in range(20))
    given = {"least": 2, "most": 4} | QUICK
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


@pytest.mark.parametrize("wrong", [(0,), (2, 1), (-1, 3)])
def test_numbers_of_processes_that_make_no_sense_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="lower number first"):
        Processes(*wrong)
