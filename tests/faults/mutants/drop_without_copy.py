"""A partition is dropped with the jobs in it that have not ended."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r36"


def apply(root: Path) -> None:
    """Break the checkout at `root`."""
    replace(root, "migrations/versions/0001_first.py", "if parent = 'job' then", "if false then")
