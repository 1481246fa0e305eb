"""A process whose run is out of time, or cancelled, is left alone."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r08"
TESTS = "tests/faults/test_crashes.py"


def apply(root: Path) -> None:
    old = "            if run.handle is self:\n                _kill_group(self._process.pid)\n"
    replace(root, "sqlqueue/process.py", old, "            pass\n")
