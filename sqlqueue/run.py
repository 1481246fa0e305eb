"""One run of a job: what a task may ask of it, and how its end is described.

The same code runs in threads, on the event loop and in child processes.
"""

import logging
import traceback
from contextvars import ContextVar, copy_context
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg

from sqlqueue.codec import decode_headers, encode_value
from sqlqueue.errors import BadArguments, Cancel, LeaseLost, NotRepresentable, RetryIn, Snooze
from sqlqueue.retry import Retry, class_name
from sqlqueue.store import Ended, Executes, Store
from sqlqueue.transaction import Transaction, across, within

if TYPE_CHECKING:
    from sqlqueue.task import Task

log = logging.getLogger("sqlqueue.worker")
MAX_ERROR_BYTES = 64 * 1024
_current: ContextVar["Run"] = ContextVar("sqlqueue_run")


def current_run() -> "Run":
    """Return the run that this code is part of. Raises LookupError outside a task."""
    return _current.get()


def has_traces() -> bool:
    """Whether code of a task has set a context variable in this context, which began empty."""
    return any(variable is not _current for variable in copy_context())


class Run:
    """One execution of a job.

    key           (job id as text, number): its identity and its fence
    number        1 for the first run of the job; never used twice
    attempt       failures before this run, plus one
    task, queue   names
    headers       of the job
    deadline      when its time is over, by the database's clock; None: never
    interrupted   why it is to stop: timed_out, cancelled or returned; None while it may go on
    has_finished  whether the task called `finish`
    """

    interrupted: str | None = None
    interrupted_at = 0.0
    is_over = False
    has_finished = False
    started: float | None = None
    ran: float | None = None
    executor: Any = None
    handle: Any = None

    def __init__(
        self,
        row: Any,
        task: "Task[..., Any] | None",
        store: Store,
        claimed: float,
        patience: timedelta | None = None,
    ) -> None:
        self.row = row
        self.key: tuple[str, int] = (row.job_id, row.run)
        self.registered: Task[..., Any] = task  # type: ignore[assignment]  # None never runs
        self.claimed = claimed
        self._patience = patience
        self._store = store

    @property
    def job_id(self) -> UUID:
        """The job's id."""
        return UUID(self.key[0])

    @property
    def number(self) -> int:
        """1 for the first run of the job; never used twice."""
        return self.key[1]

    @property
    def task(self) -> str:
        """The task's name."""
        return self.registered.name

    @property
    def queue(self) -> str:
        """The queue that the job was claimed from."""
        name: str = self.row.queue
        return name

    @property
    def attempt(self) -> int:
        """Failures before this run, plus one."""
        return int(self.row.failures) + 1

    @property
    def headers(self) -> dict[str, str]:
        """The job's headers."""
        return decode_headers(self.row.headers)

    @property
    def deadline(self) -> datetime | None:
        """When the time of this run is over, by the database's clock; None: never."""
        if self.row.timeout is None:
            return None
        return datetime.fromtimestamp(self.row.claimed_at + self.row.timeout, UTC)

    @property
    def fencing_token(self) -> str:
        """Text that names this run and no other, for outside systems that refuse old ones."""
        return f"{self.key[0]}:{self.number}"

    @property
    def is_cancelled(self) -> bool:
        """Whether the run is to stop: cancelled, out of time, or handed back."""
        return self.interrupted is not None

    def finish(self, transaction: Transaction, result: Any = None) -> None:
        """End the job as succeeded in the task's own transaction: one commit with its writes.

        Raises LeaseLost if this run may no longer do so: roll back then.
        """
        within(transaction, self._finishing(result))
        self.has_finished = True

    async def afinish(self, transaction: Transaction, result: Any = None) -> None:
        """Do what `finish` does, in an async transaction."""
        await across(transaction, self._finishing(result))
        self.has_finished = True

    def _finishing(self, result: Any) -> Any:
        ended = self.succeeded(result)

        def work(conn: Executes) -> None:
            try:
                finished = self._store.finish(conn, [ended], self._patience)
            except psycopg.errors.SerializationFailure as error:
                raise LeaseLost(self.job_id, self.number) from error
            if not finished:
                raise LeaseLost(self.job_id, self.number)
            self.ran = ended.ran

        return work

    def start(self) -> tuple[list[Any], dict[str, Any]]:
        """Begin: make this the current run and return the arguments of the call."""
        if self.interrupted:
            raise InterruptedError
        self.started = monotonic()
        _current.set(self)
        return self.registered.shape.decode(self.row.args)

    def succeeded(self, result: Any) -> Ended:
        """Describe the end of a run that returned `result`."""
        text = encode_value(result, self.registered.returns)
        kept = text if self.row.keep and text != "null" else None
        return Ended(*self.key, "succeeded", None, self._ran(), kept)

    def failed(self, error: BaseException) -> Ended:
        """Describe the end of a run that raised `error`."""
        if self.interrupted:
            return self.stopped()
        if isinstance(error, Snooze):
            return self._ended("snoozed", error.wait)
        if isinstance(error, Cancel):
            seen = traceback.TracebackException.from_exception(error)
            return self._ended("cancelled", None, "cancelled", str(seen))
        if isinstance(error, BadArguments | NotRepresentable):
            wait = None  # the next run would fare no better
        elif isinstance(error, RetryIn):
            wait = error.wait if self.attempt < self.row.attempts else None
        else:
            wait = self._wait(error)
        # Unlike str(error), this copes with exceptions whose own code fails.
        seen = traceback.TracebackException.from_exception(error)
        trace = "".join(seen.format())
        return self._ended("failed", wait, class_name(type(error)), str(seen), trace)

    def stopped(self) -> Ended:
        """Describe the end of a run that was interrupted."""
        if self.interrupted == "timed_out":
            error = TimeoutError(f"ran for longer than {self.row.timeout} s")
            wait = self._wait(error)
            return self._ended("timed_out", wait, "TimeoutError", str(error))
        if self.interrupted == "cancelled":
            return self._ended("cancelled", None, "cancelled", "cancelled while it ran")
        return self._ended("returned", timedelta(0))

    def crashed(self, how: str) -> Ended:
        """Describe the end of a run whose process died."""
        if self.interrupted:
            return self.stopped()
        wait = None if self.row.is_last_crash else timedelta(0)
        return self._ended("crashed", wait, "crashed", how)

    def unstorable(self, error: Exception) -> Ended:
        """Describe the end of a run whose outcome the database refused."""
        return self._ended("failed", None, class_name(type(error)), "its outcome cannot be stored")

    def _wait(self, error: BaseException) -> timedelta | None:
        """Ask the job's policy, or the default one if that cannot be read or its `decide` fails."""
        attempts, declared = self.row.attempts, self.registered.options.retry
        try:
            wait = Retry.from_json(attempts, self.row.retry, declared).wait(error, self.attempt)
            if wait is None or isinstance(wait, timedelta):
                return wait
            log.error("job %s: its retry policy gave no timedelta", self.key[0])
        except Exception:
            log.exception("job %s: its retry policy failed", self.key[0])
        return Retry(attempts=attempts).wait(error, self.attempt)

    def _ended(
        self,
        outcome: str,
        wait: timedelta | None,
        kind: str | None = None,
        error: str | None = None,
        trace: str | None = None,
    ) -> Ended:
        texts = (kind, _storable(error), _storable(trace))
        return Ended(*self.key, outcome, wait, self._ran(), None, *texts)

    def _ran(self) -> float | None:
        return None if self.started is None else monotonic() - self.started


def _storable(text: str | None) -> str | None:
    """Cut a text and replace what Postgres cannot hold: NUL and lone surrogates."""
    if text is None:
        return None
    cut = text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace")
    return cut[-MAX_ERROR_BYTES:].decode("utf-8", "ignore")
