"""A worker does not see that it holds leases which it does not know of."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r23"
TESTS = "tests/faults/test_network.py"


def apply(root: Path) -> None:
    replace(
        root,
        "sqlqueue/heartbeat.py",
        "unknown = set(leases) - known - set(worker.runs.held.copy())",
        "unknown = set(known) - known",
    )
