"""The pytest plugin: a Postgres for the tests of an application, and a clean queue for each.

The server is that of SQLQUEUE_TEST_URL, else an embedded one (extra `embedded`).
"""

import os
import uuid
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import create_engine

from sqlqueue.embedded import Server
from sqlqueue.queue import Queue
from sqlqueue.testing import clean, throwaway


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
    with throwaway(sqlqueue_server, f"sqlqueue_{uuid.uuid4().hex}") as url:
        yield url


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
