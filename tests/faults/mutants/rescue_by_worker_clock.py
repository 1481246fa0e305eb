"""A worker is declared dead by the clock of the worker that looks."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r13"
TESTS = "tests/faults/test_pauses.py"
TIER = "nightly"
FIRST = "        ended = []\n        for row in self.orphans("
BY_OWN_CLOCK = """        import time

        conn.exec_driver_sql(
            "update sqlqueue.worker set died_at = now()"
            " where died_at is null and heartbeat_at < to_timestamp(%s) - ttl", (time.time(),)
        )
"""


def apply(root: Path) -> None:
    replace(root, "sqlqueue/store.py", FIRST, BY_OWN_CLOCK + FIRST)
