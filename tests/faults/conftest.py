"""Private clusters and tables of the fault tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
from sqlalchemy import Engine, create_engine

from sqlqueue.integrations.alembic import migrate
from tests.faults.cluster import Cluster
from tests.faults.history import request_table
from tests.harness import application_table, load_app


@contextmanager
def migrated() -> Iterator[Cluster]:
    """Run a durable cluster, with the tables of sqlqueue and of the tests' application."""
    with Cluster() as cluster:
        engine = create_engine(cluster.url)
        migrate(engine)
        application_table(engine)
        request_table(engine)
        engine.dispose()
        yield cluster


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A durable cluster of the test's own, with a migrated database."""
    with migrated() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[Cluster]:
    """A durable cluster that the tests of a module share, with a migrated database."""
    with migrated() as cluster:
        yield cluster


@pytest.fixture
def tables(engine: Engine) -> None:
    """The application's tables in the shared database, empty."""
    application_table(engine)
    request_table(engine)


@pytest.fixture
def app(tables: None, migrated_url: str) -> Iterator[ModuleType]:
    """The application of the tests, whose tasks child processes can import; its tables empty."""
    loaded = load_app(migrated_url)
    yield loaded
    loaded.queue.engine.dispose()
