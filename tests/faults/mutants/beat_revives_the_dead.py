"""A worker that was declared dead, or is silent for too long, beats and lives on."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r21"
TESTS = "tests/faults/test_permute.py"
CONDITION = "          and died_at is null\n          and heartbeat_at > now() - ttl\n"
BEATS = "    set heartbeat_at = now(),\n        told = case was.told"
REVIVES = BEATS.replace("now(),", "now(), died_at = null,")


def apply(root: Path) -> None:
    replace(root, "migrations/versions/0004_reports.py", CONDITION, "")
    replace(root, "migrations/versions/0004_reports.py", BEATS, REVIVES)
