"""The results of the bars: written down by each run that asks for it, shown as a page of docs/.

A run with SQLQUEUE_BARS=FILE adds what it found to that JSON file: for each bar and tier the
verdict, date, commit, version of Postgres, and what the test printed (its figures and seed). A
result counts for the code it was found with: the trees of sqlqueue/ and migrations/. As a program
it writes the page: `python -m tests.faults.results docs/bars.json docs/bars.md`.
"""

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BARS = {
    1: "SIGKILL a random worker every 0.3 to 1 s",
    2: "SIGKILL a whole worker tree, another alive",
    3: "SIGKILL a worker process with a supervisor, or the supervisor",
    4: "a child process segfaults, exits, runs out of memory",
    5: "a job kills its worker, or the whole tree, every time",
    6: "each failpoint with SIGKILL, SIGSTOP, cut connections, crash of Postgres",
    7: "SIGTERM, then a second one",
    8: "timeout or cancel of a process job that ignores SIGTERM and has a child",
    9: "a thread or coroutine ignores its deadline",
    10: "SIGSTOP for 1 to 3 ttl in the middle of a job; mixed faults",
    11: "SIGSTOP between finish or claim and its commit",
    12: "loop, threads, upkeep or interpreter blocked for 3 ttl; the turn stuck",
    13: "a clock off by an hour either way",
    14: "immediate restarts of Postgres under load",
    15: "pg_terminate_backend five times a second",
    16: "promotion of a synchronous standby",
    17: "promotion of an asynchronous standby",
    18: "timeouts, deadlocks, serialization failures, 1 % each",
    19: "no connection to be had",
    20: "disk full",
    21: "every order of the verbs in two or three sessions",
    22: "reply to an enqueue's COMMIT swallowed",
    23: "reply to a finish's or claim's COMMIT swallowed; finish rolled back",
    24: "one worker black-holed",
    25: "a pooler in transaction mode",
    26: "races of the doorbell",
    27: "listener dead; notification queue full; two-phase enqueue",
    28: "workers busy, killed while armed, half idle: ringing costs little",
    29: "schedulers killed and paused; downtime; changes of clocks",
    30: "a concurrency limit under SIGKILL",
    31: "many enqueuers on one unique key",
    32: "horizon pinned, autovacuum off",
    33: "bloat: 1 M jobs, then a pin",
    34: "an enqueue committed late, below the floor",
    35: "overlapping REPEATABLE READ readers, pg_dump",
    36: "partitions dropped and missing",
    37: "soak at half load",
    38: "input that is refused, and all that is not",
    39: "the release before on this schema, and the reverse; migration under load",
    40: "mutants: each breaks its bar",
}
TIERS = ("CI", "nightly")


@dataclass
class Result:
    """What a run found of one bar in one tier.

    verdict   green, red, or inconclusive, which counts as red
    code      the trees of sqlqueue/ and migrations/ it was found with
    said      what its tests printed
    """

    verdict: str
    tests: int
    seconds: float
    date: str
    commit: str
    code: str
    postgres: str
    said: list[str]


class Recorder:
    """A pytest plugin that adds the results of the bars of this run to a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._found: dict[str, Result] = {}
        self._commit, self._code = commit(), code()
        self.postgres = "unknown"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take down one phase of a test, if it belongs to a bar."""
        match = re.search(r"::test_r(\d\d)_", report.nodeid)
        if not match or (report.when != "call" and report.passed):
            return
        tier = TIERS["nightly" in report.keywords]
        fresh = Result("green", 0, 0, today(), self._commit, self._code, "", [])
        result = self._found.setdefault(f"R{int(match[1])} {tier}", fresh)
        result.tests += 1
        result.seconds = round(result.seconds + report.duration, 1)
        said = [line for line in report.capstdout.splitlines() if line.strip()]
        result.said += said[-1:]
        if not report.passed:
            is_unsure = "inconclusive" in report.longreprtext
            result.verdict = "inconclusive" if is_unsure else "red"

    def pytest_sessionfinish(self) -> None:
        """Add the results to the file."""
        known = json.loads(self._file.read_text()) if self._file.exists() else {}
        known |= {
            name: asdict(replace(result, postgres=self.postgres))
            for name, result in self._found.items()
        }
        self._file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def today() -> str:
    """Return the date, in UTC."""
    return datetime.now(UTC).date().isoformat()


def commit() -> str:
    """Return the commit of the checkout, with a + if code or tests differ from it."""
    changed = _git("status", "--porcelain", "--", "sqlqueue", "migrations", "tests")
    return _git("rev-parse", "--short=9", "HEAD") + ("+" if changed else "")


def code() -> str:
    """Name the code that is tested: the trees of sqlqueue/ and migrations/."""
    return " ".join(_git("rev-parse", f"HEAD:{name}")[:12] for name in ("sqlqueue", "migrations"))


def _git(*words: str) -> str:
    found = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip()


# The page


def page(known: dict[str, Any]) -> str:
    """Write the page that shows these results."""
    return HEAD + "".join(
        _section(
            tier, {int(name.split()[0][1:]): one for name, one in known.items() if tier in name}
        )
        for tier in TIERS
    )


HEAD = """# Bars

What must hold under faults, and what the last runs found. Written by
`python -m tests.faults.results docs/bars.json docs/bars.md`; the results come from runs of
`make test` and `make nightly` with `SQLQUEUE_BARS=docs/bars.json`. The tests of bar R7 are those
that `pytest -k test_r07` runs. A bar is green only if its fault was seen to strike; what is
inconclusive counts as red. A result holds for the code it was found with, which its last
columns name: the commit, and the trees of `sqlqueue/` and `migrations/`.
"""


def _section(tier: str, results: dict[int, Any]) -> str:
    lines = [f"\n## {tier}\n"]
    lines.append("| bar | fault | verdict | tests, time | found | date, commit | code | Postgres |")
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for number, one in sorted(results.items()):
        said = "; ".join(dict.fromkeys(one["said"])).replace("|", "/")
        cells = [
            f"R{number}", BARS[number], one["verdict"], f"{one['tests']}, {one['seconds']:.0f} s",
            said[:300], f"{one['date']}, {one['commit']}", one["code"], one["postgres"],
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(page(json.loads(source.read_text())))
