"""An operator's retry counts the runs of a job from 1 again."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r21"
TESTS = "tests/faults/test_permute.py"
FILE = "migrations/versions/0002_policies.py"
WAITING = "given.id, now(), {}, given.priority, given.queue, flow"
READY = "values (given.id, now(), {}, given.priority, given.queue)"


def apply(root: Path) -> None:
    for row in (WAITING, READY):
        replace(root, FILE, row.format("last_run"), row.format("0"))
