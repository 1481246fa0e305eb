"""The floor is the highest seq seen, though jobs commit out of that order."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r34"


def apply(root: Path) -> None:
    """Break the checkout at `root`."""
    late = "self.value, self.marked, self.marked_at = self.marked, self.seen, monotonic()"
    replace(root, "sqlqueue/lanes.py", late, "pass")
    replace(root, "sqlqueue/lanes.py", "began - self.marked_at >= TRAIL", "self.seen > self.value")
    replace(root, "sqlqueue/lanes.py", "            pass", "            self.value = self.seen")
