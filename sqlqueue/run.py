"""One run of a job: what a task may ask of it, and how its end is described.

The same code runs in threads, on the event loop and in child processes.
"""

import logging
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from time import monotonic
from typing import Any
from uuid import UUID

import psycopg

from sqlqueue.codec import decode_headers, encode_value
from sqlqueue.errors import BadArguments, Cancel, LeaseLost, NotRepresentable, RetryIn, Snooze
from sqlqueue.literal import storable
from sqlqueue.notes import Notes, Said
from sqlqueue.retry import Retry, class_name, unsaid
from sqlqueue.store import Ended, Executes, Store
from sqlqueue.transaction import Transaction, across, within

log = logging.getLogger("sqlqueue.worker")
_current: ContextVar["Run"] = ContextVar("sqlqueue_run")
_on_stderr = logging.StreamHandler()


def current_run() -> "Run":
    """Return the run that this code is part of. Raises LookupError outside a task."""
    return _current.get()


def has_traces() -> bool:
    """Whether code of a task has set a context variable in this context, which began empty."""
    return len(copy_context()) > 1  # _current is one


@dataclass(eq=False, repr=False)
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
    log           a logger; what any other one records in a run is kept with its job, too
    """

    row: Any
    registered: Any  # the Task; None if there is none, or none that can be imported
    _store: Store
    claimed: float
    said: Said
    _patience: timedelta | None = None
    log = logging.getLogger("sqlqueue.task")
    interrupted: str | None = None
    interrupted_at: float = 0.0
    is_over: bool = False
    has_finished: bool = False
    started: float | None = None
    ran: float | None = None
    executor: Any = None
    handle: Any = None
    _notes: Notes | None = None

    def __post_init__(self) -> None:
        self.key: tuple[str, int] = (self.row.job_id, self.row.run)
        self.number: int = self.row.run
        self.attempt: int = self.row.failures + 1
        self.task: str = self.row.task
        self.queue: str = self.row.queue

    @property
    def job_id(self) -> UUID:
        """The job's id."""
        return UUID(self.key[0])

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
    def notes(self) -> Notes:
        """What the run says while it runs."""
        self._notes = self._notes or Notes(self.key, self.said.add)
        return self._notes

    def progress(self, percent: float, note: str | None = None) -> None:
        """Say how far the run is; of what is said within a second, the last is kept.

        Raises ValueError unless `percent` is from 0 to 100.
        """
        if not 0 <= percent <= 100:
            raise ValueError(f"percent must be from 0 to 100, got {percent}")
        self.notes.progress(percent, note)

    @property
    def is_cancelled(self) -> bool:
        """Whether the run is to stop: cancelled, out of time, or handed back."""
        return self.interrupted is not None

    def finish(self, transaction: Transaction, result: Any = None) -> None:
        """End the job as succeeded in the task's own transaction: one commit with its writes.

        Raises LeaseLost if this run may no longer do so: roll back then.
        """
        within(transaction, partial(self._finish, self.succeeded(result)))

    async def afinish(self, transaction: Transaction, result: Any = None) -> None:
        """Do what `finish` does, in an async transaction."""
        await across(transaction, partial(self._finish, self.succeeded(result)))

    def _finish(self, ended: Ended, conn: Executes) -> None:
        try:
            finished = self._store.finish(conn, [ended], self._patience)
        except psycopg.errors.SerializationFailure as error:
            raise LeaseLost(self.job_id, self.number) from error
        if not finished:
            raise LeaseLost(self.job_id, self.number)
        self.ran = ended.ran
        self.has_finished = True

    def start(self) -> tuple[list[Any], dict[str, Any]]:
        """Begin: make this the current run and return the arguments of the call."""
        if self.interrupted:
            raise InterruptedError
        self.started = monotonic()
        _current.set(self)
        args = self.registered.queue.cipher.open(self.row.args)
        call: tuple[list[Any], dict[str, Any]] = self.registered.shape.decode(args)
        return call

    @contextmanager
    def around(self) -> Iterator[None]:
        """Enter what is to be entered around each run."""
        with ExitStack() as stack:
            for hook in self.registered.queue.around_run:
                stack.enter_context(hook(self))
            yield

    def succeeded(self, result: Any) -> Ended:
        """Describe the end of a run that returned `result`."""
        text = encode_value(result, self.registered.shape.returns)
        kept = self.registered.queue.cipher.seal(text) if self.row.keep and text != "null" else None
        return self._ended("succeeded", None, result=kept)

    def failed(self, error: BaseException) -> Ended:
        """Describe the end of a run that raised `error`."""
        if self.interrupted:
            return self.stopped()
        if isinstance(error, Snooze):
            return self._ended("snoozed", error.wait)
        # Unlike str(error), this copes with exceptions whose own code fails.
        seen = traceback.TracebackException.from_exception(error)
        text = storable(str(seen))
        if isinstance(error, Cancel):
            return self._ended("cancelled", None, "cancelled", text)
        trace = storable("".join(seen.format()))
        return self._ended("failed", self._wait(error), class_name(type(error)), text, trace)

    def stopped(self) -> Ended:
        """Describe the end of a run that was interrupted."""
        if self.interrupted == "timed_out":
            error = TimeoutError(f"ran for longer than {self.row.timeout} s")
            return self._ended("timed_out", self._wait(error), "TimeoutError", str(error))
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
        attempts = self.row.attempts
        if isinstance(error, BadArguments | NotRepresentable):
            return None  # the next run would fare no better
        if isinstance(error, RetryIn):
            return error.wait if self.attempt < attempts else None
        try:
            declared = self.registered and self.registered.options.retry
            wait = Retry.from_json(attempts, self.row.retry, declared).wait(error, self.attempt)
            if not isinstance(wait, timedelta | None):
                raise TypeError("decide gave no timedelta")
            return wait
        except Exception as failure:
            log.error("job %s: its retry policy failed", self.key[0], exc_info=unsaid(failure))
            return Retry(attempts=attempts).wait(error, self.attempt)

    def _ended(
        self, outcome: str, wait: timedelta | None, *texts: str, result: str | None = None
    ) -> Ended:
        ran = None if self.started is None else monotonic() - self.started
        if self._notes:
            self._notes.close()
        return Ended(*self.key, outcome, wait, ran, result, *texts)


class Capture(logging.Handler):
    """Keeps the records of a run with its job; put at the root logger by `install`."""

    def emit(self, record: logging.LogRecord) -> None:
        run = _current.get(None)
        try:
            if run and record.levelno >= run.registered.options.log_level:
                run.notes.record(record)
        except Exception:
            self.handleError(record)
        if logging.root.handlers == [self] and record.levelno >= logging.WARNING:
            _on_stderr.handle(record)  # as logging does where nobody has set it up

    @classmethod
    def install(cls) -> None:
        """Put one at the root logger, unless there is one."""
        if not any(isinstance(one, cls) for one in logging.root.handlers):
            logging.root.addHandler(cls())
            Run.log.setLevel(logging.INFO)
