"""A worker that was declared dead, or is silent for too long, goes on claiming."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r21"
TESTS = "tests/faults/test_permute.py"
CONDITION = "select heartbeat_at > now() - ttl and died_at is null"


def apply(root: Path) -> None:
    replace(root, "sqlqueue/sql/claim.sql", CONDITION, "select true")
