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
from contextvars import Context
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, Protocol, cast

from sqlqueue.run import Run, has_traces
from sqlqueue.store import Ended

log = logging.getLogger("sqlqueue.worker")
IN_A_ROW = 32  # runs that a slot takes before it lets others use the loop
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

    Each run has a task of the loop to itself, but for those that end without waiting for
    anything and leave no traces in their context: the next run goes on in the same task, since
    making one costs more than they do.
    """

    def __init__(
        self,
        slots: int,
        perform: Callable[[Run], Coroutine[Any, Any, Ended | None]],
        close: Callable[[], Coroutine[Any, Any, None]],
        done: Done,
    ) -> None:
        self._slots = slots
        self._perform = perform
        self._close = close
        self._done = done
        self._waiting: deque[Run] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="sqlqueue loop", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def submit(self, runs: Sequence[Run]) -> None:
        self._waiting.extend(runs)
        self._loop.call_soon_threadsafe(self._fill)

    def withdraw(self) -> list[Run]:
        withdrawn: list[Run] = []
        with suppress(IndexError):  # the loop took the last one
            while True:
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

    def _fill(self) -> None:
        for _ in range(min(len(self._waiting), self._slots - len(self._tasks))):
            work = self._loop.create_task(self._serve(), context=Context())
            self._tasks.add(work)

    async def _serve(self) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())
        quick = 0
        try:
            while self._waiting:
                run = self._waiting.popleft()
                run.handle = task
                steps = _Steps(self._perform(run))
                try:
                    ended = await steps
                except asyncio.CancelledError as error:  # while it cleaned up
                    ended = run.failed(error)
                run.handle = None
                self._done(run, ended)
                if steps.have_waited or task.cancelling() or has_traces():
                    return
                quick += 1
                if quick % IN_A_ROW == 0:
                    await asyncio.sleep(0)
        except IndexError:  # somebody withdrew the last one
            return
        finally:
            self._tasks.discard(task)
            self._fill()

    async def _end(self) -> None:
        await asyncio.wait({*self._tasks, asyncio.create_task(self._close())}, timeout=0.5)
        self._loop.stop()


class _Steps(Awaitable[Ended | None]):
    """A coroutine, to be awaited; says afterwards whether it has waited for anything."""

    def __init__(self, coroutine: Coroutine[Any, Any, Ended | None]) -> None:
        self._coroutine = coroutine
        self.have_waited = False

    def __await__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: Any) -> Any:
        waits_for = self._coroutine.send(value)
        self.have_waited = True
        return waits_for

    def throw(self, *error: Any) -> Any:
        return self._coroutine.throw(*error)


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
