"""Where a worker looks for jobs: its queues, their lanes, and the floor of each."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from sqlqueue.options import check_name
from sqlqueue.store import Lane

TRAIL = 0.2  # seconds: the longest transaction whose jobs are found without a sweep


@dataclass
class Floor:
    """The seq below which a lane holds dead rows, and now and then a late job.

    A snapshot held open elsewhere keeps the index entries of claimed jobs, and a claim would walk
    over all of them. Rows are consumed nearly in order of seq, so a claim starts at the highest
    seq seen. Jobs commit out of that order, so what was seen counts only after TRAIL. It is a
    hint: sweeps, which start at 0, find what was committed later still.
    """

    value: int = 0
    seen: int = 0
    marked: int = 0
    marked_at: float = 0

    def see(self, rows: Sequence[Any], began: float) -> None:
        """Take note of the rows of a claim that began then, in order of seq; there may be none.

        The floor follows what was seen at least TRAIL before this claim. Where a sweep found rows
        below it, there may be more, such as the jobs of a worker that died: it begins again there.
        """
        if rows and rows[0].seq <= self.value:
            self.value = self.marked = rows[0].seq - 1
            self.seen, self.marked_at = rows[-1].seq, monotonic()
        elif rows:
            self.seen = max(self.seen, rows[-1].seq)
        if began - self.marked_at >= TRAIL:
            self.value, self.marked, self.marked_at = self.marked, self.seen, monotonic()


@dataclass
class Lanes:
    """The lanes that a worker knows, in the order in which it looks at them.

    queues  names, with a weight or None: without weights they are looked at in order, with one
            each turn begins at a queue drawn by weight
    """

    queues: dict[str, int | None]
    floors: dict[Lane, Floor] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Iterable[str]) -> "Lanes":
        """Read `NAME` and `NAME:WEIGHT`. Raises ValueError for what is neither."""
        queues: dict[str, int | None] = {}
        for text in names:
            name, colon, weight = text.rpartition(":")
            if colon and weight.isdecimal():
                if int(weight) < 1:
                    raise ValueError(f"a weight must be at least 1, got {text}")
                queues[check_name("queue", name)] = int(weight)
            else:
                queues[check_name("queue", text)] = None
        return cls(queues)

    @property
    def names(self) -> list[str]:
        """The queues, in order."""
        return list(self.queues)

    def add(self, lane: Lane) -> None:
        """Know one more lane, if it is of a queue served."""
        if lane.queue in self.queues and lane not in self.floors:
            self.floors[lane] = Floor()

    def in_queue(self, queue: str, is_suspect: bool) -> list[Lane]:
        """Return the lanes known of a queue, in the order to look at them: by priority."""
        mine = [lane for lane in self.floors if lane.queue == queue]
        return sorted(lane for lane in mine if lane.is_suspect == is_suspect)

    def draw(self) -> list[str]:
        """Return the queues in the order to look at them this time."""
        if all(weight is None for weight in self.queues.values()):
            return self.names
        # Efraimidis and Spirakis, "Weighted random sampling with a reservoir" (2006): sorting by
        # u ** (1 / weight) draws without replacement, each time in proportion to the weights.
        return sorted(self.queues, key=lambda q: -(random.random() ** (1 / (self.queues[q] or 1))))


class Sweeps:
    """When to look at everything: each `interval`, but for at most 5 % of the time."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._began = 0.0
        self.next_at = 0.0

    def begin(self) -> bool:
        """Say whether it is time; then one begins now."""
        self._began = monotonic()
        return self._began >= self.next_at

    def end(self) -> None:
        """Take note of the end of one that has begun."""
        now = monotonic()
        self.next_at = now + max(self._interval, 20 * (now - self._began))
