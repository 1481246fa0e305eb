"""Batch tasks: a function that serves many jobs in one call.

The function is written over lists, one for each parameter, and returns a list. The task is a
coroutine function of single items: its runs, each with its own lease, time and end, wait for one
another on the event loop, and one call of the function answers them all.
"""

import asyncio
import inspect
from collections.abc import Callable
from contextvars import Context
from datetime import timedelta
from functools import update_wrapper
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from sqlqueue.errors import BadArguments
from sqlqueue.queue import Queue
from sqlqueue.task import Task

R = TypeVar("R")
# Calls that are answered together, each by its key; set when there are to be no more; the answers.
Batch = tuple[dict[object, Any], asyncio.Event, "asyncio.Task[dict[object, Any]]"]


def batch_task(
    queue: Queue,
    *,
    size: int = 100,
    wait: timedelta = timedelta(milliseconds=50),
    **options: Any,
) -> Callable[[Callable[..., R]], Task[..., R]]:
    """Register a function of lists as a task, as `queue.task` does with other functions.

    A job is enqueued with an item for each parameter. Runs of one worker process are collected
    until there are `size`, or until `wait` has passed. The function returns a list with an answer
    for each, in order: its result, or the exception that it fails with. What the function raises,
    all of them raise. Calling the task calls the function, with lists.

    Raises ValueError for a size below 1, a transaction or a process, and BadArguments for
    parameters without names or with defaults, and for annotations that are no lists.
    """
    if options.get("executor") == "process" or options.get("transactional"):
        raise ValueError("a batch has no process and no transaction")

    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")

    def register(function: Callable[..., R]) -> Task[..., R]:
        batches = _Batches(function, size, wait)

        async def item(*args: Any, **kwargs: Any) -> Any:
            return await batches.answer(*args, **kwargs)

        update_wrapper(item, function, updated=())
        hints = get_type_hints(function).items()
        item.__annotations__ = {name: _item_of(annotation) for name, annotation in hints}
        del item.__wrapped__  # type: ignore[attr-defined]
        item.__signature__ = batches.signature  # type: ignore[attr-defined]
        task: Task[..., Any] = queue.task(**options)(item)
        task.called = function
        return task

    return register


class _Batches:
    """The batches of one function in this process."""

    def __init__(self, function: Callable[..., Any], size: int, wait: timedelta) -> None:
        self.signature = inspect.signature(function)
        parameters = self.signature.parameters.values()
        if not parameters or any(p.kind != 1 or p.default is not p.empty for p in parameters):
            raise BadArguments(f"a batch needs names and no defaults, not {self.signature}")
        self._function = function
        self._size = size
        self._wait = wait.total_seconds()
        self._last: dict[Any, Batch] = {}  # by loop

    async def answer(self, *args: Any, **kwargs: Any) -> Any:
        """Wait for others, and for the answer to these items."""
        items, key = self.signature.bind(*args, **kwargs).arguments, object()
        loop = asyncio.get_running_loop()
        if loop not in self._last or self._last[loop][1].is_set():
            calls, is_closed = dict[object, Any](), asyncio.Event()
            work = loop.create_task(self._serve(calls, is_closed), context=Context())
            self._last[loop] = calls, is_closed, work
            loop.call_later(self._wait, is_closed.set)
        calls, is_closed, work = self._last[loop]
        calls[key] = items
        if len(calls) >= self._size:
            is_closed.set()
        try:
            answer = (await asyncio.shield(work))[key]
        finally:
            del calls[key]
            if not calls:  # nobody waits for an answer any more
                is_closed.set()
                work.cancel()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def _serve(self, open: dict[object, Any], is_closed: asyncio.Event) -> dict[object, Any]:
        await is_closed.wait()
        calls = dict(open)
        names = self.signature.parameters
        columns = {name: [items[name] for items in calls.values()] for name in names}
        try:
            if inspect.iscoroutinefunction(self._function):
                answers = await self._function(**columns)
            else:
                answers = await asyncio.to_thread(self._function, **columns)
            if len(answers) != len(calls):
                raise ValueError(f"{len(answers)} answers for {len(calls)} jobs")
        except BaseException as error:
            answers = [error] * len(calls)
        return dict(zip(calls, answers, strict=True))


def _item_of(annotation: Any) -> Any:
    if annotation in (list, Any):
        return Any
    if get_origin(annotation) is not list:
        raise BadArguments(f"a batch has lists, not {annotation}")
    return get_args(annotation)[0]
