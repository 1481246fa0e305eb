"""Writing in the caller's transaction, whatever kind of connection holds it.

Every statement of ours runs through the driver, on a cursor of our own: what is borrowed keeps its
settings, and is never committed, rolled back or closed here. All logic is written once, for sync
code; async callers cross over in `across`, and nowhere else.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg.rows import namedtuple_row
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only, greenlet_spawn

from sqlqueue.errors import UnsupportedTransaction
from sqlqueue.store import Executes

T = TypeVar("T")
Transaction = (
    Session
    | Connection
    | AsyncSession
    | AsyncConnection
    | psycopg.Connection[Any]
    | psycopg.AsyncConnection[Any]
)


class Driver:
    """A psycopg connection, as the store uses it."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def exec_driver_sql(self, statement: str, parameters: Any = None, /) -> Any:
        """Run a statement, as a SQLAlchemy Connection does."""
        cursor = psycopg.Cursor(self._connection, row_factory=namedtuple_row)
        return cursor.execute(statement, parameters)


class _Rows(list[Any]):
    def fetchall(self) -> list[Any]:
        return self


class _AsyncDriver:
    """The same for an async psycopg connection, inside `greenlet_spawn`."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def exec_driver_sql(self, statement: str, parameters: Any = None, /) -> Any:
        cursor = psycopg.AsyncCursor(self._connection, row_factory=namedtuple_row)
        await_only(cursor.execute(statement, parameters))
        return _Rows(await_only(cursor.fetchall()) if cursor.description else ())


def within(transaction: Transaction, work: Callable[[Executes], T]) -> T:
    """Do `work` in a transaction of a sync Session or Connection, or of a psycopg connection.

    Raises UnsupportedTransaction for anything else.
    """
    if isinstance(transaction, Session):
        transaction = transaction.connection()
    if isinstance(transaction, Connection):
        if not _checked(transaction).in_transaction():
            transaction.begin()  # as its own statements do
        with sqlalchemy_errors():
            return work(Driver(transaction.connection.driver_connection))
    if isinstance(transaction, psycopg.Connection):
        return work(Driver(transaction))
    if isinstance(transaction, AsyncSession | AsyncConnection | psycopg.AsyncConnection):
        raise UnsupportedTransaction(
            f"{type(transaction).__name__} is async: await the method whose name begins with `a`"
        )
    raise UnsupportedTransaction(
        f"{type(transaction).__name__} is no transaction: give a Session, Connection, "
        f"AsyncSession or AsyncConnection of SQLAlchemy, or a connection of psycopg"
    )


async def across(transaction: Transaction, work: Callable[[Executes], T]) -> T:
    """Do `work` in a transaction of an AsyncSession, AsyncConnection or psycopg's.

    Raises UnsupportedTransaction for anything else.
    """
    if isinstance(transaction, AsyncSession):
        transaction = await transaction.connection()
    if isinstance(transaction, AsyncConnection):
        if not _checked(transaction).in_transaction():
            await transaction.begin()
        pooled = await transaction.get_raw_connection()
        with sqlalchemy_errors():
            return await greenlet_spawn(work, _AsyncDriver(pooled.driver_connection))
    if isinstance(transaction, psycopg.AsyncConnection):
        return await greenlet_spawn(work, _AsyncDriver(transaction))
    return within(transaction, work)


@contextmanager
def savepoint(conn: Executes) -> Iterator[None]:
    """Undo what was done inside if it fails, and leave the caller's transaction usable.

    On a connection in autocommit, which has none, it is one transaction.
    """
    undo, end = "rollback to savepoint sqlqueue_many", "release savepoint sqlqueue_many"
    try:
        conn.exec_driver_sql("savepoint sqlqueue_many")
    except psycopg.errors.NoActiveSqlTransaction:
        conn.exec_driver_sql("begin")
        undo, end = "rollback", "commit"
    try:
        yield
    except BaseException:
        conn.exec_driver_sql(undo)
        raise
    finally:
        conn.exec_driver_sql(end)


@contextmanager
def sqlalchemy_errors() -> Iterator[None]:
    """Raise errors of the driver as SQLAlchemy does, but without parameters: those are secret."""
    try:
        yield
    except psycopg.Error as error:
        raise DBAPIError.instance(None, None, error, psycopg.Error, True) from error


C = TypeVar("C", Connection, AsyncConnection)


def _checked(conn: C) -> C:
    if conn.dialect.driver not in ("psycopg", "psycopg_async"):
        raise UnsupportedTransaction(
            f"sqlqueue writes through the driver psycopg, and this connection uses "
            f"{conn.dialect.driver}: use a url that begins with postgresql+psycopg://"
        )
    return conn
