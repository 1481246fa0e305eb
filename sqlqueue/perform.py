"""Calling a task's function for a run: the only place where user code is entered.

Every way out of user code, an exception or a result that is no JSON, becomes the description
of how the run ended.
"""

import asyncio
from collections.abc import Callable
from contextvars import copy_context

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqlqueue.run import Run
from sqlqueue.store import Ended


class InThread:
    """Calls functions in the thread it is used in; cannot stop them, only tell them."""

    def __init__(self, session: Callable[[], Session]) -> None:
        self._session = session

    def perform(self, run: Run) -> Ended | None:
        """Call the function; None if the run finished its job in a transaction of its own."""
        return copy_context().run(self._perform, run)

    def _perform(self, run: Run) -> Ended | None:
        try:
            args, kwargs = run.start()
            if run.registered.transactional:
                with self._session() as session, session.begin():
                    run.finish(session, run.registered.function(session, *args, **kwargs))
                return None
            result = run.registered.function(*args, **kwargs)
            return None if run.has_finished else run.succeeded(result)
        except BaseException as error:
            return run.failed(error)

    def interrupt(self, run: Run) -> None:
        """Do nothing: the task sees `is_cancelled`."""

    def close(self) -> None:
        """Do nothing: there is nothing to free."""


class OnLoop:
    """Calls coroutine functions on the event loop it is awaited on."""

    def __init__(self, session: Callable[[], AsyncSession]) -> None:
        self._session = session

    async def perform(self, run: Run) -> Ended | None:
        """Await the function; None if the run finished its job in a transaction of its own."""
        try:
            args, kwargs = run.start()
            if run.registered.transactional:
                async with self._session() as session, session.begin():
                    result = await run.registered.function(session, *args, **kwargs)
                    await run.afinish(session, result)
                return None
            result = await run.registered.function(*args, **kwargs)
            return None if run.has_finished else run.succeeded(result)
        except BaseException as error:
            return run.failed(error)


def alone(run: Run) -> Ended | None:
    """Call the function in a child process, a coroutine function on a loop of its own."""
    try:
        args, kwargs = run.start()
        result = run.registered.function(*args, **kwargs)
        return run.succeeded(asyncio.run(result) if run.registered.is_async else result)
    except BaseException as error:
        return run.failed(error)
