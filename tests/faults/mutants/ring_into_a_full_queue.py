"""Who enqueues notifies a sleeping worker, whether or not there is room for notifications."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r27"


def apply(root: Path) -> None:
    """Break the checkout at `root`."""
    bound = "pg_notification_queue_usage() < 0.5"
    replace(root, "migrations/versions/0001_first.py", bound, "true")
