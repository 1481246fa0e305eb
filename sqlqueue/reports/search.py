"""The search for jobs that dashboard and command line share.

    state:failed,ready queue:mail task:mail.* tag:vip since:2h args.user.id:42 "free text"

Terms are joined by and; a comma is or, `-` in front negates, `*` is a glob. Jobs of each state that
lives are looked through from the newest on, DEPTH deep, and so is the history: a search never reads
all of it, and says how far it looked. Values are always parameters.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from heapq import merge
from itertools import islice
from typing import Any, NamedTuple
from uuid import UUID

from sqlqueue.reports import Reports

DEPTH = 100_000  # jobs that are looked at, of each state that lives and of those that ended
LONGEST = 2000  # characters of a search
MARGIN = "interval '1 day'"  # by which the time in an id may differ from that of the database
AGES = timedelta(days=36500)  # before all jobs
SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
LIVE = ("scheduled", "waiting", "ready", "running")
STATES = (*LIVE, "succeeded", "cancelled", "expired", "failed")
ENDED = {*STATES} - {*LIVE}
_WORD = re.compile(r'\s*(-?)(?:([A-Za-z_][\w.-]*):)?((?:"(?:[^"\\]|\\.)*"|[^\s",]|,)+|)', re.DOTALL)
_PART = re.compile(r'"((?:[^"\\]|\\.)*)"|([^,"]+)', re.DOTALL)
_PLANNER = """
select set_config('jit', 'off', true), set_config('enable_hashjoin', :joins, true),
    set_config('enable_mergejoin', :joins, true), set_config('enable_sort', :sorts, true)
