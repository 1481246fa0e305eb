"""A turn is planned by statistics, which may be those of an empty table."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "plan"
TESTS = "tests/test_plans.py"


def apply(root: Path) -> None:
    """Break the checkout at `root`."""
    for kind in ("seqscan", "bitmapscan", "sort", "hashjoin", "mergejoin"):
        setting = f"set_config('enable_{kind}', 'off', true)"
        replace(root, "sqlqueue/sql/begin.sql", setting, setting.replace("off", "on"))
