"""A registered function: calling it as ever, and enqueuing calls of it."""

import copy
import inspect
from collections.abc import Callable
from functools import update_wrapper
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, ParamSpec, TypeVar
from uuid import UUID

from sqlqueue.codec import Shape
from sqlqueue.options import Options, check_name
from sqlqueue.transaction import Transaction

if TYPE_CHECKING:
    from sqlqueue.job import Job
    from sqlqueue.queue import Queue

P = ParamSpec("P")
R = TypeVar("R")


class Call(NamedTuple):
    """A call that was checked and encoded, ready to be enqueued.

    id is the job's, as text; args is JSON text.
    """

    id: str
    task: str
    args: str
    options: Options
    unique_key: str | None = None


class Task(Generic[P, R]):
    """What `@queue.task` makes of a function.

    name           by which workers find it
    function       the function itself, which runs call
    called         what calling the task calls: the same, but for batch tasks
    options        the options of its jobs
    queue          where it is registered, or that bound to a transaction
    transactional  it takes a Session (AsyncSession, if it is async) as its first argument
    """

    def __init__(
        self,
        queue: "Queue",
        function: Callable[P, R],
        name: str | None,
        options: Options,
        transactional: bool,
    ) -> None:
        self.name = check_name("task", name or _name_of(function))
        self.function = self.called = function
        self.transactional = transactional
        self.is_async = inspect.iscoroutinefunction(function)
        self.shape = Shape(function, skip_first=transactional)
        self._decide = options.retry.decide
        self.options = self._checked(options)
        self.queue = queue
        update_wrapper(self, function, updated=())

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function, here and now."""
        return self.called(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Task({self.name!r})"

    def using(
        self, transaction: Transaction | None = None, *, id: UUID | None = None, **options: Any
    ) -> "Task[P, R]":
        """Return a copy of the task bound to a transaction, to options, or to both.

        The transaction is never committed or closed by us. With an `id`, a uuid v7, enqueuing
        twice makes one job, so that a commit whose outcome is unknown can be repeated.

        Raises TypeError for an unknown option, ValueError for a value that is refused.
        """
        bound = copy.copy(self)
        bound.queue = self.queue.using(transaction, id=id)
        bound.options = self._checked(self.options.changed(options))
        return bound

    def s(self, *args: Any, **kwargs: Any) -> Call:
        """Return the signature of a call, to be enqueued with others.

        Raises BadArguments or NotRepresentable for what the task could not be called with.
        """
        return self.queue.call(self.name, self.shape.encode(args, kwargs), self.options)

    def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> "Job[R]":
        """Enqueue a call, in the transaction it is bound to, or in one of its own.

        Raises BadArguments, NotRepresentable or IdOutOfRange, having written nothing.
        """
        return self.queue.enqueue(self.s(*args, **kwargs))

    async def aenqueue(self, *args: P.args, **kwargs: P.kwargs) -> "Job[R]":
        """Do what `enqueue` does, from async code."""
        return await self.queue.aenqueue(self.s(*args, **kwargs))

    def _checked(self, options: Options) -> Options:
        """Return `options`, or raise ValueError if their executor cannot run this function."""
        executor = options.executor
        if executor == "process" and self.transactional:
            raise ValueError(f"task {self.name}: a process cannot share a transaction")
        if executor == "process" and "<locals>" in self.function.__qualname__:
            raise ValueError(f"task {self.name}: a process could not import it from its module")
        if options.retry.decide is not self._decide:
            raise ValueError(f"task {self.name}: decide is declared with the task, not by a call")
        if (executor == "async" and not self.is_async) or (executor == "thread" and self.is_async):
            raise ValueError(f"task {self.name}: the executor {executor} cannot run it")
        return options


def _name_of(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}".replace("<locals>.", "")
