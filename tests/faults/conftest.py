"""Private clusters and tables of the fault tests."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

import pytest
from sqlalchemy import Engine, create_engine

from sqlqueue.integrations.alembic import migrate
from tests.faults.cluster import Cluster
from tests.faults.history import request_table
from tests.harness import application_table, load_app


@contextmanager
def migrated(settings: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """Run a durable cluster, with the tables of sqlqueue and of the tests' application."""
    with Cluster(settings) as cluster:
        prepare(cluster.url)
        yield cluster


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A durable cluster of the test's own, with a migrated database; its parameter are settings."""
    with migrated(getattr(request, "param", None)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[Cluster]:
    """A durable cluster that the tests of a module share, with a migrated database."""
    with migrated() as cluster:
        yield cluster


@pytest.fixture
def private(create_database: Callable[[], str]) -> str:
    """The url of a migrated database of the test's own, on the shared server."""
    prepare(url := create_database())
    return url


def prepare(url: str) -> None:
    """Migrate a database and make the application's tables there."""
    engine = create_engine(url)
    migrate(engine)
    application_table(engine)
    request_table(engine)
    engine.dispose()


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
