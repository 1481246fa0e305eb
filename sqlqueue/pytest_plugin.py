"""The pytest plugin: a Postgres for the tests of an application, and a clean queue for each.

The server is that of SQLQUEUE_TEST_URL, else an embedded one (extra `embedded`).
"""

import os
import uuid
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import create_engine, make_url, text

from sqlqueue.embedded import Server
from sqlqueue.integrations.alembic import migrate
from sqlqueue.queue import Queue
from sqlqueue.testing import clean


@pytest.fixture(scope="session")
def sqlqueue_server() -> Iterator[str]:
    """The url of a server on which databases may be created."""
    if url := os.environ.get("SQLQUEUE_TEST_URL"):
        yield url
        return
    with Server(durable=False) as server:
        yield server.url


@pytest.fixture(scope="session")
def sqlqueue_url(sqlqueue_server: str) -> Iterator[str]:
    """The url of a throwaway database in which sqlqueue is migrated; dropped at the end."""
    name = f"sqlqueue_{uuid.uuid4().hex}"
    admin = create_engine(sqlqueue_server, isolation_level="AUTOCOMMIT")
    with admin.connect() as conn:
        conn.execute(text(f"create database {name}"))
    url = make_url(sqlqueue_server).set(database=name).render_as_string(hide_password=False)
    migrate(create_engine(url))
    yield url
    with admin.connect() as conn:
        conn.execute(text(f"drop database {name} with (force)"))
    admin.dispose()


@pytest.fixture
def use_queue(sqlqueue_url: str) -> Iterator[Callable[[Queue], Queue]]:
    """A function that has an application's queue work in the throwaway database, empty."""
    used: list[tuple[Queue, object]] = []
    engine = create_engine(sqlqueue_url)

    def use(queue: Queue) -> Queue:
        used.append((queue, queue.engine))
        queue.engine = engine
        clean(queue)
        return queue

    yield use
    for queue, before in used:
        clean(queue)
        queue.engine = before  # type: ignore[assignment]
    engine.dispose()
