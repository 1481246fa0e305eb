"""The options of a job: what they are, and which values are refused.

Options are resolved once, at enqueue (call, then task, then queue, then default), and written
to the job. A worker reads the row, never the configuration of whoever enqueued.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

from sqlqueue.literal import array
from sqlqueue.policy import Unique
from sqlqueue.retry import LONGEST, Retry

NAME = re.compile(r"[A-Za-z0-9_.:-]{1,100}")
MAX_HEADER_BYTES = 8 * 1024
MAX_KEY_BYTES = 1000  # what fits into an index together with the name of a task
RANGES = {"priority": (-100, 100), "max_crashes": (1, 32767), "weight": (1, 1_000_000)}
EXECUTORS = ("async", "thread", "process")
# Options that are stored in a column of the same name, as they are.
PLAIN = ("queue", "priority", "delay", "run_at", "timeout", "max_crashes", "executor", "keep",
    "description", "key")  # fmt: skip


def check_name(what: str, name: str) -> str:
    """Return `name`, or raise ValueError if it is no name of a task or queue."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"{what} must match {NAME.pattern}, got {name!r}")
    return name


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a job is to be run.

    queue        where it waits
    priority     -100 to 100, small is urgent
    delay        not to start before this has passed, from the enqueuing transaction's start
    run_at       not to start before this instant
    expires      ends as expired unless started within this time, or by this instant
    timeout      longest running time of one run; None for no limit
    retry        what happens after a failure
    max_crashes  runs that took their worker down after which it ends as failed
    executor     async, thread or process; None: by the kind of function
    keep         whether the value of the result is stored
    tags         words for people and tools
    description  for people
    headers      strings by name, for tools; at most 8 KiB as JSON
    key          what limits, shares and order go by, where its queue or task has a Policy; at most
                 1,000 bytes
    weight       what it takes of a rate
    unique       that only one such job exists at a time
    log_level    records of `logging` from this level on are kept with the job; as the task says
                 where it runs, whatever the call says
    wait_if_full  how long `enqueue`, in a transaction of its own, waits for room in a full queue
    redact       paths in arguments and result, such as card.*, that nobody is shown
    """

    queue: str = "default"
    priority: int = 0
    delay: timedelta | None = None
    run_at: datetime | None = None
    expires: timedelta | datetime | None = None
    timeout: timedelta | None = timedelta(minutes=5)
    retry: Retry = field(default_factory=Retry)
    max_crashes: int = 3
    executor: str | None = None
    keep: bool = True
    tags: Sequence[str] = ()
    description: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None
    weight: int = 1
    unique: Unique | None = None
    log_level: int = logging.INFO
    wait_if_full: timedelta | None = None
    redact: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_name("queue", self.queue)
        for name, kind in _KINDS.items():
            if not isinstance(value := getattr(self, name), kind):
                raise TypeError(f"{name} must be {kind}, got a {type(value).__name__}")
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {getattr(self, name)}")
        if self.delay is not None and self.run_at is not None:
            raise ValueError("give delay or run_at, not both")
        for name in ("delay", "run_at", "expires"):
            time = getattr(self, name)
            if isinstance(time, timedelta) and not timedelta(0) <= time <= LONGEST:
                raise ValueError(f"{name} must be from 0 to {LONGEST.days} days, got {time}")
            if isinstance(time, datetime) and time.utcoffset() is None:
                raise ValueError(f"{name} must be an aware datetime, one with a time zone")
            if isinstance(time, datetime) and not 1 < time.year < 9999:
                raise ValueError(f"{name} must be between the years 1 and 9999")
        if self.timeout is not None and not timedelta(0) < self.timeout <= LONGEST:
            raise ValueError(f"timeout must be more than 0, or None, got {self.timeout}")
        if self.unique and self.unique.on_conflict == "debounce" and self.delay is None:
            raise ValueError("debounce puts off a delayed job: give it a delay")
        if self.executor not in (None, *EXECUTORS):
            raise ValueError(f"executor must be one of {EXECUTORS}, got {self.executor!r}")
        self._check_words()

    def _check_words(self) -> None:
        keys = [self.key or "", (self.unique and self.unique.key) or ""]
        words = [*self.tags, *self.headers, *self.headers.values(), self.description or "", *keys]
        if isinstance(self.tags, str) or not all(isinstance(word, str) for word in words):
            raise TypeError("tags must be a sequence of strings, and headers and keys be strings")
        text = "".join(words)
        if "\0" in text or text.encode(errors="ignore").decode() != text:
            raise ValueError("tags, description, key and headers must hold no NUL or surrogate")
        if any(len(key.encode()) > MAX_KEY_BYTES for key in keys):
            raise ValueError(f"a key must be at most {MAX_KEY_BYTES} bytes")
        if len(json.dumps(dict(self.headers)).encode()) > MAX_HEADER_BYTES:
            raise ValueError(f"headers must be at most {MAX_HEADER_BYTES} bytes as JSON")

    def changed(self, changes: Mapping[str, Any]) -> "Options":
        """Return these options with some changed.

        Raises TypeError for a name that is no option, ValueError for a value that is refused.
        """
        names = [one.name for one in fields(self)]
        if unknown := changes.keys() - set(names):
            raise TypeError(f"unknown option {min(unknown)!r}; the options are {', '.join(names)}")
        return replace(self, **changes) if changes else self

    @cached_property
    def identity(self) -> tuple[object, ...]:
        """The same for options that are stored the same."""
        return (self.unique, *self.params.values())

    @cached_property
    def params(self) -> dict[str, str | None]:
        """The parameters of enqueue.sql, as text; made once, since tasks share their options."""
        is_relative = isinstance(self.expires, timedelta)
        stored = {name: getattr(self, name) for name in PLAIN} | {
            "attempts": self.retry.attempts,
            "retry": self.retry.to_json(),
            "expires_in": self.expires if is_relative else None,
            "expires_at": None if is_relative else self.expires,
            "tags": array(self.tags) if self.tags else None,
            "headers": json.dumps(dict(self.headers)) if self.headers else None,
            "weight": None if self.weight == 1 else self.weight,
        }
        return {name: _text(value) for name, value in stored.items()}


# What each option has to be, as far as that can be seen from outside.
_KINDS: Any = {n: getattr(kind, "__origin__", kind) for n, kind in Options.__annotations__.items()}


def _text(value: object) -> str | None:
    if isinstance(value, timedelta):
        return f"{value // timedelta(microseconds=1)} us"
    if isinstance(value, datetime | int):  # Postgres knows fewer zones, and no names of an enum
        value = value.astimezone(UTC) if isinstance(value, datetime) else int(value)
    return None if value is None else str(value)
