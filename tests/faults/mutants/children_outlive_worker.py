"""A child process goes on with its run when its worker is dead."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r03"
TESTS = "tests/faults/test_crashes.py"


def apply(root: Path) -> None:
    replace(root, "sqlqueue/process.py", "    die_with_parent()\n", "")
