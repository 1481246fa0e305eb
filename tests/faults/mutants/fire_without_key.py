"""An instant of a schedule makes a job however often it is fired."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r29 and instant"
TESTS = "tests/test_schedules.py"
IS_QUICK = True


def apply(root: Path) -> None:
    replace(
        root,
        "migrations/versions/0003_schedules.py",
        "    on conflict do nothing;\n    if not found then\n        return null;",
        "    on conflict (schedule, at) do update set job_id = null;\n"
        "    if not found then\n        return null;",
    )
