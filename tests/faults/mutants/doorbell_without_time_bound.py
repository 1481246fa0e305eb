"""Whoever enqueues looks for a bell from the beginning, over all dead rows."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r32"


def apply(root: Path) -> None:
    """Break the checkout at `root`."""
    bound = "and rings_until > statement_timestamp()"
    replace(root, "sqlqueue/sql/enqueue.sql", bound, "and rings_until > '-infinity'")
