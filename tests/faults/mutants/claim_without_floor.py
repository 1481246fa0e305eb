"""A claim looks at its lane from the beginning, over all dead rows."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r32"


def apply(root: Path) -> None:
    """Break the checkout at `root`."""
    replace(root, "sqlqueue/sql/claim.sql", "and seq > :floor", "and seq > 0 * :floor")
