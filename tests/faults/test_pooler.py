"""Bar R25: a pooler in transaction mode, with five connections to the server for fifty clients."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import OperationalError

from sqlqueue import Queue
from sqlqueue.integrations.alembic import migrate
from tests.faults.checker import assert_nothing_wrong, drained
from tests.faults.history import Enqueuers, request_table
from tests.faults.pooler import SERVER_CONNECTIONS, Pooler
from tests.harness import CLOCKS, ROOT, SOON, application_table, tree, value, wait_until, workers
from tests.matrix import CORE_TESTS, STORE_TESTS, run_pooled

pytestmark = pytest.mark.alone

CLIENTS = 50
NO_STATEMENTS = {"prepare_threshold": None}  # what docs/operating.md tells applications to give

# What a session may hold beyond a transaction, but for LISTEN. The pooler itself sets the rest.
STATE = """
select 'statement', name from pg_prepared_statements
union all select 'cursor', name from pg_cursors where is_holdable
union all select 'table', relname from pg_class where relnamespace = pg_my_temp_schema()
union all select 'lock', cast(objid as text) from pg_locks
    where locktype = 'advisory' and pid = pg_backend_pid()
union all select 'setting', name from pg_settings
    where source = 'session'
      and name not in ('application_name', 'client_encoding', 'DateStyle', 'TimeZone')
      and name <> 'standard_conforming_strings'
"""


@pytest.fixture
def pooled(server_url: str, create_database: Callable[[], str]) -> Iterator[Callable[..., Any]]:
    """A function that gives an engine on a migrated database, with its pooler."""
    with ExitStack() as ends:

        def start(**options: Any) -> tuple[Engine, Pooler]:
            pooler = ends.enter_context(Pooler(server_url, **options))
            url = pooler.url(make_url(create_database()).database)
            engine = create_engine(url, connect_args=NO_STATEMENTS, pool_size=CLIENTS)
            ends.callback(engine.dispose)
            migrate(engine)
            application_table(engine)
            request_table(engine)
            for conn in [engine.connect() for _ in range(CLIENTS)]:
                conn.close()  # stays open in the engine's pool, and waits at the pooler
            return engine, pooler

        yield start


def sessions(engine: Engine) -> dict[int, list[tuple[str, str]]]:
    """Return what each session of the server holds, by its process id: one transaction in each."""
    with ExitStack() as ends:
        conns = [ends.enter_context(engine.connect()) for _ in range(SERVER_CONNECTIONS)]
        pids = [conn.scalar(text("select pg_backend_pid()")) for conn in conns]
        states = [[tuple(row) for row in conn.execute(text(STATE))] for conn in conns]
    return dict(zip(pids, states, strict=True))


def test_r25_fifty_clients_and_their_workers_share_five_connections(pooled, monkeypatch, capfd):
    engine, pooler = pooled()
    url = engine.url.render_as_string(hide_password=False)
    monkeypatch.setenv("SQLQUEUE_TEST_POOLER", "1")

    with tree(url, 2, slots=4):
        wait_until(lambda: len(workers(engine)) == 2, within=20, what="two workers")
        asked = Enqueuers(
            Queue(engine), seed=25, threads=CLIENTS, rate=60, seconds=0.05, max_crashes=100
        )
        with asked as enqueuers:
            wait_until(lambda: len(enqueuers.history.acknowledged) > 400, within=30)
            (pool,) = (
                row for row in pooler.show("pools") if row["database"] == engine.url.database
            )
        drained(engine)

    (total,) = (
        row for row in pooler.show("stats_totals") if row["database"] == engine.url.database
    )
    history = enqueuers.history
    waited = float(total["wait_time"]) / 1e6
    said = capfd.readouterr().err
    print(
        f"{len(history.acknowledged)} jobs of {CLIENTS} clients through {SERVER_CONNECTIONS}"
        f" connections, {total['xact_count']} transactions waited {waited:.1f} s"
    )
    clients = pool["cl_active"] + pool["cl_waiting"]
    assert clients > CLIENTS, f"inconclusive: {clients} clients"
    assert waited > 0, "inconclusive: nobody had to wait"
    assert history.repeated == 0, "somebody got an error instead of a connection"
    assert_nothing_wrong(engine, history)
    assert value(engine, "select count(*) from sqlqueue.run where outcome = 'failed'") == 0
    assert "statement" not in said, "a worker prepared statements"
    found = sessions(engine)
    assert len(found) == SERVER_CONNECTIONS
    assert not any(found.values()), found


def test_r25_a_worker_behind_a_pooler_says_that_it_polls(pooled, caplog):
    engine, _ = pooled()
    queue = Queue(engine)
    seen = []

    @queue.task(name="see")
    def see(number: int) -> None:
        seen.append(number)

    with caplog.at_level("INFO", "sqlqueue.worker"), queue.worker(**CLOCKS):
        wait_until(lambda: "hears no notification, so it polls" in caplog.text)
        jobs = [queue.send("see", number) for number in range(3)]
        assert [job.wait(SOON) for job in jobs] == [None] * 3

    assert sorted(seen) == [0, 1, 2]


def test_r25_the_command_line_waits_through_a_pooler_given_only_its_url(pooled):
    engine, _ = pooled()
    queue = Queue(engine)

    @queue.task(name="nap")
    def nap() -> str:
        threading.Event().wait(2)
        return "rested"

    url = engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "sqlqueue", "--url", url, "enqueue", "nap", "--wait"]
    with queue.worker(**CLOCKS), ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(subprocess.run, command, cwd=ROOT, capture_output=True, text=True)
            for _ in range(4)
        ]
        ends = [one.result(60) for one in asked]

    assert [one.stdout for one in ends] == ['"rested"\n'] * 4, [one.stderr for one in ends]


def test_r25_who_gets_no_connection_is_told_and_a_worker_goes_on(pooled):
    engine, _ = pooled(patience=1)
    queue = Queue(engine)

    @queue.task(name="say")
    def say(number: int) -> int:
        return number

    with queue.worker(**CLOCKS) as worker:
        first = queue.send("say", 1)
        assert first.wait(SOON) == 1
        with ExitStack() as ends:
            conns = [ends.enter_context(engine.connect()) for _ in range(SERVER_CONNECTIONS)]
            for conn in conns:
                conn.execute(text("select 1"))
            with pytest.raises(OperationalError, match="query_wait_timeout"):
                queue.send("say", 2)
        assert queue.send("say", 3).wait(SOON) == 3
        assert worker.error is None


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "tests",
    [
        pytest.param(CORE_TESTS, id="core"),
        pytest.param(STORE_TESTS, id="all", marks=pytest.mark.nightly),
    ],
)
def test_r25_the_tests_pass_through_five_connections(server_url, tests):
    result = run_pooled(tests, server_url)
    print(result)
    assert result.is_good
