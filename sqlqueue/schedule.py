"""Schedules: a task, and the instants at which a job of it is enqueued.

A schedule is a row, declared in code or made at run time; workers read the row. Exactly one job
is enqueued for each instant, however many workers look, since an instant is a primary key.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile
from typing import Any
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from msgspec import Raw, json

from sqlqueue.options import check_name

MOST = 100  # missed instants that are enqueued in one transaction
LATE = timedelta(minutes=1)  # an instant this long ago was missed
ALIASES = {"@hourly": "0 * * * *", "@daily": "0 0 * * *", "@weekly": "0 0 * * 0"}
ALIASES |= {"@midnight": "0 0 * * *", "@monthly": "0 0 1 * *", "@yearly": "0 0 1 1 *"}
ALIASES["@annually"] = ALIASES["@yearly"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When jobs of a task are enqueued: by a cron line or at an interval.

    cron    five fields, six with seconds, or an alias such as @hourly. A line that names minutes
            and hours follows Debian's cron where clocks change: what falls into the hour that is
            left out runs right after it, what falls into the one that comes twice runs once.
            Lines that begin with * go by the time that passes.
    every   an interval instead, counted from the year 2000 in UTC
    tz      the time zone of the cron line
    missed  of the instants at which no worker was there: fire the "latest", "all" or "none"
    """

    cron: str | None = None
    every: timedelta | None = None
    tz: str = "UTC"
    missed: str = "latest"

    def __post_init__(self) -> None:
        if (self.cron is None) == (self.every is None):
            raise ValueError("give a schedule a cron line or an interval")
        if self.every is not None and self.every < timedelta(seconds=1):
            raise ValueError(f"every must be at least 1 s, got {self.every}")
        if self.missed not in ("latest", "all", "none"):
            raise ValueError(f"missed must be latest, all or none, got {self.missed!r}")
        try:
            next(self.after(datetime(2000, 1, 1, tzinfo=UTC)), None)
        except (CronSimError, OSError, ValueError, LookupError) as error:
            raise ValueError(f"cron {self.cron!r} in {self.tz!r}: {error}") from error

    def to_json(self, name: str, call: Any) -> str:
        """Write a row of the table, for a Call."""
        params = call.options.params
        options = {k: one for k, one in params.items() if one is not None or k == "timeout"}
        row = vars(self) | {"name": check_name("schedule", name), "task": call.task}
        row |= {"args": Raw(call.args.encode()), "options": options}
        return json.encode(row).decode()

    def after(self, instant: datetime) -> Iterator[datetime]:
        """Yield the instants after an aware one, in UTC, in order, without end."""
        if self.every is not None:
            anchor = datetime(2000, 1, 1, tzinfo=UTC)
            while True:
                instant = anchor + ((instant - anchor) // self.every + 1) * self.every
                yield instant
        line = ALIASES.get(self.cron or "", self.cron or "")
        for local in CronSim(line, instant.astimezone(ZoneInfo(self.tz))):
            at = local.astimezone(UTC)
            if at > instant:  # within an hour that comes twice it may begin with the first one
                instant = at
                yield at

    def due(self, since: datetime | None, now: datetime) -> tuple[list[datetime], datetime | None]:
        """Return the instants to fire, of those from `since` until now, and the next one.

        Without `since` it has just been set up, and fires from now on. The next one is not later
        than now if there are more than MOST to fire. None: there is no other.
        """
        if since is None:
            return [], next(self.after(now), None)
        past = takewhile(lambda at: at <= now, self.after(since - timedelta(microseconds=1)))
        if self.missed == "all":
            fired = list(islice(past, MOST))
            return fired, next(self.after(fired[-1] if fired else now), None)
        fired = [at for at in deque(past, maxlen=1) if self.missed == "latest" or now - at < LATE]
        return fired, next(self.after(now), None)


def due(row: Any) -> tuple[list[datetime], datetime | None, str | None]:
    """Return what `Schedule.due` does for a row, and what is wrong if it makes no sense."""
    try:
        schedule = Schedule(cron=row.cron, every=row.every, tz=row.tz, missed=row.missed)
        return *schedule.due(row.next_at, row.now), None
    except ValueError as error:
        return [], None, str(error)
