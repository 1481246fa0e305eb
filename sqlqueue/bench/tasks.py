"""The tasks that the benchmark runs, and their queue.

They stand in a module so that every process finds them; where the database is, each process
says for itself, with `at`.
"""

import asyncio
import resource
import sys
import time

from sqlqueue.queue import Queue

WEIGH_EVERY = 100_000  # jobs
queue = Queue("postgresql+psycopg://")
stamps: list[tuple[int, float]] = []  # (number of a job, what its task noted), in this process


def at(url: str) -> Queue:
    """Return the queue, which from now on is in the database at `url`."""
    queue.engine.dispose()
    queue.engine = Queue(url).engine
    return queue


@queue.task
async def on_loop(n: int) -> None:
    """Do nothing, on the event loop."""


@queue.task
def in_thread(n: int) -> None:
    """Do nothing, in a thread."""


@queue.task(executor="process")
def in_process(n: int) -> None:
    """Do nothing, in a child process."""


@queue.task
async def nap(n: int) -> None:
    """Keep a slot busy without using the processor."""
    await asyncio.sleep(0.05)


@queue.task
async def stamp(n: int) -> None:
    """Note when it started, by the clock of this machine."""
    stamps.append((n, time.time()))


@queue.task
async def weigh(n: int) -> None:
    """Note now and then the most memory that this process has used, in bytes."""
    if (n + 1) % WEIGH_EVERY == 0:
        unit = 1 if sys.platform == "darwin" else 1024
        stamps.append((n + 1, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit))
