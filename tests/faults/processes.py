"""Processes that start in milliseconds: forks of one that has imported everything."""

import datetime
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Self

from tests.harness import program


class Forks:
    """Runs Python code in processes of their own; all are killed at the end.

    The code finds `app`, the application of the tests on the database of `url`, and the modules
    `failpoints` and `datetime`.
    """

    def __init__(self, url: str, env: Mapping[str, str] | None = None) -> None:
        self._url, self._env = url, env
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        code = "from tests.faults import processes; processes.serve()"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = self._stack.enter_context(program(self._url, code, self._env, **pipes))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, code: str) -> int:
        """Run one line of code in a fork; return its process id."""
        pipes = self._process
        assert pipes.stdin
        assert pipes.stdout
        pipes.stdin.write(f"{code}\n".encode())
        pipes.stdin.flush()
        return int(pipes.stdout.readline())


def serve() -> None:
    """Be the process that is forked: take lines of code, and say the process id of each fork."""
    from tests import app
    from tests.faults import failpoints

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for code in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            exec(code, {"app": app, "failpoints": failpoints, "datetime": datetime})
            os._exit(0)
        print(pid, flush=True)
