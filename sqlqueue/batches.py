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
from typing import Any, get_args, get_origin, get_type_hints

from sqlqueue.errors import BadArguments

Call = tuple[dict[str, Any], "asyncio.Future[Any]"]


def batched(function: Callable[..., Any], size: int, wait: timedelta) -> Callable[..., Any]:
    """Return the coroutine function of single items that a batch function is run by.

    Raises ValueError for a size below 1, BadArguments for parameters without a name or with
    defaults, and for annotations that are no lists.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    if not parameters or any(one.kind != 1 or one.default is not one.empty for one in parameters):
        raise BadArguments(f"a batch needs parameters with names and no defaults: {signature}")
    collected: defaultdict[Any, list[Call]] = defaultdict(list)  # by loop
    running: set[asyncio.Task[None]] = set()

    async def serve(calls: list[Call]) -> None:
        waiting = [(items, answer) for items, answer in calls if not answer.done()]
        columns = {name: [items[name] for items, _ in waiting] for name in signature.parameters}
        try:
            is_async = inspect.iscoroutinefunction(function)
            call = function(**columns) if is_async else asyncio.to_thread(function, **columns)
            work = asyncio.ensure_future(call)
            all_gone = asyncio.gather(*(answer for _, answer in waiting), return_exceptions=True)
            await asyncio.wait({work, all_gone}, return_when=asyncio.FIRST_COMPLETED)
            if all_gone.done():
                work.cancel()
            answers = await work
            if len(answers) != len(waiting):
                raise ValueError(f"{len(answers)} answers for {len(waiting)} jobs")
        except BaseException as error:
            answers = [error] * len(waiting)
        for (_, future), answer in zip(waiting, answers, strict=True):
            if not future.done():
                is_error = isinstance(answer, BaseException)
                (future.set_exception if is_error else future.set_result)(answer)

    def send(loop: asyncio.AbstractEventLoop, calls: list[Call]) -> None:
        if calls is collected.get(loop):  # not sent already
            del collected[loop]
            task = loop.create_task(serve(calls), context=Context())
            running.add(task)  # a loop alone would let go of it
            task.add_done_callback(running.discard)

    async def item(*args: Any, **kwargs: Any) -> Any:
        loop = asyncio.get_running_loop()
        calls, answer = collected[loop], loop.create_future()
        calls[:] = [one for one in calls if not one[1].done()]  # cancelled meanwhile
        calls.append((signature.bind(*args, **kwargs).arguments, answer))
        if len(calls) >= size:
            send(loop, calls)
        elif len(calls) == 1:
            loop.call_later(wait.total_seconds(), send, loop, calls)
        return await answer

    item.__annotations__ = {name: _item(one) for name, one in get_type_hints(function).items()}
    item.__signature__ = signature  # type: ignore[attr-defined]
    item.__module__, item.__qualname__ = function.__module__, function.__qualname__
    item.__name__, item.__doc__ = function.__name__, function.__doc__
    return item


def _item(annotation: Any) -> Any:
    if annotation in (list, Any):
        return Any
    if get_origin(annotation) is not list:
        raise BadArguments(f"a batch has lists, not {annotation}")
    return get_args(annotation)[0]
