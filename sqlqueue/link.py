"""A connection of a worker's own: outside every pool, opened again after an error."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from sqlqueue.transaction import without_parameters


class Link:
    """Lends one connection for one transaction at a time.

    isolation  READ COMMITTED: what skipping locked rows and counting needs, whatever the
               database's default; or AUTOCOMMIT
    """

    def __init__(self, engine: Engine, isolation: str = "READ COMMITTED") -> None:
        self._engine = engine
        self._isolation = isolation
        self._conn: Connection | None = None

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """Lend the connection for a transaction; after an error of the database it is closed."""
        try:
            with without_parameters():
                if self._conn is None:
                    conn = self._engine.connect()
                    self._conn = conn.execution_options(isolation_level=self._isolation)
                    conn.detach()
                with self._conn.begin():
                    yield self._conn
        except DBAPIError:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection; the next transaction opens another."""
        conn, self._conn = self._conn, None
        if conn is not None:
            conn.invalidate()
            conn.close()
