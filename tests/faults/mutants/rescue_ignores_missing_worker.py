"""A lease whose worker has no row is nobody's, and is never rescued."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r21"
TESTS = "tests/faults/test_permute.py"
CONDITION = """\
    where not exists (
        select
        from sqlqueue.worker
        where worker.id = lease.worker_id
"""


def apply(root: Path) -> None:
    replace(
        root,
        "migrations/versions/0001_first.py",
        CONDITION,
        CONDITION.replace("where not", "where false and not"),
    )
