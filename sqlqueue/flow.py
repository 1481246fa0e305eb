"""What a worker counts of the runs that end, for charts and metrics, until it is written.

Counting costs no statement of its own: every ten seconds upkeep adds the sums to a table.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import ceil, log2
from typing import Any

from sqlqueue.store import Ended


class Flow:
    """Counts by queue, task, end of the run, and how long it waited and ran; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[Any, ...]] = Counter()

    def add(self, ended: Iterable[tuple[Any, Any]]) -> None:
        """Count runs and their ends; None for one whose task finished its job itself."""
        told = [(run, one or Ended("", 0, "succeeded", None, run.ran)) for run, one in ended]
        keys = [
            (r.queue, r.task, one.outcome, one.wait is None, *map(bucket, (r.row.waited, one.ran)))
            for r, one in told
        ]
        with self._lock:
            self._counts.update(keys)

    @contextmanager
    def taken(self) -> Iterator[str]:
        """Lend the counts as JSON rows: each key and its number; what is not written is kept."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        try:
            yield json.dumps([(*key, number) for key, number in counts.items()])
        except BaseException:
            with self._lock:
                self._counts.update(counts)
            raise


def bucket(seconds: float | None) -> int | None:
    """Return the bucket of a histogram in which a time is: bucket i ends at 2^(i/2) ms."""
    return None if seconds is None else min(max(ceil(2 * log2(max(seconds, 1e-9) * 1000)), 0), 47)
