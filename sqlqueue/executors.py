"""Where tasks run: on an event loop, in threads, in child processes.

Executors know nothing of the database. Each runs at most `slots` runs at a time, lets the others
wait in order, and says of each how it ended. All their methods may be called from any thread.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from contextvars import Context
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

from sqlqueue.run import Run, has_traces
from sqlqueue.store import Ended

IN_A_ROW = 32  # runs that a slot takes before it lets others use the loop
# How a run ended; None if the task finished its job itself.
Done = Callable[[Run, Ended | None], None]
Work = Coroutine[Any, Any, Any]


class LoopExecutor:
    """Runs `async def` tasks on an event loop in a thread of its own.

    Each run has a task of the loop to itself, but for those that end without waiting for
    anything and leave no traces in their context: the next run goes on in the same task, since
    making one costs more than they do.
    """

    def __init__(
        self, slots: int, perform: Callable[[Run], Work], close: Callable[[], Work], done: Done
    ) -> None:
        self._slots = slots
        self._perform = perform
        self._close = close
        self._done = done
        self.waiting: SimpleQueue[Run] = SimpleQueue()
        self._tasks: set[asyncio.Task[None]] = set()
        loop = self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=loop.run_forever, name="sqlqueue loop", daemon=True)
        self._thread.start()

    def submit(self, runs: Sequence[Run]) -> None:
        """Take runs to be started, in order, as slots become free."""
        for run in runs:
            self.waiting.put(run)
        self._loop.call_soon_threadsafe(self._fill)

    def interrupt(self, run: Run) -> None:
        """Ask a run to stop, `run.interrupted` being set; kill it where that is possible."""
        self._loop.call_soon_threadsafe(lambda: run.handle and run.handle.cancel())

    def stop(self) -> None:
        """End what can be ended; nothing is submitted any more."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        self._thread.join(timeout=1)

    def _fill(self) -> None:
        for _ in range(min(self.waiting.qsize(), self._slots - len(self._tasks))):
            self._tasks.add(self._loop.create_task(self._serve(), context=Context()))

    async def _serve(self) -> None:
        task: Any = asyncio.current_task()
        waited = asyncio.Event()  # set as soon as others use the loop
        self._loop.call_soon(waited.set)
        try:
            for _ in range(IN_A_ROW):
                run = self.waiting.get_nowait()
                run.handle = task
                ended = await self._perform(run)
                run.handle = None
                self._done(run, ended)
                if waited.is_set() or task.cancelling() or has_traces():
                    break
        except Empty:
            return
        finally:
            self._tasks.discard(task)
            self._fill()

    async def _end(self) -> None:
        await asyncio.wait({*self._tasks, asyncio.create_task(self._close())}, timeout=0.5)
        self._loop.stop()


class ThreadExecutor:
    """Runs things in threads, one for each slot: `def` tasks themselves, or child processes.

    make     called once for each slot; returns what runs one run at a time, by `perform` and
             `close`. What can stop a run has `interrupt`, and is the run's `handle` meanwhile
    """

    def __init__(self, slots: int, make: Callable[[], Any], done: Done) -> None:
        self._done = done
        self.waiting: SimpleQueue[Run | None] = SimpleQueue()
        self._free = [make() for _ in range(slots)]  # the last one used is the first to be used
        self._threads: list[threading.Thread] = []
        for _ in range(slots):
            thread = threading.Thread(target=self._work, name="sqlqueue task", daemon=True)
            self._threads.append(thread)
            thread.start()

    def submit(self, runs: Sequence[Run]) -> None:
        """Take runs to be started, in order, as slots become free."""
        for run in runs:
            self.waiting.put(run)

    def interrupt(self, run: Run) -> None:
        """Ask a run to stop, `run.interrupted` being set; kill it where that is possible."""
        if performer := run.handle:
            performer.interrupt(run)

    def stop(self) -> None:
        """End what can be ended; nothing is submitted any more."""
        for _ in self._threads:
            self.waiting.put(None)
        deadline = monotonic() + 1
        for thread in self._threads:
            thread.join(timeout=max(0, deadline - monotonic()))

    def _work(self) -> None:
        while (run := self.waiting.get()) is not None:
            performer = self._free.pop()
            ended = Context().run(performer.perform, run)
            self._free.append(performer)
            self._done(run, ended)
        self._free.pop().close()


def withdrawn(executor: "Executor") -> list[Run]:
    """Take back the runs that have not been started."""
    taken: list[Any] = []
    with suppress(Empty):
        while True:
            taken.append(executor.waiting.get_nowait())
    return taken


Executor = LoopExecutor | ThreadExecutor
