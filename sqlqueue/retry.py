"""What happens after a failure: the policy, its form in the row, and the wait it draws."""

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec

LONGEST = timedelta(days=36500)  # that a wait, delay or timeout may be
if TYPE_CHECKING:
    ErrorClass = type[BaseException] | str
else:
    ErrorClass = str  # as it is read from the row


@dataclass(frozen=True, kw_only=True)
class Retry:
    """When to run a failed job again.

    attempts    runs that may fail, the first included; at least 1
    base        longest wait after the first failure, if there are no `waits`
    limit       longest wait after any failure; at least `base`
    waits       the wait after each failure, the last one for all that follow: one is a fixed wait
    give_up_on  exception classes after which the job ends at once
    by_error    another policy for some exception classes; the first that matches counts
    decide      called with the exception and the number of failures: the wait, or None to end

    Classes match by name, with their subclasses; they may be given as text, "package.Error".
    Everything but `decide` is written to the job; `decide` is asked of the task as the worker
    knows it.
    """

    attempts: int = 10
    base: timedelta = timedelta(seconds=2)
    limit: timedelta = timedelta(hours=1)
    waits: Sequence[timedelta] = ()
    give_up_on: Sequence[ErrorClass] = ()
    by_error: Mapping[ErrorClass, "Retry"] = field(default_factory=dict)
    decide: Callable[[BaseException, int], timedelta | None] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.attempts <= 32767:
            raise ValueError(f"attempts must be from 1 to 32767, got {self.attempts}")
        if not timedelta(0) < self.base <= self.limit:
            raise ValueError(f"need 0 < base <= limit, got {self.base}, {self.limit}")
        if any(not timedelta(0) <= wait <= LONGEST for wait in (*self.waits, self.limit)):
            raise ValueError(f"waits and limit must be from 0 to {LONGEST.days} days")

        if any(policy.decide or policy.by_error for policy in self.by_error.values()):
            raise ValueError("a policy in by_error may have no decide and no by_error")

    def to_json(self) -> str | None:
        """Write the policy for the job's row; None for the default waits.

        The number of attempts is not in it: it has a column of its own.
        """
        stored = _plain(replace(self, by_error={}, attempts=Retry.attempts))
        stored = {name: value for name, value in stored.items() if value != USUAL[name]}
        if self.by_error:  # as pairs: in a JSON object of Postgres they would lose their order
            pairs = [(class_name(one), _plain(policy)) for one, policy in self.by_error.items()]
            stored["by_error"] = pairs
        return json.dumps(stored) if stored else None

    @classmethod
    def from_json(cls, attempts: int, text: str | None, declared: "Retry | None" = None) -> "Retry":
        """Read the policy from the job's row; `declared` is the task's own, for its `decide`.

        Raises ValueError for what is no policy.
        """
        stored = json.loads(text) if text else {}
        stored |= {"attempts": attempts, "by_error": dict(stored.get("by_error", ()))}
        decide = declared.decide if stored.pop("decide", None) and declared else None
        return replace(msgspec.convert(stored, cls, strict=False), decide=decide)

    def wait(
        self, error: BaseException, failures: int, rng: random.Random | None = None
    ) -> timedelta | None:
        """Return the wait before the next run of a job that has failed `failures` times.

        None says that the job ends as failed. Raises ValueError unless `failures` is at least 1.
        """
        names = {class_name(one) for one in type(error).__mro__}
        for one, policy in self.by_error.items():
            if class_name(one) in names:
                return policy.wait(error, failures, rng)
        if failures >= self.attempts or any(class_name(one) in names for one in self.give_up_on):
            return None
        if self.decide:
            return self.decide(error, failures)
        if self.waits:
            return self.waits[min(failures, len(self.waits)) - 1]
        return self.backoff(failures, rng or random.Random())

    def backoff(self, failures: int, rng: random.Random) -> timedelta:
        """Draw a wait between zero and a ceiling that doubles from `base` up to `limit`.

        The whole range is random, not only its tail, so that jobs which failed together do not
        come back together.

        Raises ValueError unless `failures` is at least 1.
        Source: M. Brooker, "Exponential Backoff And Jitter" (AWS, 2015), "full jitter".
        """
        if failures < 1:
            raise ValueError(f"failures must be at least 1, got {failures}")
        # No more doublings than reach the limit: others would overflow timedelta long before a job
        # with many attempts reaches its last one.
        doublings = min(failures - 1, math.ceil(math.log2(self.limit / self.base)))
        return min(self.base * (1 << doublings), self.limit) * rng.random()


def _plain(policy: Retry) -> Any:
    """Write a policy as JSON has it: classes by name, times as in ISO 8601, `decide` as true."""
    names = [class_name(one) for one in policy.give_up_on]
    return msgspec.to_builtins(replace(policy, give_up_on=names), enc_hook=lambda _: True)


USUAL = _plain(Retry())


def class_name(one: ErrorClass) -> str:
    """Return the full name of an exception class, `ValueError` or `package.module.Error`."""
    if isinstance(one, str):
        return one
    where = "" if one.__module__ == "builtins" else f"{one.__module__}."
    return f"{where}{one.__qualname__}"


def unsaid(error: BaseException) -> Exception:
    """Return what can be logged of an error: its traceback and class; its message may be secret."""
    return Exception(class_name(type(error))).with_traceback(error.__traceback__)
