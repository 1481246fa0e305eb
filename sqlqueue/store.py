"""Every statement that reads or changes jobs: one method for each file in sql/.

A method takes a connection, runs one statement and returns plain values. It never opens a
connection, commits or retries: the caller owns the transaction. The header of a file says what
its statement does.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import cache
from importlib.resources import files
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from sqlqueue.errors import IdOutOfRange, QueueFull
from sqlqueue.literal import array

Params = Mapping[str, Any]
Rows = Sequence[Any]
R = TypeVar("R")
# What is READ COMMITTED skips locked rows and counts right, whatever the database's default is.
BEGIN = "begin isolation level read committed;"


class Executes(Protocol):
    """A SQLAlchemy Connection, or what `transaction` makes of a psycopg connection."""

    def exec_driver_sql(self, statement: str, parameters: Any = None, /) -> Any: ...


class Lane(NamedTuple):
    """One queue at one priority; suspects have lanes of their own."""

    queue: str
    priority: int
    is_suspect: bool = False


class Ended(NamedTuple):
    """The end of a run.

    wait    until its job runs again; None if this ended the job
    ran     seconds in the task
    result  JSON text; None for nothing
    """

    job_id: str
    run: int
    outcome: str
    wait: timedelta | None = None
    ran: float | None = None
    result: str | None = None
    error_type: str | None = None
    error: str | None = None
    traceback: str | None = None


@cache
def statement(name: str, schema: str) -> str:
    """Return the statement of sql/<name>.sql for a driver, on the tables of a schema.

    In the files, parameters are :name and the schema is `sqlqueue`, so that psql runs them as
    they are. Raises ValueError if the schema is no plain name.
    """
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", schema):
        raise ValueError(f"schema must match [a-z_][a-z0-9_]*, got {schema!r}")
    text = (files("sqlqueue") / "sql" / f"{name}.sql").read_text("utf-8")
    text = re.sub(r"--.*", "", text).replace("%", "%%").strip()
    text = re.sub(r"(?<![:\w]):([a-z_]+)", r"%(\1)s", text)
    return text.replace("sqlqueue.", f"{schema}.").replace("'sqlqueue'", f"'{schema}'")


def milliseconds(time: timedelta) -> str:
    """Write a time as settings of Postgres are written."""
    return f"{time // timedelta(milliseconds=1)}ms"


class Statement(Generic[R]):
    """The statement of the file that has the attribute's name, as a method.

    It takes a connection and the parameters, in the order of `names`; `read` makes its value
    of the rows.
    """

    def __init__(self, read: Callable[[Rows], R], *names: str) -> None:
        self._read = read
        self._names = names

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, store: "Store", owner: type) -> Callable[..., R]:
        def run(conn: Executes, *values: Any) -> R:
            params = dict(zip(self._names, values, strict=True))
            return self._read(store.rows(conn, self._name, params))

        return run


def _first(rows: Rows) -> Any:
    """The value of the first row; None without one."""
    return rows[0][0] if rows else None


class Store:
    """The statements of one schema.

    promote     within (of now, None: ever), batch -> (lane, jobs moved)
    next_due    -> timedelta until the next scheduled job is due; None if there is none
    orphans     batch, worker seen to end or None -> leases of dead workers, locked
    register    ttl, pid, slots, host, name, version, queues, tasks -> its id, never used again
    unregister  worker: it has stopped
    beat        worker, [its bytes, seconds of processor, runs] or None -> drain or stop if it was
                told to, else -; None if it is dead
    leases      worker, within -> {(job id, run): whether it is to be cancelled}: what it claimed
                within that time of now (None: ever), and all that is to be cancelled
    lanes       queue, known priorities, is_suspect -> lanes not known, one in each gap
    arm         queues, worker, patience: hangs its bell at those of the queues that have none
    disarm      queues, worker: takes its bells away
    pass_on     queue, priority: wakes every idle worker of the queue
    cancel      job id, reason -> whether it has ended by this, or runs and was told
    retry       job id -> whether it had failed or was cancelled, and is ready again
    jobs        job ids, whether to read each even if it lives -> rows by id; None: no job
    unknown_since   job id -> seconds that it waits for a worker that knows its task
    pause       scope, name, is_paused, by, why, lasts (None: until resumed)
    gated       queues -> those in which jobs may have to wait under a policy
    admit       queue, room -> (priority, jobs made ready); (None, 0, wait): seconds until more
    set_policy  scope, name, rules as JSON (None: none)
    set_schedules  schedules as JSON, tasks known to the code that declares them (None: nobody does)
    due_schedules  -> rows to be fired, locked
    fire        name, instants, next_at (None: never), problem -> jobs enqueued
    take_keys   keys, ids, on_conflict, until_started, period, delay, longest -> the job that holds
                each key; None if somebody else's transaction is taking one
    log         lines as JSON: keeps what runs said
    count_runs  counts as JSON, see Flow: adds them to what charts show
    tidy        -> a line for each partition dropped
    """

    promote = Statement(
        lambda rows: [(Lane(row.queue, row.priority), row.moved) for row in rows], "within", "batch"
    )
    next_due = Statement(_first)
    orphans = Statement(list, "batch", "seen_dead")
    register = Statement(
        _first, "ttl", "pid", "slots", "host", "name", "version", "queues", "tasks"
    )
    unregister = Statement(list, "worker")
    beat = Statement(_first, "worker", "usage")
    leases = Statement(
        lambda rows: {(row.job_id, row.run): row.is_cancelled for row in rows}, "worker", "within"
    )
    lanes = Statement(lambda rows: [Lane(*row) for row in rows], "queue", "known", "is_suspect")
    arm = Statement(list, "queues", "worker", "patience")
    disarm = Statement(list, "queues", "worker")
    pass_on = Statement(list, "queue", "priority")
    cancel = Statement(_first, "job_id", "reason")
    retry = Statement(_first, "job_id")
    jobs = Statement(
        lambda rows: {row.id: row if row.state else None for row in rows}, "job_ids", "even_live"
    )
    unknown_since = Statement(_first, "job_id")
    pause = Statement(list, "scope", "name", "is_paused", "by", "why", "lasts")
    gated = Statement(lambda rows: {row.queue for row in rows}, "queues")
    admit = Statement(list, "queue", "room")
    set_schedules = Statement(list, "schedules", "known")
    due_schedules = Statement(list)
    fire = Statement(_first, "name", "instants", "next_at", "problem")
    take_keys = Statement(
        _first, "keys", "ids", "on_conflict", "until_started", "period", "delay", "longest"
    )
    log = Statement(list, "lines")
    count_runs = Statement(list, "counts")
    set_policy = Statement(list, "scope", "name", "rules")
    tidy = Statement(lambda rows: [row[0] for row in rows])

    def __init__(self, schema: str = "sqlqueue") -> None:
        statement("begin", schema)  # refuses a bad name at once
        self.schema = schema

    def rows(self, conn: Executes, name: str, params: Params) -> Rows:
        """Run the statement of a file; return its rows."""
        rows: Rows = conn.exec_driver_sql(statement(name, self.schema), params).fetchall()
        return rows

    def enqueue(
        self,
        conn: Executes,
        ids: Sequence[str],
        args: Sequence[str],
        task: str,
        options: Params,
        unique_keys: Sequence[str | None] = (),
    ) -> int:
        """Add jobs of one task with the same options; return how many were new.

        Raises IdOutOfRange or QueueFull, having done nothing.
        """
        params = {"ids": "{" + ",".join(ids) + "}", "all_args": array(args), "task": task}
        params["unique_keys"] = array(unique_keys)
        row = self.rows(conn, "enqueue", {**options, **params})[0]
        if not row.are_in_range:
            raise IdOutOfRange()
        if row.is_full:
            raise QueueFull(options["queue"])
        return int(row.added)

    def begin(self, patience: timedelta) -> tuple[str, Params]:
        """Return what begins a transaction of ours: READ COMMITTED, plans by index only.

        After a silence of `patience` it is ended.
        """
        return BEGIN + statement("begin", self.schema), {"patience": milliseconds(patience)}

    def claim(self, conn: Executes, lane: Lane, floor: int, slots: int, worker: int) -> Rows:
        """Lease up to `slots` ready jobs of a lane with seq above `floor`, in order of seq."""
        params = {"floor": floor, "slots": slots, "worker": worker, **lane._asdict()}
        return self.rows(conn, "claim", params)

    def finish(
        self, conn: Executes, ended: Sequence[Ended], patience: timedelta | None = None
    ) -> set[str]:
        """End runs of different jobs; return the ids of those that held their lease.

        With a `patience`, the transaction is ended when it has been silent for that long.
        """
        if not ended:
            return set()
        columns = zip(Ended._fields, zip(*ended, strict=True), strict=True)
        params: dict[str, Any] = {f"{name}s": array(column) for name, column in columns}
        params["patience"] = patience and milliseconds(patience)
        are_all, some, _ = self.rows(conn, "finish", params)[0]
        return {one.job_id for one in ended} if are_all else set(some or ())

    def held(self, conn: Executes, runs: Sequence[tuple[str, int]]) -> set[str]:
        """Return the job ids of those of some (job id, run) that still hold their lease."""
        params = {"job_ids": [one[0] for one in runs], "runs": [one[1] for one in runs]}
        return {row.job_id for row in self.rows(conn, "held", params)}

    def rescue(self, conn: Executes, batch: int, seen_dead: int | None = None) -> list[Ended]:
        """Bury dead workers and end their runs as crashed; return those runs.

        `seen_dead` is a worker whose end was seen, dead whatever its heartbeat says. A job that
        has crashed `max_crashes` times ends as failed.
        """
        ended = []
        for row in self.orphans(conn, batch, seen_dead):
            wait = None if row.is_last else timedelta(0)
            why = f"worker {row.worker_id} died while it ran this job"
            ended.append(
                Ended(row.job_id, row.run, "crashed", wait, error_type="crashed", error=why)
            )
        self.finish(conn, ended)
        return ended
