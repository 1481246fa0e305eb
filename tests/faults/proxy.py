"""A TCP proxy before a Postgres server, which injects the faults of a network.

It reads the messages of the server, so that it can tell a reply that says "committed" from any
other. Every connection through it is plain (no TLS), and its faults hold for all of them until
`heal`.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Self

from sqlalchemy import make_url

Sent = Callable[[bytes], bool]
ANYTHING: Sent = lambda sent: True  # noqa: E731


class Proxy:
    """A proxy to the server of `url`; its own `url` leads through it.

    drops_notifications  swallow NOTIFY's messages, as a pooler in transaction mode does
    """

    def __init__(self, url: str, *, drops_notifications: bool = False) -> None:
        self._server = make_url(url)
        self._drops_notifications = drops_notifications
        self._loop = asyncio.new_event_loop()
        self._pipes: set[_Pipe] = set()
        self._open = asyncio.Event()
        self._delay = 0.0
        self._refuses = False
        self._swallows = 0
        self._which = self._holed = ANYTHING
        self.swallowed = 0  # commits whose reply never arrived
        self.cut = 0  # connections that were cut

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._listener = self._do(asyncio.start_server(self._serve, "127.0.0.1", 0)).result()
        self._open.set()
        return self

    def __exit__(self, *_: object) -> None:
        async def close() -> None:
            self._open.set()
            self._listener.close()
            for pipe in list(self._pipes):
                pipe.cut()
            await asyncio.gather(*(pipe.task for pipe in self._pipes), return_exceptions=True)

        self._do(close()).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        """The url of the same database, through the proxy."""
        port = self._listener.sockets[0].getsockname()[1]
        plain = {"sslmode": "disable", "gssencmode": "disable"}
        through = self._server.set(host="127.0.0.1", port=port).update_query_dict(plain)
        return through.render_as_string(hide_password=False)

    # Faults

    def delay(self, seconds: float) -> None:
        """Hold back everything in both directions by this time."""
        self._delay = seconds

    def black_hole(self, which: Callable[[bytes], bool] = ANYTHING) -> None:
        """Pass nothing on, in either direction, and close nothing; new connections hang too.

        `which` is asked with what a connection's client sent last.
        """
        self._holed = which
        self._call(self._open.clear)

    def refuse(self) -> None:
        """Close each new connection at once."""
        self._refuses = True

    def reset(self) -> None:
        """Cut every connection there is."""

        def cut_all() -> None:
            for pipe in list(self._pipes):
                pipe.cut()
                self.cut += 1

        self._call(cut_all)

    def swallow_commits(self, count: int = 1, which: Sent = ANYTHING) -> None:
        """Cut the connection instead of passing on the next `count` replies to a commit.

        The transaction is committed and the client does not know: it ended with COMMIT, or was one
        statement. `which` is asked with what the client sent in it.
        """
        self._which, self._swallows = which, count

    def lead_to(self, url: str) -> None:
        """Lead new connections to another server; those there are stay where they are."""
        self._server = make_url(url)

    def heal(self) -> None:
        """End all faults; what was cut stays cut."""
        self._delay, self._refuses, self._swallows = 0.0, False, 0
        self._call(self._open.set)

    # How it works

    def _do(self, work: Coroutine[Any, Any, Any]) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _call(self, work: Callable[[], None]) -> None:
        async def called() -> None:
            work()

        self._do(called()).result(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pipe = _Pipe(self, reader, writer)
        self._pipes.add(pipe)
        try:
            if not self._refuses:
                await pipe.run(self._server.host or "127.0.0.1", self._server.port or 5432)
        finally:
            pipe.cut()
            self._pipes.discard(pipe)

    async def passes(self, asked: bytes) -> None:
        """Wait while nothing is passed on for a connection whose client sent this last."""
        if self._delay:
            await asyncio.sleep(self._delay)
        if self._holed(asked):
            await self._open.wait()

    def swallows(self, sent: bytes) -> bool:
        """Say whether to swallow the reply to the commit of a transaction that sent this."""
        if self._swallows < 1 or not self._which(sent):
            return False
        self._swallows -= 1
        self.swallowed += 1
        return True

    def drops(self, kind: bytes) -> bool:
        """Say whether to drop a message of this kind."""
        return self._drops_notifications and kind == b"A"  # NotificationResponse


class _Pipe:
    """One connection through the proxy."""

    def __init__(
        self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._proxy, self._reader, self._writer = proxy, reader, writer
        self._server: asyncio.StreamWriter | None = None
        self._sent = self._last = b""
        self._has_begun = False  # a transaction that goes on
        self.task: asyncio.Task[Any] = asyncio.current_task()  # type: ignore[assignment]

    async def run(self, host: str, port: int) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            replies, self._server = await asyncio.open_connection(host, port)
            ways = [self._ask(self._server), self._answer(replies)]
            tasks = [asyncio.ensure_future(way) for way in ways]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def cut(self) -> None:
        for writer in (self._writer, self._server):
            if writer:
                writer.transport.abort()

    async def _ask(self, server: asyncio.StreamWriter) -> None:
        while some := await self._reader.read(65536):
            self._sent, self._last = (self._sent + some)[-65536:], some
            await self._proxy.passes(some)
            server.write(some)
            await server.drain()

    async def _answer(self, replies: asyncio.StreamReader) -> None:
        """Messages of the server are a letter, a length that counts itself, and a body."""
        while True:
            head = await replies.readexactly(5)
            body = await replies.readexactly(int.from_bytes(head[1:], "big") - 4)
            kind = head[:1]
            if kind == b"C":  # CommandComplete, which leaves the server when it has committed
                self._has_begun |= body == b"BEGIN\0"
                commits = body == b"COMMIT\0" or not self._has_begun
                if commits and self._proxy.swallows(self._sent):
                    return
            if kind == b"Z":  # ReadyForQuery
                self._has_begun = body != b"I"  # idle, in no transaction
                self._sent = self._sent if self._has_begun else b""
            if not self._proxy.drops(kind):
                await self._proxy.passes(self._last)
                self._writer.write(head + body)
                await self._writer.drain()
