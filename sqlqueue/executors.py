"""Where tasks run: on an event loop, in threads, in child processes.

Executors know nothing of the database. Each runs at most `slots` runs at a time, lets the others
wait in order, and says of each how it ended.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, Protocol, cast

from sqlqueue.run import Run
from sqlqueue.store import Ended

log = logging.getLogger("sqlqueue.worker")
# How a run ended; None if the task finished its job itself.
Done = Callable[[Run, Ended | None], None]


class Executor(Protocol):
    """What the worker asks of an executor; all may be called from any thread."""

    def submit(self, runs: Sequence[Run]) -> None:
        """Take runs to be started, in order, as slots become free."""

    def withdraw(self) -> list[Run]:
        """Give back the runs that have not been started."""

    def interrupt(self, run: Run) -> None:
        """Ask a run to stop, `run.interrupted` being set; kill it where that is possible."""

    def stop(self) -> None:
        """End what can be ended; nothing is submitted any more."""


class LoopExecutor:
    """Runs `async def` tasks on an event loop in a thread of its own.

    Each run is a task of the loop from the start, and waits there for a slot: those that end
    without waiting for anything all run in one round of the loop.
    """

    def __init__(
        self,
        slots: int,
        perform: Callable[[Run], Awaitable[Ended | None]],
        close: Callable[[], Coroutine[Any, Any, None]],
        done: Done,
    ) -> None:
        self._perform = perform
        self._close = close
        self._done = done
        self._waiting: deque[Run] = deque()
        self._slots = asyncio.Semaphore(slots)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="sqlqueue loop", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def submit(self, runs: Sequence[Run]) -> None:
        self._waiting.extend(runs)
        self._loop.call_soon_threadsafe(self._begin, len(runs))

    def withdraw(self) -> list[Run]:
        withdrawn: list[Run] = []
        while self._waiting:
            with suppress(IndexError):  # the loop took the last one
                withdrawn.append(self._waiting.pop())
        return withdrawn

    def interrupt(self, run: Run) -> None:
        def cancel() -> None:
            if run.handle is not None:
                run.handle.cancel()

        self._loop.call_soon_threadsafe(cancel)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        self._thread.join(timeout=1)

    def _begin(self, runs: int) -> None:
        self._tasks.update([self._loop.create_task(self._work()) for _ in range(runs)])

    async def _work(self) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())
        async with self._slots:
            if not self._waiting:
                return  # it was withdrawn
            run = self._waiting.popleft()
            run.handle = task
            try:
                ended = await self._perform(run)
            except asyncio.CancelledError as error:  # while it cleaned up
                ended = run.failed(error)
            self._done(run, ended)
        self._tasks.discard(task)

    async def _end(self) -> None:
        await asyncio.wait({*self._tasks, asyncio.create_task(self._close())}, timeout=0.5)
        self._loop.stop()


class ThreadExecutor:
    """Runs things in threads: `def` tasks themselves, or a child process each.

    make     called once in each thread; returns what runs a run there
    """

    def __init__(self, slots: int, make: Callable[[], "Performer"], done: Done) -> None:
        self._slots = slots
        self._make = make
        self._done = done
        self._waiting: SimpleQueue[Run | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = threading.Semaphore(0)

    def submit(self, runs: Sequence[Run]) -> None:
        for run in runs:
            self._waiting.put(run)
            if len(self._threads) < self._slots and not self._idle.acquire(blocking=False):
                thread = threading.Thread(target=self._work, name="sqlqueue task", daemon=True)
                self._threads.append(thread)
                thread.start()

    def withdraw(self) -> list[Run]:
        withdrawn: list[Run] = []
        while True:
            try:
                run = self._waiting.get_nowait()
            except Empty:
                return withdrawn
            if run is not None:
                withdrawn.append(run)

    def interrupt(self, run: Run) -> None:
        if run.handle is not None:
            run.handle.interrupt(run)

    def stop(self) -> None:
        for _ in self._threads:
            self._waiting.put(None)
        deadline = monotonic() + 1
        for thread in self._threads:
            thread.join(timeout=max(0, deadline - monotonic()))

    def _work(self) -> None:
        performer = self._make()
        while (run := self._waiting.get()) is not None:
            run.handle = performer
            self._done(run, performer.perform(run))
            if len(self._threads) < self._slots:
                self._idle.release()
        performer.close()


class Performer(Protocol):
    """What runs one run at a time in a thread of the ThreadExecutor."""

    def perform(self, run: Run) -> Ended | None:
        """Run it to its end; return how it ended."""

    def interrupt(self, run: Run) -> None:
        """Stop it from another thread, where that is possible."""

    def close(self) -> None:
        """Free what it holds."""
