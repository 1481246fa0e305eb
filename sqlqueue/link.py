"""A connection of a worker's own: outside every pool, opened again after an error."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import psycopg
from sqlalchemy import URL, Connection, Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sqlqueue.store import Executes, Store
from sqlqueue.transaction import Driver

DatabaseError = (psycopg.Error, SQLAlchemyError)


class Link:
    """Lends one connection for one transaction at a time, through the driver itself.

    The engine opens it, with all that the application has set up there; while it is being opened,
    or has not been, `conn` is None.
    """

    def __init__(self, engine: Engine, store: Store) -> None:
        self._engine = engine
        self._store = store
        self.conn: Connection | None = None
        self.driver: psycopg.Connection[Any]

    @contextmanager
    def begin(self, patience: timedelta) -> Iterator[Executes]:
        """Lend the connection for a transaction that may be silent for `patience`.

        After an error of the database the connection is closed. Raises what the driver raises.
        """
        try:
            if self.conn is None:
                self.driver = driver_of(conn := self._engine.connect())
                self.conn = conn
            # One round trip: a client-side cursor sends two statements as one text.
            psycopg.ClientCursor(self.driver).execute(*self._store.begin(patience))
            yield Driver(self.driver)
            self.driver.commit()
        except DatabaseError:
            self.close()
            raise
        except BaseException:
            self.driver.rollback()
            raise

    def cut(self) -> None:
        """Break the connection under a thread that may wait for an answer in vain, from another."""
        with suppress(OSError, psycopg.Error):
            if self.conn:
                fd = self.driver.fileno()
                with socket.fromfd(fd, socket.AF_INET, socket.SOCK_STREAM) as found:
                    found.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; the next transaction opens another."""
        conn, self.conn = self.conn, None
        if conn is not None:
            self.driver.close()
            conn.invalidate()  # what was taken out of its pool is closed by us alone
            conn.close()


def async_engine(url: URL, like: psycopg.Connection[Any], **pool: Any) -> AsyncEngine:
    """Make an engine for coroutines, which connects as an open connection did, however that was.

    But where the url says: of several servers, or addresses, another may have taken over.
    """
    how = {"password": like.info.password, "prepare_threshold": like.prepare_threshold}
    how |= like.info.get_parameters()
    places = ("host", "port") if url.host or "host" in url.query else ()
    for name in ("hostaddr", *places) if "host" in how else places:
        how.pop(name, None)
    return create_async_engine(url, hide_parameters=True, connect_args=how, **pool)


def driver_of(conn: Connection) -> psycopg.Connection[Any]:
    """Take the psycopg connection out of the pool it came from; every statement commits."""
    conn.detach()
    driver: psycopg.Connection[Any] = conn.connection.dbapi_connection  # type: ignore[assignment]
    driver.autocommit = True
    return driver
