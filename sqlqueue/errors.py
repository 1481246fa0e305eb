"""Every error that sqlqueue raises, each saying what happened, what state that leaves, what next.

No message holds an argument or a result of a job: those may be secret.
"""

from datetime import timedelta
from uuid import UUID


class SqlqueueError(Exception):
    """The root of all errors of sqlqueue."""


class BadArguments(SqlqueueError, TypeError):
    """The arguments of a call do not fit the signature of its task."""


class NotRepresentable(SqlqueueError, ValueError):
    """A value cannot be written as JSON, or read back as what its annotation says."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where = where
        self.problem = problem


class IdOutOfRange(SqlqueueError, ValueError):
    """A job's id is no uuid v7 of a time between the retention back and one day ahead."""

    def __init__(self) -> None:
        super().__init__(
            "nothing was enqueued: the id of a job must be a uuid v7 whose time lies within the "
            "retention back and one day ahead of the database's clock. Leave the id out, or check "
            "this machine's clock; for business keys there are headers and tags"
        )


class QueueFull(SqlqueueError):
    """As many jobs wait in the queue as its policy allows; nothing was enqueued."""

    def __init__(self, queue: str) -> None:
        super().__init__(
            f"queue {queue} is full: nothing was enqueued. Try again later, or raise max_waiting"
        )
        self.queue = queue


class DuplicateJob(SqlqueueError):
    """Another job holds the unique key; nothing was enqueued."""

    def __init__(self, job_id: UUID) -> None:
        super().__init__(f"nothing was enqueued: job {job_id} holds the same unique key")
        self.job_id = job_id


class UniqueKeyBusy(SqlqueueError):
    """Another transaction has been taking the unique key for 1 s; nothing was enqueued."""

    def __init__(self) -> None:
        super().__init__(
            "nothing was enqueued: another transaction is enqueuing a job with the same unique "
            "key, and has not committed for 1 s. Your transaction can go on; try again"
        )


class UnsupportedTransaction(SqlqueueError, TypeError):
    """What was given to `using` is no transaction that sqlqueue can write in."""


class LeaseLost(SqlqueueError):
    """The run's lease was taken away, so its outcome was not recorded."""

    def __init__(self, job_id: UUID, run: int) -> None:
        super().__init__(
            f"job {job_id}: run {run} lost its lease before it finished; its outcome and "
            f"its writes were discarded, and the job may be running again elsewhere. "
            f"Look for a worker that stopped answering: sqlqueue jobs show {job_id}"
        )
        self.job_id = job_id
        self.run = run


class JobNotFound(SqlqueueError, LookupError):
    """No job has this id: it was never committed, or is older than the retention."""

    def __init__(self, job_id: UUID) -> None:
        super().__init__(
            f"job {job_id}: not found; it was never committed, or its history has been dropped"
        )
        self.job_id = job_id


class JobFailed(SqlqueueError):
    """The job ended without success.

    `state` is failed, cancelled or expired; `traceback` is the text from the worker, if any.
    """

    def __init__(self, job_id: UUID, state: str, error: str, traceback: str | None) -> None:
        text = f"job {job_id} {state}: {error}"
        super().__init__(f"{text}\n\n{traceback}" if traceback else text)
        self.job_id = job_id
        self.state = state
        self.error = error
        self.traceback = traceback


class NotEnded(SqlqueueError, TimeoutError):
    """The job has not ended, or not within the time given; it goes on."""

    def __init__(self, job_id: UUID, state: str) -> None:
        super().__init__(f"job {job_id} has not ended: it is {state}")
        self.job_id = job_id
        self.state = state


class SchemaMismatch(SqlqueueError):
    """The database has no sqlqueue schema, or one of another version; nothing was written."""


class EmbeddedUnavailable(SqlqueueError):
    """No embedded Postgres could be started."""


class Snooze(SqlqueueError):
    """Raised by a task: run me again after `wait`; this run uses no attempt."""

    def __init__(self, wait: timedelta) -> None:
        super().__init__(f"snoozed for {_checked(wait)}")
        self.wait = wait


class RetryIn(SqlqueueError):
    """Raised by a task: this run failed; if attempts are left, run me again after `wait`."""

    def __init__(self, wait: timedelta, reason: str = "asked to be retried") -> None:
        super().__init__(reason)
        self.wait = _checked(wait)


class Cancel(SqlqueueError):
    """Raised by a task: end my job as cancelled, for the reason given."""


def _checked(wait: timedelta) -> timedelta:
    if not isinstance(wait, timedelta):
        raise TypeError(f"wait must be a timedelta, got {type(wait).__name__}")
    return wait
