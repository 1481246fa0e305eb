"""The tables, as the migrations leave them: read this to know what is stored.

A job's state is the table its row is in: `scheduled`, `ready`, `lease` (running), or, once it
has ended, a row of `run` that is final. No statement is built from this; a test compares it
with the catalog of a migrated database.
"""

from typing import Any

from sqlalchemy import Column, Computed, FetchedValue, Identity, Index, MetaData, Table, text
from sqlalchemy.dialects.postgresql import ARRAY, DOUBLE_PRECISION, INTERVAL, JSONB, TIMESTAMP
from sqlalchemy.types import BigInteger, Boolean, Integer, SmallInteger, Text, Uuid

TIME = TIMESTAMP(timezone=True)
# Filled and emptied all day: vacuumed by count, not by share, and never truncated, because
# giving pages back takes a lock that stops every claim.
HOT = {
    "postgresql_with": {
        "autovacuum_vacuum_scale_factor": "0",
        "autovacuum_vacuum_threshold": "20000",
        "autovacuum_vacuum_cost_delay": "0",
        "vacuum_truncate": "off",
    }
}
metadata = MetaData(schema="sqlqueue")


def key(name: str, kind: Any, comment: str, *more: Any) -> Column[Any]:
    return Column(name, kind, *more, primary_key=True, autoincrement=False, comment=comment)


def must(name: str, kind: Any, comment: str, default: str | FetchedValue = "") -> Column[Any]:
    by_default = text(default) if isinstance(default, str) and default else default or None
    return Column(name, kind, nullable=False, server_default=by_default, comment=comment)


def may(name: str, kind: Any, comment: str) -> Column[Any]:
    return Column(name, kind, comment=comment)


def travels() -> list[Column[Any]]:
    """What a live job takes along from table to table."""
    return [
        key("job_id", Uuid, "the job"),
        must("due_at", TIME, "when it may start, or might have: its wait counts from here"),
        must("run", Integer, "number of its last run, 0 before the first; never reset", "0"),
        must("failures", SmallInteger, "runs that failed or timed out", "0"),
        must("crashes", SmallInteger, "runs that took their worker down", "0"),
        must("priority", SmallInteger, "-100 to 100, small is urgent; with the queue its lane"),
        must("queue", Text, "the queue it is in now"),
    ]


