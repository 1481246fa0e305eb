"""A claim deletes by a join with the rows it has picked, which statistics can spoil."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "plan"
TESTS = "tests/test_plans.py"
IS_QUICK = True


def apply(root: Path) -> None:
    """Break the checkout at `root`."""
    file = "sqlqueue/sql/claim.sql"
    replace(root, file, "where ctid = any (array(  -- an array of ctids", "where ctid in (  -- it")
    replace(root, file, "for update skip locked\n    ))", "for update skip locked\n    )")
