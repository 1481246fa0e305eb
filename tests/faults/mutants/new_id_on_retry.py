"""An enqueue that is tried again, because its commit got no reply, is given a new id."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r22"
TESTS = "tests/faults/test_network.py"
IS_QUICK = True


def apply(root: Path) -> None:
    replace(
        root,
        "sqlqueue/queue.py",
        "                    return self._add(conn, [call])\n",
        "                    return self._add(conn, [call._replace(id=new_id())])\n",
    )
