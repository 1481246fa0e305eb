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
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
LOG_LINES = 1000  # that one page or answer shows

# Jobs by their ids, one after the other: together they would be looked for in all of the history.
_EACH = """
from unnest(cast(:ids as uuid[])) as asked (id)
cross join lateral (select * from sqlqueue.jobs where jobs.id = asked.id limit 1) as jobs
order by jobs.id desc
"""
_LIST = f"""
select jobs.id, state, reason, queue, task, created_at, run, waited, ran, error_type {_EACH}
"""
_CARDS = f"""
select
    jobs.id, state, reason, queue, task, created_at, due_at, started_at, ended_at, run, attempt,
    attempts, waited, ran, error_type, error, args, progress, note, worker_id,
    (
        select message from sqlqueue.logs
        where logs.job_id = jobs.id and logs.progress is null
        order by logs.run desc, logs.seq desc limit 1
    ) as last_line
{_EACH}
"""
_JOB = """
select
    id, state, reason, queue, task, description, priority, args, tags, headers, key, unique_key,
    created_at, due_at, expires_at, started_at, ended_at, run, attempt, attempts, crashes, timeout,
    worker_id, waited, ran, progress, note, result, error_type, error, fingerprint
from sqlqueue.jobs where id = :job
"""
_RUNS = """
select
    run, attempt, worker_id, started_at, ended_at, ran, outcome, final, result, error_type, error,
    traceback
from sqlqueue.runs where job_id = :job order by run, ended_at
"""
_STATES = "select id, state from sqlqueue.jobs where id = any (:jobs)"
_LOGS = """
select run, at, level, logger, source, message, fields, progress
from sqlqueue.logs
where job_id = :job
  and (run = :run or cast(:run as integer) is null)
  and (level = any (:levels) or cast(:levels as text[]) is null)
order by run, seq
"""
_LINES = """
select job_id, run, at, level, logger, source, message
from sqlqueue.logs
where job_id = any (:ids) and progress is null
  and (level = any (:levels) or cast(:levels as text[]) is null)
order by at desc, seq desc limit :most
"""
_WHY = "select is_ok, reason, detail, hint from sqlqueue.why(:job)"
_ENDS = """
select extract(epoch from at) as at, sum(enqueued) as enqueued, sum(succeeded) as succeeded,
    sum(failed) as failed,
    extract(epoch from sqlqueue.hist_quantile(sqlqueue.hist_sum(waited_hist), 0.5)) as waited_p50,
    extract(epoch from sqlqueue.hist_quantile(sqlqueue.hist_sum(waited_hist), 0.95)) as waited_p95,
    extract(epoch from sqlqueue.hist_quantile(sqlqueue.hist_sum(ran_hist), 0.95)) as ran_p95
from {view}
where at >= :since
  and (queue = :queue or cast(:queue as text) is null)
  and (task = :task or cast(:task as text) is null)
group by at order by at
"""
_DEPTHS = """
select extract(epoch from at) as at, sum(ready) as ready,
    extract(epoch from max(oldest_wait)) as oldest_wait
from sqlqueue.depths
where at >= :since and (queue = :queue or cast(:queue as text) is null)
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
        """Return a line for each of some jobs, newest first."""
        return self.rows(_LIST, ids=list(ids))

    def cards(self, ids: Sequence[UUID]) -> list[Row]:
        """Return what a list shows of jobs: arguments, error and last log line, too."""
        return self.rows(_CARDS, ids=list(ids))

    def job(self, job_id: UUID) -> Row | None:
        """Return all of one job, its runs under "runs"; None if there is no such job."""
        rows = self.rows(_JOB, job=job_id)
        return rows[0] | {"runs": self.rows(_RUNS, job=job_id)} if rows else None

    def states(self, job_ids: Sequence[UUID]) -> dict[UUID, str]:
        """Return the state of each of some jobs that exists."""
        return {row["id"]: row["state"] for row in self.rows(_STATES, jobs=list(job_ids))}

    def logs(self, job_id: UUID, run: int | None, level: str | None) -> list[Row]:
        """Return what a job said, in all its runs or in one, from a level on."""
        return self.rows(_LOGS, job=job_id, run=run, levels=_from(level))

    def lines(self, ids: Sequence[UUID], level: str | None = None) -> list[Row]:
        """Return the newest LOG_LINES that some jobs logged, by time."""
        found = self.rows(_LINES, ids=list(ids), levels=_from(level), most=LOG_LINES)
        return found[::-1]

    def why(self, job_id: UUID) -> list[Row]:
        """Return why a job does not run: the first row that is not ok is the answer."""
        return self.rows(_WHY, job=job_id)

    # Everything else

    def view(self, name: str, order: str, limit: int | None = None) -> list[Row]:
        """Return the rows of a view, all of its columns."""
        return self.rows(f"select * from sqlqueue.{name} order by {order} limit :n", n=limit)

    def queues(self) -> list[Row]:
        """Return the queues that are served, hold jobs or failures, or have rules."""
        return self.view("queues", "queue")

    def workers(self) -> list[Row]:
        """Return the workers that live, or died lately."""
        return self.view("workers", "liveness = 'dead', id")

    def tasks(self) -> list[Row]:
        """Return the tasks that workers know, or that had jobs lately."""
        return self.view("tasks", "task")

    def schedules(self) -> list[Row]:
        """Return the schedules, the next to be fired first."""
        return self.view("schedules", "paused_at is not null, next_at, name")

    def failures(self) -> list[Row]:
        """Return failed jobs by cause, the newest first, those that are muted last."""
        return self.view("failures", "muted_until is not null, last_at desc", 200)

    def totals(self) -> Row:
        """Return the live snapshot: at, overview, queues, workers, flow."""
        return self.view("totals", "at")[0]

    def counters(self) -> list[Row]:
        """Return the sums since the beginning, by queue and task."""
        return self.view("counters", "queue, task")

    def health(self) -> list[Row]:
        """Return what is well and what is not, a check in each row."""
        return self.view("health", "place")

    def storage(self) -> list[Row]:
        """Return the size of each table."""
        return self.view("storage", "bytes + index_bytes desc")

    def actions(self, limit: int = 50) -> list[Row]:
        """Return what operators did last."""
        return self.view("actions", "at desc", limit)

    def flow(self, span: timedelta, queue: str | None = None, task: str | None = None) -> list[Row]:
        """Return what came and went in each minute of a span, or each hour of one above 6 h."""
        view = "sqlqueue.minutes" if span <= timedelta(hours=6) else "sqlqueue.hours"
        since = self.now() - span
        return self.rows(_ENDS.replace("{view}", view), since=since, queue=queue, task=task)

    def depths(self, span: timedelta, queue: str | None = None) -> list[Row]:
        """Return the sampled levels of a span: at, ready, oldest_wait in seconds."""
        return self.rows(_DEPTHS, since=self.now() - span, queue=queue)

    def now(self) -> datetime:
        """Return the time of the database."""
        return self.rows("select now() as now")[0]["now"]  # type: ignore[no-any-return]

    def run_schedule(self, name: str) -> UUID | None:
        """Enqueue the job of a schedule; return its id, None if the queue was full."""
        sql = "select sqlqueue.run_schedule(:name, clock_timestamp()) as id"
        return self.rows(sql, name=name)[0]["id"]  # type: ignore[no-any-return]


def _from(level: str | None) -> list[str] | None:
    return list(LEVELS[LEVELS.index(level) :]) if level else None
