"""Each check of `sqlqueue doctor`: what it says when all is well, and when there is the fault."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import Engine, create_engine, text

from sqlqueue import Queue
from sqlqueue.cli import main
from sqlqueue.cli.watch import client_checks
from sqlqueue.integrations.alembic import migrate
from sqlqueue.reports import Reports
from sqlqueue.reports.control import Control
from tests.faults.cluster import Cluster
from tests.harness import rows, value
from tests.test_store import hire

ALIVE = "update sqlqueue.worker set queues = '{default}', tasks = '{does}'"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A server of its own: some faults are those of a whole server."""
    with Cluster({"max_prepared_transactions": "2", "max_replication_slots": "2",
                  "wal_level": "logical"}) as cluster:  # fmt: skip
        migrate(create_engine(cluster.url))
        yield cluster


@pytest.fixture
def own(cluster: Cluster) -> Iterator[Engine]:
    """An engine on that server."""
    engine = create_engine(cluster.url)
    yield engine
    engine.dispose()


def checked(engine: Engine, *words: str) -> dict[str, dict[str, Any]]:
    """What doctor says, by the names of its checks."""
    url = engine.url.render_as_string(hide_password=False)
    result = CliRunner().invoke(main, ["--url", url, "doctor", "--json", *words])
    assert result.exit_code in (0, 1), result.output
    return {row["name"]: row for row in json.loads(result.stdout)}


def level(engine: Engine, name: str) -> str:
    return str(checked(engine)[name]["level"])


def run(engine: Engine, script: str) -> list[Any]:
    """Run statements as they are; return what the last one returned."""
    with engine.begin() as conn:
        result = conn.execution_options(no_parameters=True).exec_driver_sql(script)
        return list(result.all()) if result.returns_rows else []


def changed(engine: Engine, fault: str, mend: str) -> Any:
    """Make a fault by SQL, and mend it at the end."""

    @contextmanager
    def made() -> Iterator[None]:
        run(engine, fault)
        try:
            yield
        finally:
            run(engine, mend)

    return made()


def test_m24_all_is_well_on_a_new_schema(own) -> None:
    found = checked(own)
    bad = {name: row for name, row in found.items() if row["level"] != "ok"}
    assert bad == {}, bad
    with own.connect() as conn:
        names = {name for _, name, *_ in client_checks(_control(own), Reports(conn, "sqlqueue"))}
    assert names < set(found)
    assert len(found) == len(names) + 22


