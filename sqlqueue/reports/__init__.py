"""What people read of jobs: each method is one query over the documented views.

A report reads; it changes nothing. What varies in a query is a parameter; only the name of the
schema, which the Store has checked, is put in.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

Row = dict[str, Any]
LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
LOG_LINES = 1000  # that one page or answer shows
# The views that are read whole, and in which order.
ORDERS = {
    "queues": "queue",
    "workers": "liveness = 'dead', id",
    "tasks": "task",
    "schedules": "paused_at is not null, next_at, name",
    "failures": "muted_until is not null, last_at desc",
    "totals": "at",
    "counters": "queue, task",
    "health": "place",
    "storage": "bytes + index_bytes desc",
    "actions": "at desc",
    "counts": "queue, state",
}

_JOBS = """
select
    id, state, reason, queue, task, created_at, due_at, started_at, ended_at, run, attempt,
    attempts, waited, ran, error_type, error, args, progress, note, worker_id,
    (
        select message from sqlqueue.logs
        where logs.job_id = jobs.id and logs.progress is null
        order by logs.run desc, logs.seq desc limit 1
    ) as last_line
from sqlqueue.jobs where id = any (:ids) order by id desc
"""
_RUNS = """
select
    run, attempt, worker_id, started_at, ended_at, ran, outcome, final, result, error_type, error,
    traceback
from sqlqueue.runs where job_id = :job order by run, ended_at
"""
_LOGS = """
select job_id, run, at, level, logger, source, message, fields, progress
from sqlqueue.logs
where job_id = any (:ids)
  and (run = :run or cast(:run as integer) is null)
  and (level = any (:levels) or cast(:levels as text[]) is null)
order by at desc, run desc, seq desc limit :most
"""
_FLOW = """
select cast(extract(epoch from at) as float) as at, enqueued, succeeded, failed,
    cast(extract(epoch from waited_p50) as float) as waited_p50,
    cast(extract(epoch from waited_p95) as float) as waited_p95,
    cast(extract(epoch from ran_p95) as float) as ran_p95
from sqlqueue.flow_of(:lasts)
"""
_DEPTHS = """
select cast(extract(epoch from at) as float) as at, cast(sum(ready) as bigint) as ready
from sqlqueue.depths where at >= now() - :lasts
group by at order by at
"""


class Reports:
    """The reports of one schema, read through one connection."""

    def __init__(self, conn: Connection, schema: str) -> None:
        self.conn = conn
        self.schema = schema

    def rows(self, query: str, **params: Any) -> list[Row]:
        """Run a query, written for the schema sqlqueue; return its rows."""
        statement = text(query.replace("sqlqueue.", f"{self.schema}."))
        return [dict(row) for row in self.conn.execute(statement, params).mappings()]

    # Jobs

    def jobs(self, ids: Sequence[UUID]) -> list[Row]:
        """Return what a list shows of some jobs, newest first."""
        return self.rows(_JOBS, ids=list(ids))

    def job(self, job_id: UUID) -> Row | None:
        """Return all of one job, its runs under "runs"; None if there is no such job."""
        rows = self.rows("select * from sqlqueue.jobs where id = :job", job=job_id)
        return rows[0] | {"runs": self.rows(_RUNS, job=job_id)} if rows else None

    def states(self, job_ids: Sequence[UUID]) -> dict[UUID, str]:
        """Return the state of each of some jobs that exists."""
        rows = self.rows("select id, state from sqlqueue.jobs where id = any (:ids)", ids=job_ids)
        return {row["id"]: row["state"] for row in rows}

    def logs(
        self, ids: Sequence[UUID], run: int | None = None, level: str | None = None,
        most: int | None = None,
    ) -> list[Row]:  # fmt: skip
        """Return the newest lines of some jobs, by time: of all runs or one, from a level on."""
        levels = LEVELS[LEVELS.index(level) :] if level else None
        params = {"ids": list(ids), "run": run, "levels": levels, "most": most}
        return self.rows(_LOGS, **params)[::-1]

    def why(self, job_id: UUID) -> list[Row]:
        """Return why a job does not run: the first row that is not ok is the answer."""
        return self.rows("select * from sqlqueue.why(:job)", job=job_id)

    # Everything else

    def view(self, name: str, limit: int | None = None) -> list[Row]:
        """Return the rows of one of the views in ORDERS, all of its columns."""
        return self.rows(f"select * from sqlqueue.{name} order by {ORDERS[name]} limit :n", n=limit)

    def totals(self) -> Row:
        """Return the live snapshot: at, overview, queues, workers, flow."""
        return self.view("totals")[0]

    def flow(self, lasts: timedelta) -> list[Row]:
        """Return what came and went in each minute lately, or each hour of more than 6 h.

        Instants and durations are in seconds, as charts take them.
        """
        return self.rows(_FLOW, lasts=lasts)

    def depths(self, lasts: timedelta) -> list[Row]:
        """Return the levels sampled lately."""
        return self.rows(_DEPTHS, lasts=lasts)

    def now(self) -> datetime:
        """Return the time of the database."""
        return self.rows("select now() as now")[0]["now"]  # type: ignore[no-any-return]
