"""A worker that admits waits for the turn of another, instead of going on without."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r21"
TESTS = "tests/faults/test_permute.py"
FILE = "migrations/versions/0002_policies.py"
GUARD = "if pg_try_advisory_xact_lock(hashtextextended('sqlqueue.turn ' || admit.queue, 0)) then"
FIRST = """            select admit.queue
            where not exists (select from sqlqueue.turn where queue = admit.queue)
"""


def apply(root: Path) -> None:
    replace(root, FILE, GUARD, "if true then")
    replace(
        root, FILE, FIRST, "            values (admit.queue)\n            on conflict do nothing\n"
    )
