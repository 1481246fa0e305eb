"""A run finishes its job by the job's id alone, and so whatever run holds the lease."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r10 and cannot_finish"
TESTS = "tests/faults/test_pauses.py"


def apply(root: Path) -> None:
    replace(root, "sqlqueue/sql/finish.sql", " and lease.run = ended.run\n", "\n")
