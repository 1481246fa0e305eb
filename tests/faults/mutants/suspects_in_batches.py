"""A job that took two workers down runs beside others, as any job."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r05"
TESTS = "tests/faults/test_crashes.py"


def apply(root: Path) -> None:
    old = "is_suspect boolean generated always as (crashes >= 2)"
    replace(root, "migrations/versions/0001_first.py", old, old.replace("2", "1000"))
