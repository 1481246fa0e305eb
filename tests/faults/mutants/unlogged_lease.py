"""A crash of Postgres empties the leases: who holds which job is not in its log."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r14"
TESTS = "tests/faults/test_server.py"


def apply(root: Path) -> None:
    replace(
        root,
        "migrations/versions/0001_first.py",
        "create table sqlqueue.lease (",
        "create unlogged table sqlqueue.lease (",
    )
