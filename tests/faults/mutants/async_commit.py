"""Commits are acknowledged before they are flushed to disk."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r14"
TESTS = "tests/faults/test_server.py"


def apply(root: Path) -> None:
    replace(
        root,
        "sqlqueue/queue.py",
        "create_engine(database, hide_parameters=True, max_overflow=100)",
        "create_engine(database, hide_parameters=True, max_overflow=100,"
        " connect_args={'options': '-c synchronous_commit=off'})",
    )
