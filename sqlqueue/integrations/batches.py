"""Batch tasks: a function that serves many jobs in one call.

The function is written over lists, one for each parameter, and returns a list. The task is a
coroutine function of single items: its runs, each with its own lease, time and end, wait for one
another on the event loop, and one call of the function answers them all.
"""

import asyncio
import inspect
from collections import defaultdict
from collections.abc import Callable
from contextvars import Context
from datetime import timedelta
from functools import update_wrapper
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from sqlqueue.errors import BadArguments
from sqlqueue.queue import Queue
from sqlqueue.task import Task

R = TypeVar("R")
Call = tuple[dict[str, Any], "asyncio.Future[Any]"]


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
        self._collected: defaultdict[Any, list[Call]] = defaultdict(list)  # by loop
        self._running: set[asyncio.Task[None]] = set()

    async def answer(self, *args: Any, **kwargs: Any) -> Any:
        """Wait for others, and for the answer to these items."""
        loop = asyncio.get_running_loop()
        calls, answer = self._collected[loop], loop.create_future()
        calls[:] = [one for one in calls if not one[1].done()]  # cancelled meanwhile
        calls.append((self.signature.bind(*args, **kwargs).arguments, answer))
        if len(calls) >= self._size:
            self._send(loop, calls)
        elif len(calls) == 1:
            loop.call_later(self._wait, self._send, loop, calls)
        return await answer

    def _send(self, loop: asyncio.AbstractEventLoop, calls: list[Call]) -> None:
        if calls is self._collected.get(loop):  # not sent already
            del self._collected[loop]
            task = loop.create_task(self._serve(calls), context=Context())
            self._running.add(task)  # a loop alone would let go of it
            task.add_done_callback(self._running.discard)

    async def _serve(self, calls: list[Call]) -> None:
        waiting = [(items, answer) for items, answer in calls if not answer.done()]
        try:
            answers = await self._call(waiting)
            if len(answers) != len(waiting):
                raise ValueError(f"{len(answers)} answers for {len(waiting)} jobs")
        except BaseException as error:
            answers = [error] * len(waiting)
        for (_, future), answer in zip(waiting, answers, strict=True):
            if not future.done():
                is_error = isinstance(answer, BaseException)
                (future.set_exception if is_error else future.set_result)(answer)

    async def _call(self, waiting: list[Call]) -> Any:
        """Call the function; give it up when nobody waits for an answer any more."""
        columns = {
            name: [items[name] for items, _ in waiting] for name in self.signature.parameters
        }
        if inspect.iscoroutinefunction(self._function):
            work = asyncio.ensure_future(self._function(**columns))
        else:
            work = asyncio.ensure_future(asyncio.to_thread(self._function, **columns))
        all_gone = asyncio.gather(*(answer for _, answer in waiting), return_exceptions=True)
        await asyncio.wait({work, all_gone}, return_when=asyncio.FIRST_COMPLETED)
        if all_gone.done():
            work.cancel()
        return await work


def _item_of(annotation: Any) -> Any:
    if annotation in (list, Any):
        return Any
    if get_origin(annotation) is not list:
        raise BadArguments(f"a batch has lists, not {annotation}")
    return get_args(annotation)[0]
