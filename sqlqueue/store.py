"""Every statement that reads or changes jobs: one method for each file in sql/.

A method takes a connection, runs one statement and returns plain values. It never opens a
connection, commits or retries: the caller owns the transaction.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple, Protocol

from sqlqueue.literal import array

Params = Mapping[str, Any]
Rows = Sequence[Any]


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


class Worker(NamedTuple):
    """What a worker says of itself when it registers."""

    ttl: timedelta
    pid: int
    slots: int
    host: str
    name: str
    version: str
    queues: list[str]
    tasks: list[str]


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


class Store:
    """The statements of one schema."""

    def __init__(self, schema: str = "sqlqueue") -> None:
        statement("begin", schema)  # refuses a bad name at once
        self.schema = schema

    def _rows(self, conn: Executes, name: str, params: Params) -> Rows:
        rows: Rows = conn.exec_driver_sql(statement(name, self.schema), params).fetchall()
        return rows

    def _do(self, conn: Executes, name: str, params: Params) -> None:
        conn.exec_driver_sql(statement(name, self.schema), params)

    def enqueue(
        self, conn: Executes, ids: Sequence[str], args: Sequence[str], task: str, options: Params
    ) -> int | None:
        """Add jobs of one task with the same options; return how many were new.

        Returns None, having done nothing, if an id is out of range.
        """
        params = {"ids": "{" + ",".join(ids) + "}", "all_args": array(args), "task": task}
        row = self._rows(conn, "enqueue", {**options, **params})[0]
        return row.added if row.are_in_range else None

    def begin(self, conn: Executes, patience: timedelta) -> None:
        """Prepare a transaction of the worker's: plans by index only, long silence is ended."""
        conn.exec_driver_sql(*self.beginning("", patience))

    def beginning(self, before: str, patience: timedelta) -> tuple[str, Params]:
        """Return what `begin` runs, to be sent with a statement that goes before."""
        milliseconds = patience // timedelta(milliseconds=1)
        return before + statement("begin", self.schema), {"patience": f"{milliseconds}ms"}

    def claim(self, conn: Executes, lane: Lane, floor: int, slots: int, worker: int) -> Rows:
        """Lease up to `slots` ready jobs of a lane with seq above `floor`, in order of seq."""
        params = {"floor": floor, "slots": slots, "worker": worker, **lane._asdict()}
        return self._rows(conn, "claim", params)

    def finish(
        self, conn: Executes, ended: Sequence[Ended], patience: timedelta | None = None
    ) -> set[str]:
        """End runs of different jobs; return the ids of those that held their lease.

        The transaction may then be silent for `patience`, or for less if it was set so.
        """
        params: dict[str, Any] = {
            "job_ids": "{" + ",".join([one.job_id for one in ended]) + "}",
            "runs": "{" + ",".join([str(one.run) for one in ended]) + "}",
            "outcomes": "{" + ",".join([one.outcome for one in ended]) + "}",
            "waits": array([one.wait for one in ended]),
            "rans": array([one.ran for one in ended]),
            "results": array([one.result for one in ended]),
            "error_types": array([one.error_type for one in ended]),
            "errors": array([one.error for one in ended]),
            "tracebacks": array([one.traceback for one in ended]),
        }
        params["patience"] = patience and patience // timedelta(milliseconds=1)
        are_all, some, _ = self._rows(conn, "finish", params)[0]
        return {one.job_id for one in ended} if are_all else set(some or ())

    def held(self, conn: Executes, runs: Iterable[tuple[str, int]]) -> set[str]:
        """Return the job ids of those of some (job id, run) that still hold their lease."""
        asked = list(runs)
        params = {"job_ids": array(one[0] for one in asked), "runs": array(o[1] for o in asked)}
        return {row[0] for row in self._rows(conn, "held", params)}

    def promote(
        self, conn: Executes, within: timedelta | None, batch: int
    ) -> list[tuple[Lane, int]]:
        """Make jobs that came due within a time ready; return how many in each lane.

        With None, those that were due earlier too.
        """
        rows = self._rows(conn, "promote", {"within": within, "batch": batch})
        return [(Lane(row[0], row[1]), row[2]) for row in rows]

    def next_due(self, conn: Executes) -> timedelta | None:
        """Return the time until the next scheduled job is due; None if there is none."""
        rows = self._rows(conn, "next_due", {})
        return rows[0][0] if rows else None

    def rescue(
        self, conn: Executes, batch: int, seen_dead: int | None = None, strays: bool = True
    ) -> list[Ended]:
        """Bury dead workers and end their runs as crashed; return those runs.

        `seen_dead` is a worker whose end was seen, dead whatever its heartbeat says; with
        `strays`, workers without a row are dead too. A job that has crashed `max_crashes` times
        ends as failed.
        """
        self._rows(conn, "bury", {"seen_dead": seen_dead})
        orphans = [
            Ended(
                row.job_id,
                row.run,
                "crashed",
                wait=None if row.is_last else timedelta(0),
                error_type="crashed",
                error=f"worker {row.worker_id} died while it ran this job",
            )
            for row in self._rows(conn, "orphans", {"batch": batch, "strays": strays})
        ]
        if orphans:
            self.finish(conn, orphans)
        return orphans

    def register(self, conn: Executes, worker: Worker) -> int:
        """Add a worker; return its id, which is never used again."""
        params = worker._asdict() | {"queues": array(worker.queues), "tasks": array(worker.tasks)}
        number: int = self._rows(conn, "register", params)[0][0]
        return number

    def unregister(self, conn: Executes, worker: int) -> None:
        """Remove a worker that holds nothing."""
        self._do(conn, "unregister", {"worker": worker})

    def beat(self, conn: Executes, worker: int) -> bool:
        """Give a sign of life; return False if the worker is dead and must register anew."""
        return bool(self._rows(conn, "beat", {"worker": worker}))

    def leases(self, conn: Executes, worker: int) -> dict[tuple[str, int], bool]:
        """Return the (job id, run) that a worker holds: True for those to be cancelled."""
        return {(r[0], r[1]): r[2] for r in self._rows(conn, "leases", {"worker": worker})}

    def lanes(
        self, conn: Executes, queue: str, known: Iterable[int], is_suspect: bool
    ) -> list[Lane]:
        """Return lanes of a queue that are not known, one at most between two known ones."""
        params = {"queue": queue, "known": array(sorted(known)), "is_suspect": is_suspect}
        return [Lane(queue, row[0], is_suspect) for row in self._rows(conn, "lanes", params)]

    def arm(self, conn: Executes, queues: Sequence[str], worker: int, patience: timedelta) -> None:
        """Hang the worker's bell at those of its queues that have none."""
        params = {"queues": array(queues), "worker": worker, "patience": patience}
        self._do(conn, "arm", params)

    def disarm(self, conn: Executes, queues: Sequence[str], worker: int) -> None:
        """Take the worker's bells away."""
        self._do(conn, "disarm", {"queues": array(queues), "worker": worker})

    def pass_on(self, conn: Executes, lane: Lane) -> None:
        """Wake every idle worker of a queue when this transaction commits."""
        self._rows(conn, "pass_on", {"queue": lane.queue, "priority": lane.priority})

    def request_cancel(self, conn: Executes, job_id: str, reason: str) -> None:
        """Ask that an unended job be cancelled; commit before looking for it."""
        self._do(conn, "request_cancel", {"job_id": job_id, "reason": reason})

    def cancel_ready(self, conn: Executes, job_id: str, reason: str) -> bool:
        """Cancel a job if it is ready."""
        return bool(self._rows(conn, "cancel_ready", {"job_id": job_id, "reason": reason}))

    def cancel_scheduled(self, conn: Executes, job_id: str, reason: str) -> bool:
        """Cancel a job if it is scheduled."""
        return bool(self._rows(conn, "cancel_scheduled", {"job_id": job_id, "reason": reason}))

    def ring_cancel(self, conn: Executes, job_id: str) -> bool:
        """Tell the worker of a running job of a request to cancel it; False if not running."""
        return bool(self._rows(conn, "ring_cancel", {"job_id": job_id}))

    def retry(self, conn: Executes, job_id: str) -> bool:
        """Make a failed or cancelled job ready again; return whether it was one."""
        return bool(self._rows(conn, "retry", {"job_id": job_id}))

    def job(self, conn: Executes, job_id: str) -> Any | None:
        """Return the row of a job in the view `jobs`, with its traceback; None if there is none."""
        rows = self._rows(conn, "job", {"job_id": job_id})
        return rows[0] if rows else None

    def unknown_since(self, conn: Executes, job_id: str) -> float:
        """Return for how many seconds a job has waited for a worker that knows its task."""
        seconds: float = self._rows(conn, "unknown_since", {"job_id": job_id})[0][0]
        return seconds

    def pause(
        self, conn: Executes, queue: str, *, by: str, why: str | None, lasts: timedelta | None
    ) -> None:
        """Stop claiming from a queue, for a time or until it is resumed."""
        params = {"queue": queue, "is_paused": True, "by": by, "why": why, "lasts": lasts}
        self._do(conn, "pause", params)

    def resume(self, conn: Executes, queue: str) -> None:
        """Go on claiming from a queue."""
        params = {"queue": queue, "is_paused": False, "by": None, "why": None, "lasts": None}
        self._do(conn, "pause", params)

    def tidy(self, conn: Executes) -> list[str]:
        """Keep partitions and remove leftovers; return a line for each partition dropped."""
        return [row[0] for row in self._rows(conn, "tidy", {})]