"""
_LIVE = """
select id from (
    select *, cast(null as jsonb) as result, cast(null as text) as error_type,
        cast(null as text) as error, cast(null as text) as fingerprint
    from sqlqueue.live
) as job
where state = '{}'
"""
_ENDED = "select id from sqlqueue.ended where true"
_FINAL = "sqlqueue.run where is_final"
_FAILED = " and outcome in ('failed', 'timed_out', 'crashed')"


class Place(NamedTuple):
    """Where jobs of some states are looked for.

    query   what finds them
    table   what says how far it may look
    column  what orders that
    """

    query: str
    table: str
    column: str = "job_id"


_PLACES = {
    "scheduled": Place(_LIVE.format("scheduled"), "sqlqueue.scheduled where true"),
    "waiting": Place(_LIVE.format("waiting"), "sqlqueue.waiting where true"),
    "ready": Place(_LIVE.format("ready"), "sqlqueue.ready where true"),
    "running": Place(_LIVE.format("running"), "sqlqueue.lease where true"),
}
_HISTORY = Place(_ENDED, _FINAL)
# Failures alone have an index of theirs, by time, which reaches further back.
_FAILURES = Place(_ENDED + _FAILED, _FINAL + _FAILED, "ended_at")


class SearchError(ValueError):
    """The search cannot be understood; the message says why and what is near."""


class Value(NamedTuple):
    """One of the alternatives of a term; what is quoted is taken as it is."""

    text: str
    is_quoted: bool


@dataclass
class Found:
    """The ids of jobs that fit, newest first.

    looked_back_to  how far back it looked, if it did not look at all jobs that there are
    """

    ids: list[UUID]
    looked_back_to: datetime | None = None


# Keys that ask for a column, and how.
_COLUMNS = {
    "queue": ("like", "queue"),
    "task": ("like", "task"),
    "key": ("like", "key"),
    "unique": ("like", "unique_key"),
    "group": ("like", "fingerprint"),
    "priority": ("number", "priority"),
    "attempt": ("number", "attempt"),
    "run": ("number", "run"),
    "waited": ("span", "waited"),
    "ran": ("span", "ran"),
    "since": ("instant", ">="),
    "until": ("instant", "<="),
    "args": ("json", "args"),
    "headers": ("json", "headers"),
    "result": ("json", "result"),
}
_KEYS = ("state", *_COLUMNS, "tag", "worker", "id", "error", "reason")
_PATHS = ("args", "headers", "result")
_OF_ENDED = ("group", "error", "result")


class Search:
    """A search that was understood: conditions on jobs, and their parameters.

    text    what was asked for
    states  those that the jobs may be in; may be narrowed

    Raises SearchError, which names the nearest key to one that is unknown.
    """

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise SearchError(f"a search has at most {LONGEST} characters")
        if "\0" in text or text.encode(errors="ignore").decode() != text:
            raise SearchError("a search holds no NUL and no lone surrogate")
        self.text = text.strip()
        self.states = set(STATES)
        self._conditions: list[str] = []
        self._bounds: list[str] = []  # what they say of the order of ids
        self._params: dict[str, Any] = {}
        place = 0
        while rest := text[place:].strip():
            match = _WORD.match(text, place)
            if not match or match.end() == place or not (match[2] or match[3]):
                raise SearchError(f"cannot read {rest[:40]!r}: a quote is open?")
            place = match.end()
            self._add(match[1] == "-", match[2], match[3])

    def find(self, reports: Reports, limit: int, before: UUID | None = None) -> Found:
        """Return up to `limit` jobs that fit, newest first, older than `before`.

        Opens no transaction: give it one, in which settings of the planner are changed.
        """
        params = self._params | {"most": limit, "before": before, "states": list(self.states)}
        conditions = [
            *self._conditions,
            *(() if self.states >= ENDED else ["state = any (:states)"]),
        ]
        found: list[list[UUID]] = []
        reached: list[datetime] = []
        for place in self._places():
            terms = [place.query, *conditions, *(["id < :before"] if before else [])]
            floor = self._floor(reports, place, params) if conditions else None
            if floor:
                terms.append(f"{place.column.removeprefix('job_')} > :floor")
            # Failures are sorted; all else comes in the order of its ids, and stops early.
            sorts = "on" if place is _FAILURES else "off"
            reports.rows(_PLANNER, joins="off", sorts=sorts)
            query = f"{' and '.join(terms)} order by id desc limit :most"
            found.append([row["id"] for row in reports.rows(query, **params, floor=floor)])
            if floor and len(found[-1]) < limit:
                is_time = isinstance(floor, datetime)
                reached.append(
                    floor if is_time else datetime.fromtimestamp((floor.int >> 80) / 1000, UTC)
                )
        reports.rows(_PLANNER, joins="on", sorts="on")
        ids = list(islice(merge(*found, reverse=True), limit))
        return Found(ids, None if len(ids) >= limit or not reached else max(reached))

    def _floor(self, reports: Reports, place: Place, params: dict[str, Any]) -> Any:
        """Return the id or time of the job that is DEPTH deep; None if there are fewer."""
        table, column = place.table, place.column
        terms = [table, *self._bounds, *(["job_id < :before"] if params["before"] else [])]
        query = f"select {column} from {' and '.join(terms)} order by {column} desc"
        rows = reports.rows(f"{query} offset {DEPTH} limit 1", **params)
        return rows[0][column] if rows else None

    def _places(self) -> list[Place]:
        live = [place for state, place in _PLACES.items() if state in self.states]
        ended = self.states & ENDED
        if ended == {"failed"}:
            return [*live, _FAILURES]
        return [*live, _HISTORY] if ended else live

    # Terms

    def _add(self, is_negated: bool, key: str | None, text: str) -> None:
        name, _, path = (key or "text").partition(".")
        if key and (name not in _KEYS or (path and name not in _PATHS)):
            near = get_close_matches(key, _KEYS, 1)
            hint = f"did you mean {near[0]}:?" if near else f"known: {', '.join(_KEYS)}"
            raise SearchError(f"there is no key {key}: {hint}")
        if key in ("args", "headers"):
            raise SearchError(f"{key} needs a path, such as {key}.user.id:42")
        values = [
            Value(one[2] or re.sub(r"\\(.)", r"\1", one[1]), one[2] is None)
            for one in _PART.finditer(text)
        ]
        if not values:
            raise SearchError(f"{key}: needs a value")
        if name == "state":
            self._choose(is_negated, {value.text for value in values})
            return
        whole = [_uuid(value.text) for value in values] if name == "id" else [None]
        known = len(self._bounds)
        if None not in whole:
            each = [f"id = any ({self._param(whole)})"]
            self._bounds.append(f"job_{each[0]}")
        else:
            kind, column = _COLUMNS.get(name, (name, ""))
            make = getattr(self, f"_{kind}")
            each = [make(value, column, path) for value in values]
        if is_negated or len(each) > 1:
            del self._bounds[known:]  # it is not so simple then
        if is_negated:
            self._conditions.append(f"not coalesce({' or '.join(each)}, false)")
            return
        self._conditions.append(f"({' or '.join(each)})")
        if name in _OF_ENDED:
            self.states -= {*LIVE}

    def _choose(self, is_negated: bool, states: set[str]) -> None:
        if unknown := states - {*STATES}:
            near = get_close_matches(min(unknown), STATES, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(STATES)}"
            raise SearchError(f"there is no state {min(unknown)}: {hint}")
        self.states &= {*STATES} - states if is_negated else states

    def _param(self, value: Any) -> str:
        name = f"p{len(self._params)}"
        self._params[name] = value
        return f":{name}"

    def _like(self, value: Value, column: str, _path: str = "") -> str:
        if "*" not in value.text or value.is_quoted:
            return f"{column} = {self._param(value.text)}"
        return f"{column} like {self._param(_pattern(value.text))}"

    def _text(self, value: Value, *_: str) -> str:
        name = self._param(f"%{_pattern(value.text, star='*')}%")
        return " or ".join(f"{column} ilike {name}" for column in ("task", "error_type", "error"))

    def _tag(self, value: Value, *_: str) -> str:
        return f"exists (select from unnest(tags) as tag where {self._like(value, 'tag')})"

    def _worker(self, value: Value, *_: str) -> str:
        if value.text.isdigit() and len(value.text) < 19:
            return f"worker_id = {self._param(int(value.text))}"
        named = self._like(value, "worker.name")
        return f"exists (select from sqlqueue.worker where worker.id = worker_id and {named})"

    def _id(self, value: Value, *_: str) -> str:
        if not re.fullmatch(r"[0-9a-f]{4,12}", value.text.lower()):
            raise SearchError(f"id:{value.text} is neither an id nor its last 4 to 12 characters")
        return f"cast(id as text) like {self._param('%' + value.text.lower())}"

    def _error(self, value: Value, *_: str) -> str:
        name = self._param(_pattern(value.text))
        return f"error_type like {name} or error like {name}"

    def _reason(self, value: Value, *_: str) -> str:
        if value.text != "retry":
            raise SearchError("reason: knows retry")
        self.states &= {"scheduled"}
        return "reason = 'retry'"

    def _instant(self, value: Value, sign: str, _path: str) -> str:
        try:
            at = f"now() - cast({self._param(min(duration(value.text), AGES))} as interval)"
        except SearchError:
            at = f"cast({self._param(_time(value.text))} as timestamptz)"
        edge = f"{at} {'-' if sign == '>=' else '+'} {MARGIN}"
        bound = f"id {sign} sqlqueue.uuid_at(greatest({edge}, '1990-01-01'))"
        self._bounds.append(f"job_{bound}")
        return f"created_at {sign} {at} and {bound}"

    def _number(self, value: Value, column: str, _path: str) -> str:
        sign, text = _compared(value.text)
        if not re.fullmatch(r"-?\d{1,9}", text):
            raise SearchError(f"{value.text!r} is no number such as 3, >3 or <=3")
        return f"{column} {sign} {self._param(int(text))}"

    def _span(self, value: Value, column: str, _path: str) -> str:
        sign, text = _compared(value.text)
        return f"{column} {sign} {self._param(duration(text))}"

    def _json(self, value: Value, column: str, path: str) -> str:
        steps = path.split(".") if path else []
        # The first positional argument is one by name, or in the list of those that have none.
        ways = [steps, ["*", *steps]] if path[:1].isdigit() else [steps]
        found = [f"({column} #> cast({self._param(way)} as text[]))" for way in ways]
        if value.is_quoted:
            wanted = f"to_jsonb(cast({self._param(value.text)} as text))"
            return " or ".join(f"{one} = {wanted}" for one in found)
        return " or ".join(self._like(value, f"({one} #>> '{{}}')") for one in found)


def _compared(text: str) -> tuple[str, str]:
    match = re.match(r"(>=|<=|>|<|)(.*)", text, re.DOTALL)
    assert match
    return match[1] or "=", match[2]


def _pattern(text: str, star: str = "%") -> str:
    return re.sub(r"([\\%_])", r"\\\1", text).replace("*", star)


def _uuid(text: str) -> UUID | None:
    with suppress(ValueError):
        return UUID(text) if len(text) >= 32 else None
    return None


def duration(text: str) -> timedelta:
    """Read a time span such as 30s. Raises SearchError."""
    if not (match := re.fullmatch(r"(\d{1,8}(?:\.\d{1,6})?)(ms|[smhdw])", text)):
        raise SearchError(f"{text!r} is no duration such as 250ms, 30s, 5m, 2h or 1d")
    return timedelta(seconds=float(match[1]) * SECONDS[match[2]])


def _time(text: str) -> datetime:
    """Read a date or time in ISO 8601, of UTC unless it has a zone."""
    with suppress(ValueError):
        found = datetime.fromisoformat(text)
        if 1 < found.year < 9999:
            return found if found.tzinfo else found.replace(tzinfo=UTC)
    raise SearchError(f"{text!r} is no time such as 2h (ago), 2026-11-20 or 2026-11-20T09:00Z")
