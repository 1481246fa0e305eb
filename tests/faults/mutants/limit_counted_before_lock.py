"""The places of a limit are counted before the row is locked under which they are given."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r30"
TESTS = "tests/test_limits.py"
COUNT = "    in_queue := sqlqueue.room_in(of_queue, null);\n"
LOCK = "    select flow into last_flow\n    from sqlqueue.turn\n"
POLICY = """    select policy.* into of_queue
    from sqlqueue.policy
    where scope = 'queue' and name = admit.queue;
"""


def apply(root: Path) -> None:
    file = "migrations/versions/0002_policies.py"
    replace(root, file, COUNT, "")
    replace(root, file, LOCK, POLICY + COUNT + "    perform pg_sleep(0.02);\n" + LOCK)