# By SQL: the check, what makes the fault, what mends it, and the level it has then.
FAULTS = {
    "autovacuum": (
        "alter table sqlqueue.ready set (autovacuum_enabled = off)",
        "alter table sqlqueue.ready reset (autovacuum_enabled)",
        "error",
    ),
    "partitions ahead": (
        "create table far as select 1; do $$ declare one record; begin"
        " for one in select inhrelid::regclass as name from pg_inherits"
        " where inhparent = 'sqlqueue.log'::regclass"
        " and inhrelid::regclass::text ~ '_[0-9]{8}$'"
        " and right(inhrelid::regclass::text, 8) > to_char(now() + interval '3 days', 'YYYYMMDD')"
        " loop execute 'drop table ' || one.name; end loop; end $$",
        "drop table far; select sqlqueue.tidy()",
        "error",
    ),
    "partitions overdue": (
        "create table sqlqueue.log_20200106 partition of sqlqueue.log"
        " for values from ('016f78a4-0000-7000-8000-000000000000')"
        " to ('016f9cb0-0000-7000-8000-000000000000')",
        "drop table sqlqueue.log_20200106",
        "warn",
    ),
    "default partitions": (
        "insert into sqlqueue.run (job_id, run, ended_at, due_at, attempt, crashes, is_final,"
        " outcome) values (sqlqueue.new_id(), 1, now() + interval '1 year', now(), 1, 0, true,"
        " 'succeeded')",
        "delete from sqlqueue.run_default",
        "warn",
    ),
    "dead workers": (
        "insert into sqlqueue.worker (ttl, pid, slots, host, name, version, queues, tasks,"
        " heartbeat_at) values ('1 s', 1, 1, 'h', 'n', '1', '{}', '{}', now() - interval '1 h')",
        "delete from sqlqueue.worker",
        "error",
    ),
    "versions": (
        "insert into sqlqueue.worker (ttl, pid, slots, host, name, version, queues, tasks)"
        " select '1 h', 1, 1, 'h', 'n', v, '{}', '{}' from unnest(array['1', '2']) as v",
        "delete from sqlqueue.worker",
        "warn",
    ),
    "queues": (
        "select sqlqueue.enqueue('does', queue => 'nobody')",
        "delete from sqlqueue.ready; delete from sqlqueue.job",
        "error",
    ),
    "tasks": (
        "select sqlqueue.enqueue('unknown'); insert into sqlqueue.worker (ttl, pid, slots, host,"
        " name, version, queues, tasks) values ('1 h', 1, 1, 'h', 'n', '1', '{default}', '{does}')",
        "delete from sqlqueue.ready; delete from sqlqueue.job; delete from sqlqueue.worker",
        "error",
    ),
    "schedules": (
        "insert into sqlqueue.schedule (name, task, cron, next_at)"
        " values ('late', 'does', '* * * * *', now() - interval '5 minutes')",
        "delete from sqlqueue.schedule",
        "error",
    ),
    "upkeep": (
        "update sqlqueue.setting set observed_at = now() - interval '1 hour'; insert into"
        " sqlqueue.worker (ttl, pid, slots, host, name, version, queues, tasks)"
        " values ('1 h', 1, 1, 'h', 'n', '1', '{}', '{}')",
        "update sqlqueue.setting set observed_at = null; delete from sqlqueue.worker",
        "warn",
    ),
    "timeouts": (
        "alter role current_user set statement_timeout = '2s'",
        "alter role current_user reset statement_timeout",
        "warn",
    ),
    "durability": (
        "alter role current_user set synchronous_commit = off",
        "alter role current_user reset synchronous_commit",
        "warn",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_m24_a_fault_is_found(own, name) -> None:
    fault, mend, expected = FAULTS[name]
    with changed(own, fault, mend):
        own.dispose()
        found = checked(own)[name]
    assert found["level"] == expected, found
    own.dispose()
    assert level(own, name) == "ok"


def test_m24_an_old_snapshot_is_found(own, monkeypatch) -> None:
    """Five minutes cannot be waited for: the view is asked as if they had passed."""
    view = value(own, "select pg_get_viewdef('sqlqueue.health')")
    other = create_engine(own.url)
    with other.connect() as conn:
        conn.execute(text("set transaction isolation level repeatable read"))
        conn.execute(text("select txid_current()"))
        soon = view.replace("'00:05:00'", "'-00:05:00'")
        assert soon != view
        found = {row.name: row for row in run(own, soon)}
        assert found["snapshot"].level == "warn"
        assert "pg_terminate_backend" in found["snapshot"].fix
    other.dispose()


def test_m24_a_prepared_transaction_is_found(own) -> None:
    with own.connect() as conn:
        driver: Any = conn.connection.dbapi_connection
        driver.autocommit = True
        driver.execute("begin; create table held (n integer); prepare transaction 'forgotten'")
    try:
        view = value(own, "select pg_get_viewdef('sqlqueue.health')")
        soon = view.replace("(now() - '00:05:00'::interval)", "now()")
        assert soon != view
        found = {row.name: row for row in run(own, soon)}
        assert found["prepared"].level == "error"
        assert "forgotten" in found["prepared"].fix
    finally:
        with own.connect() as conn:
            driver = conn.connection.dbapi_connection
            driver.autocommit = True
            driver.execute("rollback prepared 'forgotten'")


def test_m24_an_inactive_slot_is_found(own) -> None:
    rows(own, "select pg_create_logical_replication_slot('left', 'pgoutput')")
    try:
        assert level(own, "replication slots") == "warn"
    finally:
        rows(own, "select pg_drop_replication_slot('left')")


def test_m24_an_index_that_is_not_valid_is_found(own) -> None:
    rows(own, "update pg_index set indisvalid = false"
              " where indexrelid = 'sqlqueue.ready_claim'::regclass")  # fmt: skip
    try:
        assert level(own, "indexes") == "error"
    finally:
        rows(own, "update pg_index set indisvalid = true"
                  " where indexrelid = 'sqlqueue.ready_claim'::regclass")  # fmt: skip


def test_m24_an_old_schema_is_found(create_database) -> None:
    engine = create_engine(create_database())
    migrate(engine)
    rows(engine, "update sqlqueue.alembic_version set version_num = '0003'")
    assert level(engine, "schema") == "error"
    rows(engine, "update sqlqueue.alembic_version set version_num = '0009'")
    assert level(engine, "schema") == "warn"
    engine.dispose()


def test_m24_connections_are_counted(own) -> None:
    most = int(value(own, "show max_connections"))
    others = [create_engine(own.url) for _ in range(int(most * 0.92))]
    conns = [one.connect() for one in others]
    try:
        assert level(own, "connections") == "warn"
    finally:
        for conn in conns:
            conn.close()
        for one in others:
            one.dispose()


def test_m24_a_claim_without_its_index_is_found(own) -> None:
    assert level(own, "claim plan") == "ok"
    rows(own, "alter index sqlqueue.ready_claim rename to ready_other")
    try:
        assert level(own, "claim plan") == "error"
    finally:
        rows(own, "alter index sqlqueue.ready_other rename to ready_claim")


def _control(engine: Engine) -> Control:
    control = Control()
    control.__dict__["queue"] = Queue(engine)
    return control


def test_m24_deep_finds_what_must_never_be(own) -> None:
    assert checked(own, "--deep")["invariants"]["level"] == "ok"
    job = value(own, "select sqlqueue.enqueue('does')")
    rows(own, "delete from sqlqueue.ready where job_id = :id", id=job)
    rows(own, "update sqlqueue.job set created_at = created_at")
    try:
        assert checked(own, "--deep")["invariants"]["level"] == "error"
    finally:
        rows(own, "delete from sqlqueue.job")


def test_m24_fix_runs_only_what_is_safe(own) -> None:
    fault, *_ = FAULTS["partitions overdue"]
    with changed(own, fault, "select 1"):
        assert checked(own, "--fix")["partitions overdue"]["level"] == "ok"
    with changed(own, *FAULTS["autovacuum"][:2]):
        assert checked(own, "--fix")["autovacuum"]["level"] == "error"


def test_m24_a_check_is_chosen_by_its_name(own) -> None:
    assert set(checked(own, "--only", "version", "--only", "queues")) == {"version", "queues"}
    url = own.url.render_as_string(hide_password=False)
    wrong = CliRunner().invoke(main, ["--url", url, "doctor", "--only", "nothing"])
    assert wrong.exit_code == 2
    listed = CliRunner().invoke(main, ["--url", url, "doctor", "--list"])
    assert "version" in listed.stdout.splitlines()
    with changed(own, *FAULTS["versions"][:2]):
        strict = CliRunner().invoke(main, ["--url", url, "doctor", "--strict"])
        plain = CliRunner().invoke(main, ["--url", url, "doctor"])
    assert (strict.exit_code, plain.exit_code) == (1, 0)


def test_m24_without_rights_it_is_unknown(own) -> None:
    rows(own, "create role poor login password 'poor'")
    rows(own, "grant usage on schema sqlqueue to poor; grant select on sqlqueue.health to poor")
    rows(own, "grant execute on all functions in schema sqlqueue to poor")
    try:
        poor = create_engine(own.url.set(username="poor", password="poor"))
        with own.connect() as conn:
            conn.execute(text("select 1"))
            sql = "select level from sqlqueue.health where name = 'snapshot'"
            assert value(poor, sql) == "unknown"
        poor.dispose()
    finally:
        rows(own, "drop owned by poor; drop role poor")


def test_a_worker_that_serves_makes_queues_well(own) -> None:
    with own.begin() as conn:
        hire(conn, Queue(own).store)
        conn.execute(text(ALIVE))
    try:
        rows(own, "select sqlqueue.enqueue('does')")
        found = checked(own)
        assert (found["queues"]["level"], found["tasks"]["level"]) == ("ok", "ok")
    finally:
        for table in ("ready", "job", "worker"):
            rows(own, f"delete from sqlqueue.{table}")
