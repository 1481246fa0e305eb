"""One job, as whoever enqueued it sees it."""

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast
from uuid import UUID

from sqlqueue.codec import decode_value
from sqlqueue.errors import JobFailed, JobNotFound, NotEnded

if TYPE_CHECKING:
    from sqlqueue.queue import Queue

R = TypeVar("R")


class Job(Generic[R]):
    """A job that was enqueued. Its id is known before the commit; all else is read.

    What is read is kept until `refresh`: state, queue, task, run, attempt, created_at, due_at,
    started_at, ended_at, error_type, error and traceback. Reading raises JobNotFound for a job
    that was not committed, or whose history has been dropped.
    """

    def __init__(self, queue: "Queue", job_id: UUID) -> None:
        self.id = job_id
        self._queue = queue
        self._row: Any = None

    def __repr__(self) -> str:
        return f"Job({str(self.id)!r})"

    @classmethod
    def get(cls, queue: "Queue", job_id: UUID | str) -> "Job[Any]":
        """Return the job with this id. Raises JobNotFound if there is none."""
        return Job[Any](queue, UUID(str(job_id))).refresh()

    def refresh(self) -> "Job[R]":
        """Read the job again; return it."""
        with self._queue.autocommit() as conn:
            return self._seen(*self._queue.store.jobs(conn, [str(self.id)], [True]).values())

    def _seen(self, row: Any) -> "Job[R]":
        self._row = row
        if row is None:
            raise JobNotFound(self.id)
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if self._row is None:
            self.refresh()
        return getattr(self._row, name)

    @property
    def has_ended(self) -> bool:
        """Whether the job had ended when it was last read."""
        return self.ended_at is not None

    @property
    def result(self) -> R:
        """What the task returned, coerced by its return annotation if the task is known here.

        None if the job was enqueued with keep=False. Raises NotEnded if it had not ended when
        last read, JobFailed if it ended without success.
        """
        if not self.has_ended:
            raise NotEnded(self.id, self.state)
        if self.state != "succeeded":
            error = ": ".join(one for one in (self.error_type, self.error) if one)
            raise JobFailed(self.id, self.state, error, self.traceback)
        text = self._queue.cipher.open(self._row.result or "null")
        task = self._queue.tasks.get(self.task)
        return cast(R, decode_value(text, task.shape.returns if task else None))

    def wait(self, timeout: timedelta | None = None) -> R:
        """Wait until the job has ended and return its result.

        Raises NotEnded after `timeout`, JobFailed if it ended without success, JobNotFound if
        it does not exist: wait for what has been committed.
        """
        row = self._queue.waits.add(str(self.id), timeout)
        try:
            return self._seen(row.result()).result
        finally:
            row.cancel()  # an interrupt from the keyboard ends the wait

    async def await_result(self, timeout: timedelta | None = None) -> R:
        """Do what `wait` does, without blocking the event loop."""
        row = self._queue.waits.add(str(self.id), timeout)
        return self._seen(await asyncio.wrap_future(row)).result

    def cancel(self, reason: str = "cancelled by request") -> bool:
        """End the job as cancelled; return False if it had ended already.

        A job that is ready or scheduled ends at once. A running one is told; it ends as
        cancelled unless it ends otherwise first. The request is durable: a job that moves while
        it is looked for does not run again.
        """
        with self._queue.autocommit() as conn:
            is_asked = self._queue.store.cancel(conn, str(self.id), reason)
        self.refresh()
        return self.state == "cancelled" or (is_asked and not self.has_ended)

    def retry(self) -> bool:
        """Make the job ready again, with all its attempts; return whether that was possible.

        Possible if it failed or was cancelled. Its past runs are kept.
        """
        with self._queue.autocommit() as conn:
            return bool(self._queue.store.retry(conn, str(self.id)))
