"""Writing in the caller's transaction, whatever kind of connection holds it.

What is borrowed is never committed, rolled back or closed here. All logic is written once, over
something that executes; async callers cross over in `across`, and nowhere else.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg.rows import tuple_row
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


class _Raw:
    """A psycopg connection, through a cursor of our own: its settings stay its own."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection

    def exec_driver_sql(self, statement: str, parameters: Any = None, /) -> Any:
        return psycopg.Cursor(self._connection, row_factory=tuple_row).execute(
            statement, parameters
        )


class _Rows(list[Any]):
    def fetchall(self) -> list[Any]:
        return self


class _AsyncRaw:
    """The same for an async psycopg connection, inside `greenlet_spawn`."""

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection

    def exec_driver_sql(self, statement: str, parameters: Any = None, /) -> Any:
        cursor = psycopg.AsyncCursor(self._connection, row_factory=tuple_row)
        await_only(cursor.execute(statement, parameters))
        return _Rows(await_only(cursor.fetchall()) if cursor.description else ())


def within(transaction: Transaction, work: Callable[[Executes], T]) -> T:
    """Do `work` in a transaction of a sync Session or Connection, or of a psycopg connection.

    Raises UnsupportedTransaction for anything else.
    """
    if isinstance(transaction, Session):
        transaction = transaction.connection()
    if isinstance(transaction, Connection):
        return _guarded(_checked(transaction), work)
    if isinstance(transaction, psycopg.Connection):
        return work(_Raw(transaction))
    if isinstance(transaction, AsyncSession | AsyncConnection | psycopg.AsyncConnection):
        raise UnsupportedTransaction(
            f"{type(transaction).__name__} is async: await the method whose name begins with `a`"
        )
    raise _unsupported(transaction)


async def across(transaction: Transaction, work: Callable[[Executes], T]) -> T:
    """Do `work` in a transaction of an AsyncSession, AsyncConnection or psycopg's.

    Raises UnsupportedTransaction for anything else.
    """
    if isinstance(transaction, AsyncSession):
        transaction = await transaction.connection()
    if isinstance(transaction, AsyncConnection):
        return await transaction.run_sync(lambda conn: _guarded(_checked(conn), work))
    if isinstance(transaction, psycopg.AsyncConnection):
        return await greenlet_spawn(work, _AsyncRaw(transaction))
    if isinstance(transaction, Session | Connection | psycopg.Connection):
        return within(transaction, work)
    raise _unsupported(transaction)


@contextmanager
def savepoint(conn: Executes) -> Iterator[None]:
    """Undo what was done inside if it fails, and leave the caller's transaction usable.

    On a connection in autocommit, which has none, it is one transaction.
    """
    undo, end = "rollback to savepoint sqlqueue_many", "release savepoint sqlqueue_many"
    try:
        conn.exec_driver_sql("savepoint sqlqueue_many")
    except (DBAPIError, psycopg.Error) as error:
        if sqlstate(error) != "25P01":  # no active transaction
            raise
        conn.exec_driver_sql("begin")
        undo, end = "rollback", "commit"
    try:
        yield
    except BaseException:
        conn.exec_driver_sql(undo)
        raise
    finally:
        conn.exec_driver_sql(end)


def sqlstate(error: Exception) -> str | None:
    """Return the SQLSTATE of an error of the driver, whether or not SQLAlchemy wrapped it."""
    state: str | None = getattr(getattr(error, "orig", error), "sqlstate", None)
    return state


@contextmanager
def without_parameters() -> Iterator[None]:
    """Keep parameters out of the message of a database error: they hold arguments of jobs."""
    try:
        yield
    except DBAPIError as error:
        error.hide_parameters = True
        raise


def _guarded(conn: Executes, work: Callable[[Executes], T]) -> T:
    with without_parameters():
        return work(conn)


def _checked(conn: Connection) -> Connection:
    if conn.dialect.driver not in ("psycopg", "psycopg_async"):
        raise UnsupportedTransaction(
            f"sqlqueue writes through the driver psycopg, and this connection uses "
            f"{conn.dialect.driver}: use a url that begins with postgresql+psycopg://"
        )
    return conn


def _unsupported(transaction: object) -> UnsupportedTransaction:
    return UnsupportedTransaction(
        f"{type(transaction).__name__} is no transaction: give a Session, Connection, "
        f"AsyncSession or AsyncConnection of SQLAlchemy, or a connection of psycopg"
    )
