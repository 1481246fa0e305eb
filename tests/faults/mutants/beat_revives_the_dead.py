"""A worker that was declared dead, or is silent for too long, beats and lives on."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r21"
TESTS = "tests/faults/test_permute.py"
CONDITION = "  and died_at is null\n  and heartbeat_at > now() - ttl\n"
REVIVED = "set heartbeat_at = now(), died_at = null"


def apply(root: Path) -> None:
    replace(root, "sqlqueue/sql/beat.sql", CONDITION, "")
    replace(root, "sqlqueue/sql/beat.sql", "set heartbeat_at = now()", REVIVED)
