"""One snapshot a second for all who watch, and none while nobody does."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from hashlib import sha256
from time import monotonic
from typing import Any

TOPICS = ("overview", "queues", "workers", "flow")
EVERY = 1.0  # seconds between two snapshots
SHARE = 0.1  # of the time that they may take
ALIVE = 15.0  # seconds after which a stream says that it is alive


class Hub:
    """Reads `totals` while somebody watches, and tells all watchers which topics changed.

    snapshots  how many were read
    """

    def __init__(self, read: Callable[[], dict[str, Any]]) -> None:
        self._read = read
        self._watchers: set[asyncio.Queue[str]] = set()
        self._task: asyncio.Task[None] | None = None
        self._last: dict[str, str] = {}
        self._read_at = float("-inf")
        self._lock = asyncio.Lock()
        self.snapshots = 0
        self._is_closed = False

    async def events(self) -> AsyncIterator[str]:
        """Yield the events of one watcher, as server-sent events are written."""
        mine: asyncio.Queue[str] = asyncio.Queue(maxsize=20)
        self._watchers.add(mine)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._go())
        try:
            yield "retry: 2000\n\n"
            while not self._is_closed:
                try:
                    yield await asyncio.wait_for(mine.get(), ALIVE)
                except TimeoutError:
                    yield ": alive\n\n"
        finally:
            self._watchers.discard(mine)

    def close(self) -> None:
        """End all streams: the server stops."""
        self._is_closed = True
        for watcher in self._watchers:
            if not watcher.full():
                watcher.put_nowait(": bye\n\n")

    async def snapshot(self) -> tuple[str, str]:
        """Return the topics as JSON and a tag that changes with them; at most EVERY seconds old."""
        async with self._lock:
            if monotonic() - self._read_at > EVERY:
                await self._look()
        text = json.dumps(self._last)
        return text, sha256(text.encode()).hexdigest()[:16]

    async def _look(self) -> list[str]:
        """Read a snapshot; return the topics that changed."""
        row = await asyncio.to_thread(self._read)
        self._read_at = monotonic()
        self.snapshots += 1
        now = {topic: json.dumps(row[topic], sort_keys=True, default=str) for topic in TOPICS}
        changed = [topic for topic in TOPICS if now[topic] != self._last.get(topic)]
        self._last = now
        return changed

    async def _go(self) -> None:
        while self._watchers:
            began, changed = monotonic(), []
            try:
                async with self._lock:
                    changed = await self._look()
            except Exception:
                changed = ["gone"]  # the database is away: pages say so when they look
            for watcher in self._watchers:
                if changed and not watcher.full():
                    watcher.put_nowait(f"event: changed\ndata: {' '.join(changed)}\n\n")
            took = monotonic() - began
            await asyncio.sleep(max(EVERY - took, took / SHARE))
