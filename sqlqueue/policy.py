"""The rules under which jobs wait: unique keys, limits, rates, shares, order."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from hashlib import sha256
from typing import Any


@dataclass(frozen=True)
class Rate:
    """A weight of jobs for each period, and how much of it may come at once.

    burst  what may be admitted at once after a pause; None: that of a whole period
    """

    jobs: float
    per: timedelta
    burst: float | None = None

    def __post_init__(self) -> None:
        if self.jobs <= 0 or self.per <= timedelta(0) or (self.burst or 1) < 1:
            raise ValueError("a rate needs jobs and per above 0, and a burst of at least 1")


@dataclass(frozen=True, kw_only=True)
class Unique:
    """Of jobs with the same key, only one exists at a time.

    by           what makes the key: the names of arguments, None for all of them, () for none:
                 one job of the task
    key          a key of one's own instead, the same for whatever tasks use it
    until        when the key is free again: the job has "ended", or "started" for the first time
    period       not before this, counted from the enqueuing
    on_conflict  "skip": enqueue returns the job there is; "raise": DuplicateJob; "replace": that
                 job is cancelled, a running one as soon as it can be; "debounce": it returns the
                 job there is, whose `delay` begins anew
    longest      longest time that debouncing may put a job off
    """

    by: tuple[str, ...] | None = None
    key: str | None = None
    until: str = "ended"
    period: timedelta | None = None
    on_conflict: str = "skip"
    longest: timedelta | None = None

    def __post_init__(self) -> None:
        if self.until not in ("ended", "started"):
            raise ValueError(f"until must be ended or started, got {self.until!r}")
        if self.on_conflict not in ("skip", "raise", "replace", "debounce"):
            raise ValueError("on_conflict must be skip, raise, replace or debounce")
        if isinstance(self.by, str):
            raise TypeError("by must be a tuple of names, not one string")

    def key_of(self, task: str, args: str) -> str:
        """Return the key of a call whose arguments are given as JSON text."""
        if self.key is not None:
            return self.key
        named = json.loads(args)
        if self.by is not None:
            named = {name: named.get(name) for name in self.by}
        text = json.dumps(named, sort_keys=True)
        return f"{task} {sha256(text.encode()).hexdigest()}"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What the jobs of one queue, or of one task in all queues, have to wait for.

    Without any of these, keys of a queue take turns all the same: that is its fairness.

    concurrency          jobs that run at a time
    concurrency_per_key  of these, with the same `key`
    rate, rate_per_key   how many are started in a time
    keeps_order          a job of a key starts only after the one before it has ended, with all
                         its retries
    ageing               waiting for this long is worth one step of priority
    max_waiting          jobs that may wait: more are refused with QueueFull
    breaks_after         runs that fail one after another, after which nothing is started for
    breaks_for           this long, then one job at a time until one succeeds
    shares               jobs of a key, for each turn of it; 1 for those not named (queues only)
    """

    concurrency: int | None = None
    concurrency_per_key: int | None = None
    rate: Rate | None = None
    rate_per_key: Rate | None = None
    keeps_order: bool = False
    ageing: timedelta | None = None
    max_waiting: int | None = None
    breaks_after: int | None = None
    breaks_for: timedelta | None = None
    shares: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("concurrency", "concurrency_per_key", "max_waiting", "breaks_after"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {limit}")
        for name in ("ageing", "breaks_for"):
            if (span := getattr(self, name)) is not None and span <= timedelta(0):
                raise ValueError(f"{name} must be more than 0, or None, got {span}")
        if (self.breaks_after is None) != (self.breaks_for is None):
            raise ValueError("give breaks_after and breaks_for, or neither")
        if any(weight < 1 for weight in self.shares.values()):
            raise ValueError("a share must be at least 1")

    def to_json(self) -> str:
        """Write the rules as the function set_policy takes them."""
        rules: dict[str, Any] = asdict(self)
        for name in ("rate", "rate_per_key"):
            if rate := getattr(self, name):
                rules[name] = rate.jobs / rate.per.total_seconds()
                rules[name.replace("rate", "burst")] = rate.burst or max(rate.jobs, 1)
        for name in ("ageing", "breaks_for"):
            rules[name] = rules[name] and f"{rules[name].total_seconds()} s"
        return json.dumps(rules)
