"""A durable task queue in the application's own Postgres."""

__version__ = "0.1.0"

from sqlqueue.errors import (
    BadArguments,
    Cancel,
    IdOutOfRange,
    JobFailed,
    JobNotFound,
    LeaseLost,
    NotEnded,
    NotRepresentable,
    RetryIn,
    SchemaMismatch,
    Snooze,
    SqlqueueError,
    UnsupportedTransaction,
)
from sqlqueue.job import Job
from sqlqueue.migrate import migrate
from sqlqueue.options import Options
from sqlqueue.queue import Queue
from sqlqueue.retry import Retry
from sqlqueue.run import Run, current_run
from sqlqueue.task import Call, Task
from sqlqueue.worker import Worker, WorkerOptions

__all__ = [
    "BadArguments",
    "Call",
    "Cancel",
    "IdOutOfRange",
    "Job",
    "JobFailed",
    "JobNotFound",
    "LeaseLost",
    "NotEnded",
    "NotRepresentable",
    "Options",
    "Queue",
    "Retry",
    "RetryIn",
    "Run",
    "SchemaMismatch",
    "Snooze",
    "SqlqueueError",
    "Task",
    "UnsupportedTransaction",
    "Worker",
    "WorkerOptions",
    "current_run",
    "migrate",
]
