"""A rescue waits for the worker that is just ending one of its runs."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r21"
TESTS = "tests/faults/test_permute.py"
LIMIT = "        limit rescue.batch\n        for update"


def apply(root: Path) -> None:
    replace(root, "migrations/versions/0003_schedules.py", f"{LIMIT} skip locked", LIMIT)
