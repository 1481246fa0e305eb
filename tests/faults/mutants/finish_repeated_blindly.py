"""A finish that took no effect is repeated without looking whether its lease is still there."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r23"
TESTS = "tests/faults/test_network.py"


def apply(root: Path) -> None:
    replace(
        root,
        "sqlqueue/worker.py",
        "return finished, store.held(conn, left) if left else set()",
        "return finished, {key[0] for key in left}",
    )
