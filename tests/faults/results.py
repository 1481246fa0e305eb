"""The results of the bars: written down by each run that asks for it, shown as a page of docs/.

A run with SQLQUEUE_BARS=FILE adds to that JSON file what each test of a bar found: verdict, date,
commit, version of Postgres, and what it printed last (its figures and seed). A result counts for
the code it was found with: the trees of sqlqueue/ and migrations/. As a program it writes the
page: `python -m tests.faults.results docs/bars.json docs/bars.md`; or, with one file, it says
which bars of CI are missing there or not green, and fails if there are such.
"""

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sqlqueue.embedded import Binaries, find_binaries

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
SAID = 400  # characters of what its tests said that the page shows of a bar
# In the long form alone; all others are in CI too.
ONLY_NIGHTLY = {13, 15, 16, 17, 19, 20, 24, 28, 33, 35, 37}
# In the short form alone.
ONLY_CI = {3, 4, 5, 7, 8, 9, 11, 12, 18, 22, 23, 26, 27, 31, 34, 36}


@dataclass(frozen=True)
class Result:
    """What a run found with one test of a bar.

    verdict   green, red, or inconclusive, which counts as red
    code      the trees of sqlqueue/ and migrations/ it was found with
    said      the last line that the test printed
    """

    bar: int
    tier: str
    verdict: str
    seconds: float
    date: str
    commit: str
    code: str
    postgres: str
    said: str


class Recorder:
    """A pytest plugin that adds the results of the bars of this run to a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._found: dict[str, Result] = {}
        self._commit, self._code = commit(), code()
        self._usual = Binaries.read(find_binaries()[0]).version  # of a test's own servers

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take down one phase of a test, if it belongs to a bar."""
        match = re.search(r"::test_r(\d\d)_", report.nodeid)
        if not match or (report.when != "call" and report.passed):
            return
        said = [line for line in report.capstdout.splitlines() if line.strip()]
        is_unsure = not report.passed and "inconclusive" in report.longreprtext
        self._found[report.nodeid] = Result(
            bar=int(match[1]),
            tier=TIERS["nightly" in report.keywords],
            verdict="green" if report.passed else "inconclusive" if is_unsure else "red",
            seconds=round(report.duration, 1),
            date=datetime.now(UTC).date().isoformat(),
            commit=self._commit,
            code=self._code,
            postgres=dict(report.user_properties).get("postgres", self._usual),
            said=said[-1] if said else "",
        )

    def pytest_sessionfinish(self) -> None:
        """Add the results to the file."""
        if self._found:
            known = json.loads(self._file.read_text()) if self._file.exists() else {}
            known |= {name: asdict(result) for name, result in self._found.items()}
            self._file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


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


def missing(known: dict[str, Any], tier: str) -> list[str]:
    """Return the bars of a tier that are not green, or have no result."""
    elsewhere = ONLY_NIGHTLY if tier == "CI" else ONLY_CI
    found = {number: verdict for number, (verdict, *_) in by_bar(known, tier).items()}
    numbers = [number for number in BARS if number not in elsewhere]
    return [f"R{number}" for number in numbers if found.get(number) != "green"]


def by_bar(known: dict[str, Any], tier: str) -> dict[int, tuple[str, list[Any]]]:
    """Return each bar's verdict, the worst of its tests, and their results."""
    found: dict[int, tuple[str, list[Any]]] = {}
    for _, one in sorted(known.items()):
        if one["tier"] == tier:
            verdict, results = found.get(one["bar"], ("green", []))
            verdict = one["verdict"] if verdict == "green" else verdict
            found[one["bar"]] = verdict, [*results, one]
    return dict(sorted(found.items()))


# The page


def page(known: dict[str, Any]) -> str:
    """Write the page that shows these results."""
    return HEAD + "".join(_section(tier, known) for tier in TIERS)


HEAD = """# Bars

What must hold under faults, and what the last runs found. Written by
`python -m tests.faults.results docs/bars.json docs/bars.md`; the results come from runs of
`make test` and `make nightly` with `SQLQUEUE_BARS=docs/bars.json`. The tests of bar R7 are those
that `pytest -k test_r07` runs. A bar is green only if its fault was seen to strike; what is
inconclusive counts as red. A result holds for the code it was found with, which its last
columns name: the commit, and the trees of `sqlqueue/` and `migrations/`.
"""


def _section(tier: str, known: dict[str, Any]) -> str:
    lines = [f"\n## {tier}\n"]
    lines.append("| bar | fault | verdict | tests, time | found | date, commit | code | Postgres |")
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for number, (verdict, results) in by_bar(known, tier).items():

        def all_of(*names: str, among: list[Any] = results) -> str:
            texts = (", ".join(str(one[name]) for name in names) for one in among)
            return "; ".join(dict.fromkeys(text for text in texts if text))

        time = f"{len(results)}, {sum(one['seconds'] for one in results):.0f} s"
        said = all_of("said").replace("|", "/")
        said = said if len(said) <= SAID else f"{said[:SAID]} …"
        cells = [f"R{number}", BARS[number], verdict, time, said, all_of("date", "commit")]
        lines.append(f"| {' | '.join([*cells, all_of('code'), all_of('postgres')])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    results = json.loads(Path(sys.argv[1]).read_text())
    if sys.argv[2:]:
        Path(sys.argv[2]).write_text(page(results))
    elif open_bars := missing(results, "CI"):
        sys.exit("not green: " + ", ".join(open_bars))
    else:
        print(f"{len(by_bar(results, 'CI'))} bars are green")
