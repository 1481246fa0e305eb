"""A run whose lease is gone commits what it wrote."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r10 and cannot_finish"
TESTS = "tests/faults/test_pauses.py"
IS_QUICK = True
REFUSAL = "        if not finished:\n            raise LeaseLost(self.job_id, self.number)\n"


def apply(root: Path) -> None:
    replace(root, "sqlqueue/run.py", REFUSAL, "")
