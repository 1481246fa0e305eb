"""The search for jobs that dashboard and command line share.

    state:failed,ready queue:mail task:mail.* tag:vip since:2h args.user.id:42 "free text"

Terms are joined by and; a comma is or, `-` in front negates, `*` is a glob. Each state has a table
that is looked through from the newest job on, DEPTH rows deep, so that a search never reads all of
the history: it says how far it looked. Values are always parameters.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from functools import partial
from heapq import merge
from itertools import islice
from typing import Any, NamedTuple
from uuid import UUID

from sqlqueue.reports import Reports

DEPTH = 100_000  # rows of a table that are looked at
MARGIN = timedelta(days=1)  # by which the time in an id may differ from that of the database
LONGEST = 2000  # characters of a search
SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
LIVE = ("scheduled", "waiting", "ready", "running")
HISTORY = ("succeeded", "cancelled", "expired")
STATES = (*LIVE, *HISTORY, "failed")
OUTCOMES = ("failed", "timed_out", "crashed")  # of jobs that failed
_BY_TIME = "order by ended_at desc"
_WORD = re.compile(r'\s*(-?)(?:([A-Za-z_][\w.-]*):)?((?:"(?:[^"\\]|\\.)*"|[^\s",]|,)+|)', re.DOTALL)
_PART = re.compile(r'"((?:[^"\\]|\\.)*)"|([^,"]+)', re.DOTALL)

# The rows of each table that may hold a job, under the same names.
_LIVE_ROWS = (
    "select job_id, queue, priority, run, failures + 1 as attempt, {worker} as worker_id,"
    " {waited} as waited, {ran} as ran, cast(null as jsonb) as result,"
    " cast(null as text) as error_type, cast(null as text) as error,"
    " cast(null as text) as fingerprint, cast(null as timestamptz) as ended_at from {table}"
)
_TABLES = {
    "scheduled": ("null", "null", "null", "sqlqueue.scheduled"),
    "waiting": ("null", "now() - due_at", "null", "sqlqueue.waiting"),
    "ready": ("null", "now() - due_at", "null", "sqlqueue.ready"),
    "running": ("worker_id", "claimed_at - due_at", "now() - claimed_at", "sqlqueue.lease"),
}
_ENDED_ROWS = (
    "select job_id, queue, cast(null as smallint) as priority, run, attempt, worker_id,"
    " started_at - due_at as waited, make_interval(secs => ran) as ran, result, error_type, error,"
    " fingerprint, ended_at, outcome from sqlqueue.run where is_final"
)


class SearchError(ValueError):
    """The search cannot be understood; the message says why and what is near."""


class Value(NamedTuple):
    """One of the alternatives of a term; what is quoted is taken as it is."""

    text: str
    is_quoted: bool


@dataclass(frozen=True)
class Term:
    """`key:value,value`, or free text if there is no key."""

    key: str | None
    values: tuple[Value, ...]
    is_negated: bool


@dataclass
class Found:
    """The ids of jobs that fit, newest first.

    looked_back_to  how far back it looked, if it did not look at all jobs that there are
    """

    ids: list[UUID]
    looked_back_to: datetime | None = None


@dataclass
class Search:
    """A search that was understood. Made by `parse`."""

    text: str
    terms: list[Term]
    states: set[str] = field(default_factory=lambda: set(STATES))

    def find(
        self, reports: Reports, limit: int, before: UUID | None = None, as_of: Any = None
    ) -> Found:
        """Return up to `limit` jobs that fit, newest first, older than `before`.

        Opens no transaction: give it one, in which settings of the planner are changed.
        """
        reports.rows(
            "select set_config('jit', 'off', true), set_config('enable_hashjoin', 'off', true),"
            " set_config('enable_mergejoin', 'off', true)"
        )
        made = _Where(reports.now())
        conditions = [made.condition(term) for term in self.terms if term.key != "state"]
        found: list[list[UUID]] = []
        depths: list[datetime] = []
        for source in self._sources(made):
            rows, low = self._rows(source, made, before)
            is_partial = source == "history" and not self.states >= {*HISTORY, "failed"}
            wanted = [made.outcome(self.states)] if is_partial else []
            query = _query(rows, [*conditions, *wanted], made.joins_worker)
            params = made.params | {"most": limit, "before": before, "depth": DEPTH}
            # Failures come by time, and are sorted; all else comes in order, and stops early.
            sorts = "on" if _BY_TIME in rows else "off"
            reports.rows("select set_config('enable_sort', :sorts, true)", sorts=sorts)
            ids = [row["id"] for row in reports.rows(query, **params)]
            found.append(ids)
            if len(ids) < limit and (conditions or wanted):
                (bound,) = reports.rows(low, before=before, depth=DEPTH, **made.bounds)
                if bound["rows"] >= DEPTH:
                    depths.append(bound["since"])
        ids = list(islice(merge(*found, reverse=True), limit))
        is_full = len(ids) >= limit
        return Found(ids, None if is_full or not depths else max(depths))

    def _sources(self, made: "_Where") -> list[str]:
        """Return what is to be looked through: a table for each state that lives, then history.

        Failures alone have an index of theirs, which reaches further back.
        """
        live = [] if made.wants_ended else [one for one in LIVE if one in self.states]
        if self.states & set(HISTORY):
            return [*live, "history"]
        return [*live, *({"failed"} & self.states)]

    def _rows(self, state: str, made: "_Where", before: UUID | None) -> tuple[str, str]:
        """Return the query of the rows to look at, and one that says how far they reach."""
        if state in LIVE:
            worker, waited, ran, table = _TABLES[state]
            rows = _LIVE_ROWS.format(
                worker=f"cast({worker} as bigint)", waited=f"cast({waited} as interval)",
                ran=f"cast({ran} as interval)", table=table,
            )  # fmt: skip
            rows += " where true"
            if state == "scheduled" and made.is_retrying is not None:
                rows += f" and (reason = 'retry') = {made.is_retrying}"
        else:
            rows = _ENDED_ROWS + (f" and outcome in {OUTCOMES}" if state == "failed" else "")
        rows += made.bound + (" and job_id < :before" if before else "")
        is_by_time = state == "failed" and not made.bounds
        rows += f" {_BY_TIME if is_by_time else 'order by job_id desc'} limit :depth"
        at = "to_timestamp(('x' || substr(replace(min(cast(job_id as text)), '-', ''), 1, 12))"
        low = f"select count(*) as rows, {at}::bit(48)::bigint / 1000.0) as since from ({rows}) x"
        return rows, low


def _query(rows: str, conditions: Sequence[str], joins_worker: bool) -> str:
    worker = "left join sqlqueue.worker on worker.id = place.worker_id" if joins_worker else ""
    where = " and ".join(["true", *conditions])
    return (
        f"select job.id from ({rows}) as place join sqlqueue.job on job.id = place.job_id {worker}"
        f" where {where} order by place.job_id desc limit :most"
    )


# Keys that compare one column, and how.
_COLUMNS = {
    "queue": ("like", "coalesce(place.queue, job.queue)"),
    "task": ("like", "job.task"),
    "key": ("like", "job.key"),
    "unique": ("like", "job.unique_key"),
    "priority": ("number", "coalesce(place.priority, job.priority)"),
    "attempt": ("number", "place.attempt"),
    "run": ("number", "place.run"),
    "waited": ("span", "place.waited"),
    "ran": ("span", "place.ran"),
}


class _Where:
    """Makes conditions of terms; collects their parameters."""

    def __init__(self, now: datetime) -> None:
        self.params: dict[str, Any] = {}
        self.bounds: dict[str, Any] = {}
        self.bound = ""
        self.joins_worker = self.wants_ended = False
        self.is_retrying: bool | None = None
        self._now = now

    def condition(self, term: Term) -> str:
        """Return the condition of a term."""
        key, _, path = (term.key or "text").partition(".")
        if key in _COLUMNS:
            kind, column = _COLUMNS[key]
            make = partial(getattr(self, f"_{kind}"), column)
        else:
            make = getattr(self, f"_{key}")
        each = [make(value, path) if path else make(value) for value in term.values]
        if not term.is_negated and key in ("id", "since", "until"):
            self._bind(key, term.values)
        joined = f"({' or '.join(each)})"
        return f"not coalesce({joined}, false)" if term.is_negated else joined

    def outcome(self, states: set[str]) -> str:
        """Return the condition that a job ended in one of these states."""
        outcomes = states & set(HISTORY) | ({*OUTCOMES} if "failed" in states else set())
        return f"place.outcome = any ({self._param(sorted(outcomes))})"

    def _param(self, value: Any) -> str:
        name = f"p{len(self.params)}"
        self.params[name] = value
        return f":{name}"

    def _bind(self, key: str, values: Sequence[Value]) -> None:
        """Bound the rows that are looked at, by what the order of ids says of the term."""
        name = f"b{len(self.bounds)}"
        if key == "id":
            ids = [_uuid(value.text) for value in values]
            if None in ids:
                return
            self.bound += f" and job_id = any (:{name})"
            self.params[name] = self.bounds[name] = ids
        else:
            at = min(_instant(value.text, self._now) for value in values)
            low = at - MARGIN if key == "since" else at + MARGIN
            sign = ">=" if key == "since" else "<="
            self.bound += f" and job_id {sign} sqlqueue.uuid_at(cast(:{name} as timestamptz))"
            self.params[name] = self.bounds[name] = low

    def _like(self, column: str, value: Value) -> str:
        if "*" not in value.text or value.is_quoted:
            return f"{column} = {self._param(value.text)}"
        return f"{column} like {self._param(_pattern(value.text))}"

    def _text(self, value: Value) -> str:
        name = self._param("%" + _pattern(value.text, "\\*") + "%")
        columns = ("job.task", "place.error_type", "place.error")
        return f"({' or '.join(f'{column} ilike {name}' for column in columns)})"

    def _tag(self, value: Value) -> str:
        return f"exists (select from unnest(job.tags) as tag where {self._like('tag', value)})"

    def _worker(self, value: Value) -> str:
        if value.text.isdigit() and len(value.text) < 19:
            return f"place.worker_id = {self._param(int(value.text))}"
        self.joins_worker = True
        return self._like("worker.name", value)

    def _id(self, value: Value) -> str:
        if (job_id := _uuid(value.text)) is not None:
            return f"job.id = {self._param(job_id)}"
        if not re.fullmatch(r"[0-9a-f]{4,12}", value.text.lower()):
            raise SearchError(f"id:{value.text} is neither an id nor its last 4 to 12 characters")
        return f"cast(job.id as text) like {self._param('%' + value.text.lower())}"

    def _group(self, value: Value) -> str:
        self.wants_ended = True
        return f"place.fingerprint = {self._param(value.text)}"

    def _error(self, value: Value) -> str:
        name = self._param(_pattern(value.text))
        return f"(place.error_type like {name} or place.error like {name})"

    def _since(self, value: Value) -> str:
        return f"job.created_at >= {self._param(_instant(value.text, self._now))}"

    def _until(self, value: Value) -> str:
        return f"job.created_at <= {self._param(_instant(value.text, self._now))}"

    def _reason(self, value: Value) -> str:
        if value.text != "retry":
            raise SearchError("reason: knows retry")
        self.is_retrying = True
        return "true"

    def _number(self, column: str, value: Value) -> str:
        sign, text = _compared(value.text)
        if not re.fullmatch(r"-?\d{1,9}", text):
            raise SearchError(f"{value.text!r} is no number such as 3, >3 or <=3")
        return f"{column} {sign} {self._param(int(text))}"

    def _span(self, column: str, value: Value) -> str:
        sign, text = _compared(value.text)
        return f"{column} {sign} {self._param(_duration(text))}"

    def _args(self, value: Value, path: str) -> str:
        # The first positional argument is one by name, or in the list of those that have none.
        paths = (
            [path.split("."), ["*", *path.split(".")]] if path[:1].isdigit() else [path.split(".")]
        )
        return f"({' or '.join(self._json('job.args', value, one) for one in paths)})"

    def _headers(self, value: Value, path: str) -> str:
        return self._like(f"(job.headers ->> {self._param(path)})", value)

    def _result(self, value: Value, path: str = "") -> str:
        return self._json("place.result", value, path.split(".") if path else [])

    def _json(self, column: str, value: Value, path: list[str]) -> str:
        found = f"({column} #> cast({self._param(path)} as text[]))"
        text = f"({found} #>> cast(array[] as text[]))"
        if value.is_quoted:
            return f"{found} = to_jsonb(cast({self._param(value.text)} as text))"
        return self._like(text, value)


_PATHS = ("args", "headers", "result")
_KEYS = (
    "state", "queue", "task", "tag", "worker", "priority", "id", "key", "unique", "group", "error",
    "since", "until", "attempt", "run", "waited", "ran", "reason",
)  # fmt: skip


def parse(text: str) -> Search:
    """Read a search. Raises SearchError, which names the nearest key to one that is unknown."""
    if len(text) > LONGEST:
        raise SearchError(f"a search has at most {LONGEST} characters")
    if "\0" in text or text.encode(errors="ignore").decode() != text:
        raise SearchError("a search holds no NUL and no lone surrogate")
    search = Search(text.strip(), [])
    place = 0
    while text[place:].strip():
        match = _WORD.match(text, place)
        if not match or match.end() == place or not (match[2] or match[3]):
            raise SearchError(f"cannot read {text[place:].strip()[:40]!r}: a quote is open?")
        place = match.end()
        search.terms.append(_term(match[1] == "-", match[2], match[3]))
    for term in search.terms:
        if term.key == "state":
            _choose(search, term)
    _Probe().check(search)
    return search


def _term(is_negated: bool, key: str | None, text: str) -> Term:
    if key and key.partition(".")[0] not in _PATHS and key not in _KEYS:
        near = get_close_matches(key, [*_KEYS, *_PATHS], 1)
        hint = f"did you mean {near[0]}:?" if near else f"known: {', '.join([*_KEYS, *_PATHS])}"
        raise SearchError(f"there is no key {key}: {hint}")
    if key in ("args", "headers"):
        raise SearchError(f"{key} needs a path, such as {key}.user.id:42")
    values = tuple(
        Value(re.sub(r"\\(.)", r"\1", one[1]), True) if one[1] is not None else Value(one[2], False)
        for one in _PART.finditer(text)
    )
    if not values:
        raise SearchError(f"{key}: needs a value")
    return Term(key, values, is_negated)


def _choose(search: Search, term: Term) -> None:
    chosen = {value.text for value in term.values}
    if unknown := chosen - set(STATES):
        near = get_close_matches(min(unknown), STATES, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(STATES)}"
        raise SearchError(f"there is no state {min(unknown)}: {hint}")
    search.states &= set(STATES) - chosen if term.is_negated else chosen


class _Probe(_Where):
    """Looks whether all terms can be made conditions, before anything is asked."""

    def __init__(self) -> None:
        super().__init__(datetime.now(UTC))

    def check(self, search: Search) -> None:
        """Raise SearchError for a value that does not fit."""
        for term in search.terms:
            if term.key != "state":
                self.condition(term)
        if self.is_retrying:
            search.states &= {"scheduled"}


def _compared(text: str) -> tuple[str, str]:
    match = re.match(r"(>=|<=|>|<|)(.*)", text, re.DOTALL)
    assert match
    return match[1] or "=", match[2]


def _pattern(text: str, star: str = "*") -> str:
    escaped = re.sub(r"([\\%_])", r"\\\1", text)
    return escaped.replace("*", "%") if star == "*" else escaped


def _uuid(text: str) -> UUID | None:
    with suppress(ValueError):
        return UUID(text) if len(text) >= 32 else None
    return None


def _duration(text: str) -> timedelta:
    if not (match := re.fullmatch(r"(\d{1,8}(?:\.\d{1,6})?)(ms|[smhdw])", text)):
        raise SearchError(f"{text!r} is no duration such as 250ms, 30s, 5m, 2h or 1d")
    return timedelta(seconds=float(match[1]) * SECONDS[match[2]])


def _instant(text: str, now: datetime) -> datetime:
    """Read a time: so long ago, or a date or time in ISO 8601, of UTC unless it has a zone."""
    with suppress(SearchError, OverflowError):
        return now - _duration(text)
    with suppress(ValueError):
        found = datetime.fromisoformat(text)
        if 1 < found.year < 9999:
            return found if found.tzinfo else found.replace(tzinfo=UTC)
    raise SearchError(f"{text!r} is no time such as 2h (ago), 2026-11-20 or 2026-11-20T09:00Z")
