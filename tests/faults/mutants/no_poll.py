"""An idle worker sleeps until it is rung."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r27"


def apply(root: Path) -> None:
    """Break the checkout at `root`."""
    until = "next_at = min(self._sweeps.next_at, self._admits_at)"
    replace(root, "sqlqueue/worker.py", until, "next_at = self._admits_at")
    longest = "min(DOZE * 2.0 ** min(self._looks - len(LINGER), 20), self._poll)"
    replace(root, "sqlqueue/bell.py", longest, "3600.0")