job = Table(
    "job",
    metadata,
    key("id", Uuid, "uuid v7, made by whoever enqueues; its time selects the partition"),
    must("created_at", TIME, "start of the transaction that enqueued it", "now()"),
    may("due_at", TIME, "not to start before; null: at once"),
    may("expires_at", TIME, "ends as expired unless started by then; null: never"),
    may("timeout", INTERVAL, "longest running time of one run; null: no limit"),
    must("priority", SmallInteger, "the priority it was enqueued with"),
    must("attempts", SmallInteger, "runs that may fail, the first included"),
    must("max_crashes", SmallInteger, "crashes after which it ends as failed"),
    must("keep", Boolean, "whether the value of its result is stored"),
    must("task", Text, "name of the registered function"),
    must("queue", Text, "the queue it was enqueued in"),
    must("args", JSONB, 'arguments by name; those that have none in a list under "*"'),
    may("retry", JSONB, "waits between attempts; null: full jitter, base 2 s, limit 1 h"),
    may("executor", Text, "async, thread or process; null: by the kind of function"),
    may("tags", ARRAY(Text), "for people and tools"),
    may("description", Text, "for people"),
    may("headers", JSONB, "for tools: strings by name"),
    comment="What was asked for: a row per job, written once, never updated",
    postgresql_partition_by="RANGE (id)",
)
ready = Table(
    "ready",
    metadata,
    *travels(),
    Column("seq", BigInteger, Identity(), nullable=False, comment="order within its lane"),
    Column(
        "is_suspect",
        Boolean,
        Computed("crashes >= 2", persisted=True),
        nullable=False,
        comment="it has taken two workers down: it runs alone",
    ),
    Index("ready_claim", "queue", "is_suspect", "priority", "seq"),
    comment="Jobs that may run now",
    **HOT,
)
scheduled = Table(
    "scheduled",
    metadata,
    *travels(),
    must("reason", Text, "delay, retry or snooze"),
    Index("scheduled_due", "due_at"),
    comment="Jobs that may run later",
    **HOT,
)
lease = Table(
    "lease",
    metadata,
    *travels(),
    must("seq", BigInteger, "its place in the lane, kept if it is handed back"),
    must("worker_id", BigInteger, "the worker that holds it"),
    must("claimed_at", TIME, "start of the transaction that claimed it"),
    Index("lease_worker", "worker_id"),
    comment="Jobs that are running: a row is the right to finish this run",
    **HOT,
)
run = Table(
    "run",
    metadata,
    key("job_id", Uuid, "the job"),
    key("run", Integer, "1 for the first; with the job its identity and its fence"),
    key("ended_at", TIME, "start of the transaction that ended it"),
    may("started_at", TIME, "when it was claimed; null: ended without a run"),
    must("due_at", TIME, "when it might have started"),
    may("worker_id", BigInteger, "the worker that ran it"),
    may("ran", DOUBLE_PRECISION, "seconds in the task, by the worker's monotonic clock"),
    must("attempt", SmallInteger, "failures before it, plus one"),
    must("crashes", SmallInteger, "crashes of its job, this run's included"),
    must("is_final", Boolean, "whether it ended its job: true for exactly one run of each"),
    must(
        "outcome",
        Text,
        "succeeded, failed, timed_out, crashed, snoozed, returned, cancelled or expired",
    ),
    may("result", JSONB, "what the task returned"),
    may("error_type", Text, "class of the exception, or a plain reason"),
    may("error", Text, "its message"),
    may("traceback", Text, "its traceback"),
    Index(
        "run_failed",
        "ended_at",
        postgresql_where=text("is_final and outcome in ('failed', 'timed_out', 'crashed')"),
    ),
    comment="Runs that have ended, only ever added to; an operator's retry takes is_final off",
    postgresql_partition_by="RANGE (ended_at)",
)
worker = Table(
    "worker",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True, comment="never used again"),
    must("heartbeat_at", TIME, "last sign of life", "now()"),
    must("started_at", TIME, "when it registered", "now()"),
    may("died_at", TIME, "when another found it dead; its leases are taken away"),
    must("ttl", INTERVAL, "silence after which it is dead"),
    must("pid", Integer, "process id on its host"),
    must("slots", Integer, "jobs it runs at a time"),
    must("host", Text, "name of its machine"),
    must("name", Text, "for people"),
    must("version", Text, "of sqlqueue"),
    must("queues", ARRAY(Text), "the queues it serves, in order"),
    must("tasks", ARRAY(Text), "the tasks it knows"),
    comment="Worker processes that are alive, or died lately",
)
queue = Table(
    "queue",
    metadata,
    key("name", Text, "the queue"),
    may("paused_at", TIME, "since when nothing is claimed from it; null: not paused"),
    may("paused_by", Text, "who paused it"),
    may("paused_why", Text, "why"),
    may("resumes_at", TIME, "when the pause ends by itself; null: never"),
    comment="Queues that somebody has said something about",
)
doorbell = Table(
    "doorbell",
    metadata,
    key("queue", Text, "the queue"),
    key("rings_until", TIME, "a bell does not ring after this: its worker has gone"),
    must("worker_id", BigInteger, "the worker to wake"),
    comment="Queues with a worker asleep: enqueuing notifies only if it finds a row here",
    **HOT,
)
cancel_request = Table(
    "cancel_request",
    metadata,
    key("job_id", Uuid, "the job to cancel, wherever it moves"),
    must("requested_at", TIME, "when it was asked for", "now()"),
    may("reason", Text, "why"),
    comment="Cancels of jobs that have not ended yet: honoured at their next move",
)
setting = Table(
    "setting",
    metadata,
    key("is_only", Boolean, "true: the table has one row"),
    must("retention", INTERVAL, "how long history is kept", "'30 days'"),
    comment="What holds for the whole installation",
)
