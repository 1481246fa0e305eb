"""A worker beats on the connection of its turns, and so not while one of them waits."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r12"
TESTS = "tests/faults/test_pauses.py"


def apply(root: Path) -> None:
    old = "self.link = Link(worker.queue.engine, worker.queue.store)"
    replace(root, "sqlqueue/heartbeat.py", old, "self.link = worker._link")
