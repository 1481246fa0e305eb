"""A setting of a transaction is made for its session, which a pooler lends to others next."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r25"
TESTS = "tests/faults/test_pooler.py"


def apply(root: Path) -> None:
    replace(
        root,
        "sqlqueue/sql/begin.sql",
        "'enable_seqscan', 'off', true",
        "'enable_seqscan', 'off', false",
    )
