"""A worker hangs its bell after its last look, and sleeps."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r26"


def apply(root: Path) -> None:
    """Break the checkout at `root`."""
    replace(root, "sqlqueue/bell.py", "self._looks = len(LINGER) - 1", "self._looks = 99")
