"""A run finishes its job in a transaction beside that of its writes."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r10"
TESTS = "tests/faults/test_pauses.py"
FINISH = "            finished = self._store.finish(conn, [ended], self._patience)\n"
BESIDE = """            with self.registered.queue.engine.begin() as own:
                finished = self._store.finish(own, [ended], self._patience)
"""


def apply(root: Path) -> None:
    replace(root, "sqlqueue/run.py", FINISH, BESIDE)
