"""Only the database's clock decides."""

import ast
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest

import sqlqueue
from sqlqueue import IdOutOfRange, Queue
from sqlqueue.literal import new_id

pytestmark = pytest.mark.alone

HOUR = timedelta(hours=1)
# The clocks of a machine, as Python reads them.
CLOCKS = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow")}


def id_by_a_clock_off_by(wrong: timedelta) -> UUID:
    """The id that a machine whose clock is wrong would make: its time is the first 48 bits."""
    right = UUID(new_id()).int
    return UUID(int=right + (wrong // timedelta(milliseconds=1) << 80))


def test_a_wrong_clock_changes_nothing(queue: Queue) -> None:
    @queue.task
    def note() -> None: ...

    soon = timedelta(milliseconds=300)
    late = note.using(id=id_by_a_clock_off_by(-HOUR), delay=soon).enqueue()
    early = note.using(id=id_by_a_clock_off_by(HOUR), delay=soon).enqueue()
    with pytest.raises(IdOutOfRange):
        note.using(id=id_by_a_clock_off_by(timedelta(days=1) + HOUR)).enqueue()

    with queue.worker(poll=timedelta(milliseconds=250)):
        for job in (late, early):
            job.wait(timedelta(seconds=10))

    for job in (late, early):
        assert job.due_at - job.created_at == soon
        assert timedelta(0) <= job.started_at - job.due_at < timedelta(seconds=5)
        assert job.run == 1


def test_no_code_reads_the_clock_of_its_machine_but_the_maker_of_ids() -> None:
    """A worker measures waits by the monotonic clock, and asks the database for instants."""
    package = Path(sqlqueue.__file__).parent
    edge = {"cli", "dashboard", "demo.py", "bench", "embedded.py"}  # what only shows times
    readers = {
        path.name
        for path in package.rglob("*.py")
        if path.relative_to(package).parts[0] not in edge
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in CLOCKS
    }

    assert readers == {"literal.py"}
