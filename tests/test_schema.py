"""Where the migrations lead, how they get there, and that an installed wheel can go too."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import OperationalError

from sqlqueue import Queue, store
from sqlqueue.integrations.alembic import migrate

ROOT = Path(__file__).parent.parent
SCHEMA = (ROOT / "docs/reference/schema.sql").read_text("utf-8")

# Ours, without partitions and without what Alembic keeps for itself.
OURS = (
    "relnamespace = to_regnamespace('sqlqueue') and not relispartition"
    " and relname <> 'alembic_version'"
)
CATALOG = {
    "tables": f"""
        select relname, relkind, relpersistence, pg_get_partkeydef(oid), reloptions,
            obj_description(oid, 'pg_class')
        from pg_class
        where {OURS} and relkind in ('r', 'p')
    """,
    "columns": f"""
        select relname, attnum, attname, format_type(atttypid, atttypmod), attnotnull,
            attidentity, attgenerated, pg_get_expr(adbin, adrelid), col_description(oid, attnum)
        from pg_class
        join pg_attribute on attrelid = pg_class.oid
        left join pg_attrdef on adrelid = attrelid and adnum = attnum
        where {OURS} and relkind in ('r', 'p') and attnum > 0 and not attisdropped
    """.replace("col_description(oid", "col_description(attrelid"),
    "indexes": f"""
        select relname, pg_get_indexdef(indexrelid), indisprimary, indisunique
        from pg_class
        join pg_index on indrelid = oid
        where {OURS}
    """,
    "constraints": f"""
        select relname, conname, pg_get_constraintdef(pg_constraint.oid)
        from pg_class
        join pg_constraint on conrelid = pg_class.oid
        where {OURS}
    """,
}


@pytest.fixture
def database(create_database: Callable[[], str]) -> Iterator[Engine]:
    """An empty database."""
    engine = create_engine(create_database())
    yield engine
    engine.dispose()


def rows(engine: Engine, statement: str) -> list[Any]:
    with engine.connect() as conn:
        return [tuple(row) for row in conn.exec_driver_sql(statement)]


def revision(engine: Engine) -> Any:
    return rows(engine, "select version_num from sqlqueue.alembic_version")


def relations(engine: Engine, schema: str = "sqlqueue") -> set[str]:
    """What is in a schema: tables, views, sequences, functions, types."""
    where = f"to_regnamespace('{schema}')"
    return {
        name
        for (name,) in rows(
            engine,
            f"select relname from pg_class where relnamespace = {where}"
            f" union all select proname from pg_proc where pronamespace = {where}",
        )
    }


# Where they lead


@pytest.mark.parametrize("part", CATALOG)
def test_the_migrations_lead_to_the_schema_that_is_shown(engine, database, part) -> None:
    with database.begin() as conn:
        conn.exec_driver_sql(SCHEMA)

    shown, migrated = (sorted(rows(e, CATALOG[part]), key=str) for e in (database, engine))

    assert migrated == shown
    assert shown


@pytest.mark.parametrize(
    "statement",
    [
        f"""
        select relname from pg_class
        where {OURS} and relkind in ('r', 'p', 'v') and obj_description(oid, 'pg_class') is null
        """,
        f"""
        select relname, attname from pg_class join pg_attribute on attrelid = oid
        where {OURS} and relkind in ('r', 'p', 'v') and attnum > 0
          and col_description(oid, attnum) is null
        """,
        """
        select proname from pg_proc
        where pronamespace = 'sqlqueue'::regnamespace and obj_description(oid, 'pg_proc') is null
        """,
    ],
    ids=["tables and views", "columns", "functions"],
)
def test_everything_says_what_it_is_for(engine, statement) -> None:
    assert rows(engine, statement) == []


def test_every_table_has_a_primary_key(engine) -> None:
    assert (
        rows(
            engine,
            "select relname from pg_class"
            " where relnamespace = 'sqlqueue'::regnamespace and relkind in ('r', 'p')"
            " and not exists (select from pg_index where indrelid = pg_class.oid and indisprimary)",
        )
        == []
    )


def test_no_table_has_a_foreign_key_or_a_trigger(engine) -> None:
    for statement in (
        "select conname from pg_constraint where connamespace = 'sqlqueue'::regnamespace"
        " and contype = 'f'",
        f"select tgname from pg_trigger join pg_class on pg_class.oid = tgrelid where {OURS}",
    ):
        assert rows(engine, statement) == []


def test_sequences_hand_out_their_numbers_one_by_one(engine) -> None:
    # Cached blocks of `seq` would put live rows below the floor.
    sequences = "select sequencename, cache_size from pg_sequences where schemaname = 'sqlqueue'"
    found = dict(rows(engine, sequences))

    assert found.keys() >= {"ready_seq_seq", "worker_id_seq"}
    assert set(found.values()) == {1}


# How they get there


def test_the_way_down_leaves_nothing_and_the_way_up_works_again(database) -> None:
    migrate(database)
    there = relations(database)
    Queue(database).send("greet")

    migrate(database, revision="base")
    # Alembic's own table stays: it says that the schema is at no revision.
    assert {name for name in relations(database) if "alembic_version" not in name} == set()

    migrate(database)
    assert relations(database) == there
    assert Queue(database).send("greet").state == "ready"


def test_migrating_again_changes_nothing(database) -> None:
    migrate(database)
    job = Queue(database).send("greet")
    state = "select oid, xmin, relname from pg_class order by oid"
    before = rows(database, state), revision(database)

    migrate(database)

    assert (rows(database, state), revision(database)) == before
    assert job.state == "ready"


def test_another_schema_holds_a_queue_of_its_own(database) -> None:
    migrate(database, schema="tenant_a")
    migrate(database, schema="tenant_b")
    assert relations(database, "sqlqueue") == set()
    queue, other = (Queue(database, schema=name) for name in ("tenant_a", "tenant_b"))

    @queue.task(name="double")
    def double(n: int) -> int:
        return 2 * n

    job = double.enqueue(21)
    delayed = double.using(delay=timedelta(milliseconds=10)).enqueue(4)
    with queue.worker("default"):
        assert job.wait(timedelta(seconds=20)) == 42
        assert delayed.wait(timedelta(seconds=20)) == 8
    other.send("double")

    seen = "select task, state from {}.jobs order by created_at"
    assert rows(database, seen.format("tenant_a")) == [("double", "succeeded")] * 2
    assert rows(database, seen.format("tenant_b")) == [("double", "ready")]
    assert rows(database, "select tenant_a.enqueue('double')")
    migrate(database, schema="tenant_b", revision="base")
    assert job.refresh().result == 42


@pytest.mark.parametrize(
    "name", ["", "Tenant", "a-b", "a.b", 'a"b', "a;drop schema public", "1a", "x" * 64, "é"]
)
def test_a_schema_has_a_plain_name(database, name) -> None:
    with pytest.raises(ValueError, match="schema must match"):
        Queue(database, schema=name)
    with pytest.raises(ValueError, match="schema must match"):
        migrate(database, schema=name)


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_migration_that_would_wait_gives_up_and_can_be_run_again(database, way) -> None:
    if way == "down":
        migrate(database)
        Queue(database).send("greet")
    before = relations(database)
    move = {"up": {}, "down": {"revision": "base"}}[way]

    with database.connect() as other:
        other.execute(
            text("create schema sqlqueue" if way == "up" else "select count(*) from sqlqueue.job")
        )
        with pytest.raises(OperationalError, match="lock timeout"):
            migrate(database, lock_timeout=timedelta(milliseconds=200), **move)
        other.rollback()
    assert relations(database) == before

    migrate(database, **move)
    migrate(database)
    assert Queue(database).send("greet").state == "ready"


def alembic(url: str, *arguments: str) -> str:
    """Run alembic as from a checkout; return what it writes."""
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=ROOT,
        env=os.environ | {"SQLQUEUE_URL": url},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


def url_of(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


def test_alembic_migrates_from_the_repository(database) -> None:
    alembic(url_of(database), "upgrade", "head")

    assert Queue(database).send("greet").state == "ready"
    alembic(url_of(database), "-x", "schema=tenant_a", "upgrade", "head")
    assert Queue(database, schema="tenant_a").send("greet").state == "ready"
    alembic(url_of(database), "downgrade", "base")
    assert "jobs" not in relations(database)


def test_the_sql_that_alembic_writes_leads_to_the_same_schema(engine, database) -> None:
    script = alembic(url_of(database), "upgrade", "head", "--sql")

    url = make_url(url_of(database)).set(drivername="postgresql")
    with psycopg.connect(url.render_as_string(hide_password=False), autocommit=True) as conn:
        conn.execute(script)

    for statement in CATALOG.values():
        assert sorted(rows(database, statement), key=str) == sorted(
            rows(engine, statement), key=str
        )
    assert Queue(database).send("greet").state == "ready"
    migrate(database)  # it knows where it is


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(240)
def test_the_wheel_migrates(database, tmp_path) -> None:
    own = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    run(sys.executable, "-m", "build", "--wheel", *own, "--outdir", tmp_path, ".", cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path)

    program = (
        "import sys; from sqlalchemy import create_engine; import sqlqueue;"
        "from sqlqueue.integrations.alembic import migrate;"
        " engine = create_engine(sys.argv[1]); migrate(engine);"
        " print(sqlqueue.Queue(engine).send('greet').state, sqlqueue.__file__)"
    )
    said = run(python, "-c", program, url_of(database), cwd=tmp_path)

    assert re.fullmatch(rf"ready {tmp_path}\S+\n", said)
    command = tmp_path / "venv" / "bin" / "sqlqueue"
    run(command, "--url", url_of(database), "--schema", "tenant_a", "migrate", cwd=tmp_path)
    assert Queue(database, schema="tenant_a").send("greet").state == "ready"


def test_the_function_enqueue_runs_the_statement_that_python_sends(engine) -> None:
    with engine.connect() as conn:
        source = conn.scalar(text("select prosrc from pg_proc where proname = 'enqueue'"))

    sent = re.sub(
        r"cast\(%\((\w+)\)s as [a-z\[\]]+\)", r"\1", store.statement("enqueue", "sqlqueue")
    )

    assert plain(sent) in plain(re.sub(r"\benqueue\.(?=\w+\b)", "", source))


def plain(sql: str) -> str:
    """SQL without comments, and without white space but for single spaces between words."""
    return re.sub(r"\s*(\W)\s*", r"\1", re.sub(r"\s+", " ", re.sub(r"--.*", "", sql)))
