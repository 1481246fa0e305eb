"""Calling a task's function for a run: the only place where user code is entered.

Every way out of user code, an exception or a result that is no JSON, becomes the description
of how the run ended.
"""

import asyncio
from collections.abc import Callable
from contextlib import nullcontext

from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import Session

from sqlqueue.run import Run
from sqlqueue.store import Ended

NOTHING = nullcontext()


class InThread:
    """Calls functions in the thread it is used in, coroutine functions on a loop of their own.

    It cannot stop them: a task sees `is_cancelled`.
    """

    def __init__(self, session: Callable[[], Session]) -> None:
        self._session = session

    def perform(self, run: Run) -> Ended | None:
        """Call the function; None if the run finished its job in a transaction of its own."""
        try:
            args, kwargs = run.start()
            if run.registered.transactional:
                with run.around(), self._session() as session, session.begin():
                    run.finish(session, run.registered.function(session, *args, **kwargs))
                return None
            with run.around() if run.registered.queue.around_run else NOTHING:
                result = run.registered.function(*args, **kwargs)
                if run.registered.is_async:
                    result = asyncio.run(result)
            return None if run.has_finished else run.succeeded(result)
        except BaseException as error:
            return run.failed(error)

    def close(self) -> None:
        """Do nothing: there is nothing to free."""


class OnLoop:
    """Calls coroutine functions on the event loop it is awaited on."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._session = async_sessionmaker(engine, expire_on_commit=False)

    async def perform(self, run: Run) -> Ended | None:
        """Await the function; None if the run finished its job in a transaction of its own."""
        try:
            args, kwargs = run.start()
            if run.registered.transactional:
                with run.around():
                    async with self._session() as session, session.begin():
                        result = await run.registered.function(session, *args, **kwargs)
                        await run.afinish(session, result)
                return None
            with run.around() if run.registered.queue.around_run else NOTHING:
                result = await run.registered.function(*args, **kwargs)
            return None if run.has_finished else run.succeeded(result)
        except BaseException as error:
            return run.failed(error)
