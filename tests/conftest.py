"""A real Postgres for the tests, one database for each test process.

The server is that of SQLQUEUE_TEST_URL; else a container, if an engine answers within 2 s; else
the embedded one; else everything fails and says what to do.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, make_url, text

from sqlqueue import Queue
from sqlqueue.embedded import Server
from sqlqueue.integrations.alembic import migrate
from sqlqueue.store import Store
from tests.faults.results import Recorder

# Who is started in the background ignores these, and so would all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

VERSION = pytest.StashKey[str]()
TABLES = (
    "job", "ready", "waiting", "scheduled", "lease", "run", "worker", "queue", "doorbell",
    "cancel_request", "policy", "share", "bucket", "turn", "admitted", "unique_claim",
    "schedule", "tick", "log", "verdict", "action", "flow", "total", "depth", "mute",
)  # fmt: skip


def container_engine_answers() -> bool:
    try:
        return (
            subprocess.run(["docker", "info"], capture_output=True, timeout=2, check=False)
        ).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def pytest_configure(config: pytest.Config) -> None:
    """Write down the results of the bars, if SQLQUEUE_BARS says where."""
    if file := os.environ.get("SQLQUEUE_BARS"):
        config.pluginmanager.register(Recorder(Path(file)), "bars")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Say with which Postgres; leave no text that is no UTF-8, which xdist could not pass on."""
    report = yield
    if version := item.config.stash.get(VERSION, ""):
        report.user_properties.append(("postgres", version))
    report.sections = [
        (name, text.encode(errors="replace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """The url of a database of a server on which we may create others."""
    if url := os.environ.get("SQLQUEUE_TEST_URL"):
        yield url
    elif container_engine_answers():
        from testcontainers.community.postgres import PostgresContainer

        with PostgresContainer(
            os.environ.get("SQLQUEUE_TEST_IMAGE", "postgres:15"), driver="psycopg"
        ) as container:
            yield container.get_connection_url()
    else:
        with Server(durable=False) as server:
            yield server.url


@pytest.fixture(scope="session")
def create_database(server_url: str, request: pytest.FixtureRequest) -> Iterator[object]:
    """A function that makes an empty database and returns its url; dropped at the end."""
    admin = create_engine(server_url, isolation_level="AUTOCOMMIT")
    made: list[str] = []
    with admin.connect() as conn:
        request.config.stash[VERSION] = conn.scalar(text("show server_version")) or ""

    def create() -> str:
        name = f"sqlqueue_test_{os.getpid()}_{len(made)}"
        with admin.connect() as conn:
            conn.execute(text(f"create database {name}"))
        made.append(name)
        return make_url(server_url).set(database=name).render_as_string(hide_password=False)

    yield create
    with admin.connect() as conn:
        for name in made:
            conn.execute(text(f"drop database {name} with (force)"))


@pytest.fixture(scope="session")
def migrated_url(create_database) -> str:
    """The url of a migrated database, shared by the tests of this process."""
    url = create_database()
    migrate(create_engine(url))
    return url


@pytest.fixture
def engine(migrated_url: str) -> Iterator[Engine]:
    """An engine on the migrated database, whose tables are empty."""
    engine = create_engine(migrated_url)
    with engine.begin() as conn:
        for name in TABLES:
            conn.execute(text(f"delete from sqlqueue.{name}"))
    yield engine
    engine.dispose()


@pytest.fixture
def conn(engine: Engine) -> Iterator[Connection]:
    """One transaction that is rolled back; `now()` stands still in it."""
    with engine.connect() as conn, conn.begin() as transaction:
        yield conn
        transaction.rollback()


@pytest.fixture
def store() -> Store:
    """The statements of the schema sqlqueue."""
    return Store()


@pytest.fixture
def queue(migrated_url: str, engine: Engine) -> Iterator[Queue]:
    """A queue without tasks on the empty database."""
    queue = Queue(migrated_url)
    yield queue
    queue.engine.dispose()
