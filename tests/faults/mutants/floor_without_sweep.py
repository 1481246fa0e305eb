"""A claim never starts at 0: what was committed below the floor of its lane stays there."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r34"


def apply(root: Path) -> None:
    """Break the checkout at `root`."""
    replace(root, "sqlqueue/worker.py", "0 if sweeps or probes", "0 if probes")
