"""A process that stalls between a finish and its commit keeps its session, and its locks."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r11"
TESTS = "tests/faults/test_pauses.py"


def apply(root: Path) -> None:
    old = "case when cast(:patience as text) is not null then"
    replace(root, "sqlqueue/sql/finish.sql", old, f"{old[:-5]} and false then")
