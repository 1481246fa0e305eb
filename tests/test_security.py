"""What each role of the database may do, and that nobody gets round it."""

import asyncio
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
import pytest
from click.testing import CliRunner
from psycopg.errors import InsufficientPrivilege, ObjectNotInPrerequisiteState
from sqlalchemy import URL, Engine, create_engine, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from sqlqueue import (
    IdOutOfRange,
    Job,
    Policy,
    Queue,
    QueueFull,
    Rate,
    Retry,
    Schedule,
    Unique,
    current_run,
)
from sqlqueue.cli import main
from sqlqueue.embedded import Server
from sqlqueue.integrations.alembic import migrate
from sqlqueue.integrations.roles import enqueue_only, make_roles
from tests.conftest import TABLES
from tests.harness import CLOCKS, POLLING, SOON, rows, value, wait_until
from tests.test_structure import STATEMENTS, header_of, without_comments

ROOT = Path(__file__).parent.parent
ROLES = ("enqueue", "worker", "view", "operator")
VERBS = {
    "cancel", "retry", "pause", "set_policy", "run_schedule", "change", "note", "tell_worker",
    "mute_failures", "remove_schedule", "set_retention",
}  # fmt: skip
READS = {"why", "queue_lag", "queue_wait", "past_retention", "flow_of"}  # as their owner
PLAIN = {  # with their own rights
    "hist_sum", "hist_add", "hist_quantile", "frame", "job_states",
}  # fmt: skip
DEFINERS = {"enqueue", "tidy", "count_runs"} | VERBS | READS
VIEWS = {
    "jobs", "live", "ended", "runs", "logs", "queues", "schedules", "actions", "failures",
    "workers", "tasks", "minutes", "hours", "depths", "counters", "totals", "storage", "health",
    "metrics", "counts",
}  # fmt: skip
# What only operators ask for; all other statements are a worker's, or those of its tasks.
OF_OPERATORS = {"cancel", "retry", "pause", "set_policy"}
OURS = "relnamespace = 'sqlqueue'::regnamespace and relkind in ('r', 'p', 'v', 'S')"
NOBODY = "019a0000-0000-7000-8000-000000000000"  # a well-formed id of no job


class Place(NamedTuple):
    """A database with roles: an engine for its superuser, and a url for a member of each role."""

    engine: Engine
    urls: dict[str, str]

    @contextmanager
    def session(self, role: str) -> Iterator[psycopg.Connection[Any]]:
        """A session of a user who is in this role only; every statement commits."""
        with psycopg.connect(plain(make_url(self.urls[role])), autocommit=True) as conn:
            yield conn

    def queue(self, role: str) -> Queue:
        """A queue without tasks, used by a member of a role."""
        return Queue(self.urls[role])


def plain(url: URL) -> str:
    """A url as psycopg takes it."""
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


@pytest.fixture(scope="module")
def place(create_database: Callable[[], str]) -> Iterator[Place]:
    """A migrated database with the roles; its users are removed at the end."""
    url = create_database()
    engine = create_engine(url)
    migrate(engine)
    make_roles(engine)
    urls, password = {}, secrets.token_hex()
    for role in ROLES:
        name = f"test_{os.getpid()}_{role}"
        rows(engine, f"create role {name} login password '{password}' in role sqlqueue_{role}")
        logged_in = make_url(url).set(username=name, password=password)
        urls[role] = logged_in.render_as_string(hide_password=False)
    yield Place(engine, urls)
    for role in ROLES:
        rows(engine, f"drop owned by test_{os.getpid()}_{role}")
        rows(engine, f"drop role test_{os.getpid()}_{role}")
    engine.dispose()


def refused(conn: psycopg.Connection[Any], statement: str) -> bool:
    """Say whether this role lacks the right to a statement; whatever it does is undone."""
    with conn.transaction(force_rollback=True):
        try:
            with conn.transaction():
                conn.execute(statement)
        except (InsufficientPrivilege, ObjectNotInPrerequisiteState):
            return True  # the latter: a view that nobody can write to
        except psycopg.Error:
            return False
    return False


# What is there


def relations(engine: Engine, kinds: str = "rpvS") -> dict[str, str]:
    """Tables, partitions, views and sequences, each with its kind."""
    found = rows(engine, f"select relname, relkind from pg_class where {OURS}")
    return {name: kind for name, kind in found if kind in kinds}


def functions(engine: Engine) -> dict[str, str]:
    """Our functions, each with a call that gives it nulls."""
    found = rows(
        engine,
        "select proname, array(select format_type(kind, null) from unnest(proargtypes) as kind)"
        " from pg_proc where pronamespace = 'sqlqueue'::regnamespace",
    )
    # A strict function of a null is none: it would not be called.
    given = {"timestamp with time zone": "now()"}
    return {
        name: f"select sqlqueue.{name}("
        + ", ".join(f"cast({given.get(kind, 'null')} as {kind})" for kind in kinds)
        + ")"
        for name, kinds in found
    }


def uses(name: str, kind: str) -> list[str]:
    """Statements that read or change a table, view or sequence."""
    if kind == "S":
        return [f"select last_value from sqlqueue.{name}", f"select nextval('sqlqueue.{name}')"]
    changes = [
        f"insert into sqlqueue.{name} default values",
        f"delete from sqlqueue.{name}",
        f"drop {'view' if kind == 'v' else 'table'} sqlqueue.{name}",
    ]
    of_tables = [f"truncate sqlqueue.{name}", f"lock table sqlqueue.{name}"]
    return [f"select from sqlqueue.{name}", *changes, *(of_tables if kind != "v" else [])]


OTHERS = (
    "create table sqlqueue.mine (n integer)",
    "create function sqlqueue.mine() returns integer language sql as 'select 1'",
    "alter function sqlqueue.tidy reset search_path",
    "create or replace function sqlqueue.new_id() returns uuid language sql as 'select null'",
    "drop schema sqlqueue cascade",
    "set role sqlqueue_owner",
    "grant sqlqueue_owner to current_user",
)


def can(place: Place, role: str) -> set[str]:
    """The functions, and the relations in any way, that this role gets at; tried one by one."""
    with place.session(role) as conn:
        assert all(refused(conn, statement) for statement in OTHERS)
        called = {name for name, call in functions(place.engine).items() if not refused(conn, call)}
        used = {
            f"{statement.partition(' ')[0]} {name}"
            for name, kind in relations(place.engine).items()
            for statement in uses(name, kind)
            if not refused(conn, statement)
        }
        of_columns = conn.execute(
            "select kind || ' ' || relname from pg_class,"
            " unnest(array['select', 'insert', 'update', 'references']) as kind"
            f" where {OURS} and relkind <> 'S' and has_any_column_privilege(oid, kind)"
        )
        used |= {right for (right,) in of_columns}
    return called | used


def test_who_may_only_enqueue_is_refused_all_else(place) -> None:
    assert can(place, "enqueue") == {"enqueue"}


def test_who_may_view_reads_the_views_and_nothing_else(place) -> None:
    assert can(place, "view") == READS | PLAIN | {f"select {view}" for view in VIEWS}
    assert set(relations(place.engine, "v")) == VIEWS


def test_an_operator_reads_the_views_and_has_verbs(place) -> None:
    seen = READS | PLAIN | {f"select {view}" for view in VIEWS}
    assert can(place, "operator") == VERBS | seen


# Grants


def bodies(engine: Engine) -> dict[str, tuple[str, bool]]:
    """The source of each function, and whether it runs as its owner."""
    found = rows(
        engine,
        "select proname, prosrc, prosecdef from pg_proc"
        " where pronamespace = 'sqlqueue'::regnamespace",
    )
    return {name: (without_comments(source), is_definer) for name, source, is_definer in found}


def needs(sql: str, known: dict[str, tuple[str, bool]], seen: frozenset[str]) -> set[str]:
    """What a statement needs, as `RIGHT name`; with what the functions need that it calls."""
    found = set()
    # From one change of rows to the next: what is returned or in conflict belongs to the first.
    for part in re.split(r"\b(?=insert into |update sqlqueue|delete from )", sql):
        change = re.match(r"(insert|update|delete)\s(?:into |from )?sqlqueue\.(\w+)", part)
        if change:
            verb, name = change.groups()
            found.add(f"{verb.upper()} {name}")
            if verb != "insert" or re.search(r"\breturning\b|on conflict \(", part):
                found.add(f"SELECT {name}")
            if "do update" in part:
                found.add(f"UPDATE {name}")
        read = re.compile(r"(?<!delete )\b(?:from|join|using)\s+sqlqueue\.(\w+)\b(?!\()")
        found |= {f"SELECT {name}" for name in read.findall(part)}
        for locking in re.finditer(r"\bfor update\b", part):
            found.add(f"UPDATE {read.findall(without_closed(part[: locking.start()]))[-1]}")
    for name in set(re.findall(r"\bsqlqueue\.(\w+)\(", sql)) & known.keys():
        found.add(f"EXECUTE {name}")
        source, is_definer = known[name]
        if not is_definer and name not in seen:
            found |= needs(source, known, seen | {name})
    return found


def without_closed(sql: str) -> str:
    """The beginning of a statement without what is in parentheses that were closed again."""
    shorter = re.sub(r"\([^()]*\)", "", sql)
    return sql if shorter == sql else without_closed(shorter)


def granted(engine: Engine, role: str) -> set[str]:
    """What a role was granted, as `RIGHT name`."""
    found = rows(
        engine,
        f"select privilege_type, relname from pg_class, aclexplode(relacl) where {OURS}"
        "   and grantee = to_regrole(:role)"
        " union all select privilege_type, proname from pg_proc, aclexplode(proacl)"
        " where pronamespace = 'sqlqueue'::regnamespace and grantee = to_regrole(:role)",
        role=f"sqlqueue_{role}",
    )
    return {f"{right} {name}" for right, name in found}


def test_a_worker_has_the_rights_that_its_statements_need_and_no_others(place) -> None:
    known = bodies(place.engine)
    needed = {"SELECT alembic_version"}  # looked at by the command line before it starts one
    for path in STATEMENTS:
        assert header_of(path)["caller"]
        if path.stem not in OF_OPERATORS:
            needed |= needs(without_comments(path.read_text("utf-8")), known, frozenset())

    assert granted(place.engine, "worker") == needed


def test_what_operators_ask_for_is_what_they_are_granted(place) -> None:
    callers = {path.stem: header_of(path)["caller"] for path in STATEMENTS}
    by_operators = re.compile(r"Job\.(cancel|retry)|Queue\.(pause|set_policy)")
    asked = {name for name, caller in callers.items() if by_operators.match(caller)}

    assert asked == OF_OPERATORS
    assert asked <= VERBS
    assert granted(place.engine, "operator") == {f"EXECUTE {verb}" for verb in VERBS}
    assert granted(place.engine, "enqueue") == {"EXECUTE enqueue"}
    reads = {f"EXECUTE {name}" for name in READS | PLAIN}
    assert granted(place.engine, "view") == reads | {f"SELECT {view}" for view in VIEWS}


ALL_RIGHTS = """
    select 'relation', relname, relowner::regrole::text, relacl::text from pg_class
    where relnamespace = to_regnamespace(:schema)
    union all
    select 'function', proname, proowner::regrole::text, proacl::text from pg_proc
    where pronamespace = to_regnamespace(:schema)
    union all
    select 'schema', '', nspowner::regrole::text, nspacl::text from pg_namespace
    where nspname = :schema
    union all
    select 'role', rolname, rolconfig::text, rolcanlogin::text || rolsuper::text from pg_roles
    where rolname ~ '^sqlqueue_'
    union all
    select 'member', roleid::regrole::text, member::regrole::text, '' from pg_auth_members
    where roleid::regrole::text ~ '^sqlqueue_'
"""


def rights(engine: Engine, schema: str = "sqlqueue") -> list[str]:
    """Who owns what and may do what, and the roles."""
    return sorted(str(tuple(row)) for row in rows(engine, ALL_RIGHTS, schema=schema))


def test_making_the_roles_again_sets_right_what_was_changed_by_hand(place) -> None:
    before = rights(place.engine)
    rows(place.engine, "grant select on sqlqueue.job to sqlqueue_view, public")
    rows(place.engine, "revoke execute on function sqlqueue.enqueue from sqlqueue_enqueue")
    rows(place.engine, "alter table sqlqueue.ready owner to current_user")
    assert rights(place.engine) != before

    make_roles(place.engine)

    assert rights(place.engine) == before


def test_everything_belongs_to_an_owner_who_cannot_log_in(place) -> None:
    owners = "select distinct relowner::regrole::text from pg_class where " + OURS
    assert rows(place.engine, owners) == [("sqlqueue_owner",)]
    assert value(
        place.engine,
        "select not rolcanlogin and not rolsuper and not rolcreaterole and not rolbypassrls"
        " from pg_roles where rolname = 'sqlqueue_owner'",
    )
    members = "select count(*) from pg_auth_members where roleid = 'sqlqueue_owner'::regrole"
    assert value(place.engine, members) == 0  # the migrator is a superuser here


def test_the_statements_that_are_written_make_the_same_roles(place, create_database) -> None:
    url = create_database()
    script = CliRunner().invoke(main, ["migrate", "--sql", "--roles"])
    assert script.exit_code == 0

    with psycopg.connect(plain(make_url(url)), autocommit=True) as conn:
        conn.execute(script.stdout)

    assert rights(create_engine(url)) == rights(place.engine)
    refusal = CliRunner().invoke(main, ["migrate", "status", "--roles"])
    assert (refusal.exit_code, "--roles goes with up" in refusal.stderr) == (2, True)


def test_the_roles_of_one_schema_say_nothing_about_another(place, create_database) -> None:
    url = create_database()
    for schema in ("tenant_a", "tenant_b"):
        migrate(create_engine(url), schema)
    done = CliRunner().invoke(main, ["--url", url, "--schema", "tenant_a", "migrate", "--roles"])
    assert done.exit_code == 0, done.output

    member = make_url(place.urls["enqueue"]).set(database=make_url(url).database)
    with create_engine(member).connect() as conn:
        assert conn.exec_driver_sql("select tenant_a.enqueue('greet')").scalar()
        with pytest.raises(DBAPIError, match="permission denied for schema tenant_b"):
            conn.exec_driver_sql("select tenant_b.enqueue('greet')")
    found = [row.replace("tenant_a", "sqlqueue") for row in rights(create_engine(url), "tenant_a")]
    assert found == rights(place.engine)


def test_migrating_needs_no_right_to_make_roles(create_database) -> None:
    admin = create_engine(create_database())
    name, password = f"test_{os.getpid()}_plain", secrets.token_hex()
    rows(admin, f"create role {name} login password '{password}'")
    rows(admin, f"grant create on database {admin.url.database} to {name}")
    try:
        own = create_engine(admin.url.set(username=name, password=password))
        migrate(own)
        queue = Queue(own)

        @queue.task(name="greet", retry=Retry(attempts=1))
        def greet() -> str:
            return "hello"

        job = greet.enqueue()
        queue.worker(drain=True, **POLLING).run()
        assert job.result == "hello"
        own.dispose()
    finally:
        rows(admin, f"drop owned by {name} cascade")
        rows(admin, f"drop role {name}")
        admin.dispose()


def test_a_user_who_may_create_roles_needs_no_more() -> None:
    """On a server of its own, on which nobody has made the roles yet."""
    with Server(durable=False) as server:
        admin = create_engine(server.create_database("shop"))
        rows(admin, "create role migrator login createrole password 'secret'")
        rows(admin, "alter database shop owner to migrator")
        own = create_engine(admin.url.set(username="migrator", password="secret"))
        migrate(own)

        make_roles(own)
        make_roles(own)
        migrate(own)

        assert value(own, "select pg_has_role('sqlqueue_owner', 'usage')")
        rows(own, "create role web login password 'secret' in role sqlqueue_enqueue")
        web = create_engine(admin.url.set(username="web", password="secret"))
        assert value(web, "select sqlqueue.enqueue('greet')")
        for engine in (web, own, admin):
            engine.dispose()


def test_users_are_made_as_the_page_says(create_database) -> None:
    page = (ROOT / "docs/security.md").read_text()
    (script,) = re.findall(r"^```sql\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    users = re.findall(r"create role (\w+)", script)
    assert len(users) == len(ROLES)
    admin = create_engine(create_database())
    migrate(admin)
    make_roles(admin)
    named = {name: f"test_{os.getpid()}_{name}" for name in users}
    rows(admin, re.sub(rf"\brole ({'|'.join(users)})\b", lambda m: f"role {named[m[1]]}", script))
    try:
        viewer = create_engine(admin.url.set(username=named["grafana"], password="change it"))
        assert rows(viewer, "select count(*) from sqlqueue.jobs") == [(0,)]
        settings = "current_setting('statement_timeout'), current_setting('transaction_read_only')"
        assert rows(viewer, f"select {settings}") == [("5s", "on")]
        config = "select rolconfig from pg_roles where rolname = 'sqlqueue_view'"
        assert value(admin, config) == ["statement_timeout=5s", "default_transaction_read_only=on"]
        viewer.dispose()
    finally:
        for name in named.values():
            rows(admin, f"drop role {name}")
        admin.dispose()


# Functions that run as their owner


def test_what_runs_as_its_owner_is_pinned_and_assembles_no_statement(place) -> None:
    found = rows(
        place.engine,
        "select proname, proconfig, prosrc from pg_proc"
        " where pronamespace = 'sqlqueue'::regnamespace and prosecdef",
    )
    assert {name for name, _, _ in found} == DEFINERS
    tables = "|".join(relations(place.engine, "rpv"))
    for name, config, source in found:
        assert "search_path=pg_catalog, pg_temp" in config, name
        code = re.sub(r"'[^']*'", "''", without_comments(source))
        assert not re.search(r"\bexecute\b", code), name
        # Names of tables are qualified, wherever a statement could look one up.
        assert not re.search(rf"\b(from|into|update|join|using)\s+({tables})\b", code), name


def test_no_function_is_open_to_everybody_from_the_moment_it_is_made(engine) -> None:
    """Looked at where nobody has made roles."""
    found = rows(
        engine,
        "select proname from pg_proc left join lateral aclexplode(proacl) as acl on true"
        " where pronamespace = 'sqlqueue'::regnamespace and (proacl is null or acl.grantee = 0)",
    )
    assert found == []


FUNCTIONS = """
    select distinct on (proname, proargtypes) proname,
        array(select format_type(kind, null) from unnest(proargtypes) as kind),
        format_type(prorettype, null)
    from pg_proc
    where pronamespace = 'pg_catalog'::regnamespace and prokind = 'f' and not proretset
      and proname = any (:names) and provariadic = 0
      and not prorettype::regtype::text ~ '^any|internal'
      and not exists (
          select from pg_type where oid = any (cast(proargtypes as oid[])) and typtype = 'p'
      )
"""
OPERATORS = """
    select oprname, oprleft::regtype::text, oprright::regtype::text, oprresult::regtype::text
    from pg_operator
    where oprnamespace = 'pg_catalog'::regnamespace and oprname = any (:names) and oprleft <> 0
      and not exists (select from pg_type where oid in (oprleft, oprright) and typtype = 'p')
"""
SYMBOLS = ["=", "<>", "<", ">", "<=", ">=", "||", "+", "-", "*", "/", "~", "!~", "->", "->>", "?"]
TYPES = ("text", "uuid", "jsonb", "int4", "int8", "bool", "timestamptz", "regclass", "date")


def shadows(engine: Engine) -> str:
    """Statements that make, in a schema `evil`, what our functions call of Postgres: it raises."""
    sources = " ".join(source for source, _ in bodies(engine).values())
    called = set(re.findall(r"\b(\w+)\(", sources))
    made = ["create schema evil; grant usage on schema evil to public"]
    body = "language plpgsql as $$ begin raise 'fooled as %', current_user; end $$"
    for name, kinds, result in rows(engine, FUNCTIONS, names=sorted(called)):
        made.append(f"create function evil.{name}({', '.join(kinds)}) returns {result} {body}")
    for number, (name, left, right, result) in enumerate(rows(engine, OPERATORS, names=SYMBOLS)):
        made.append(f"create function evil.f{number}({left}, {right}) returns {result} {body}")
        sides = f"leftarg = {left}, rightarg = {right}, function = evil.f{number}"
        made.append(f"create operator evil.{name} ({sides})")
    made.append(f"create function evil.refuse() returns boolean {body}")
    return ";".join(made)


# Enough to reach every statement of what runs as its owner.
CALLS = """
    select sqlqueue.set_policy('queue', 'mail', '{"concurrency": 1, "shares": {"a": 2}}')
    select sqlqueue.enqueue('greet', '{"n": 1}', queue => 'mail', headers => '{}', key => 'a')
    select sqlqueue.enqueue('greet', delay => '1 hour', tags => array['a'], retry => '{}')
    select sqlqueue.pause('task', 'greet', by => 'me', why => 'so', lasts => '1 hour')
    select sqlqueue.pause('task', 'greet', false)
    select sqlqueue.pause('queue', 'mail')
    select sqlqueue.pause('schedule', 'daily')
    select sqlqueue.cancel(id) from sqlqueue.live
    select sqlqueue.retry(id) from sqlqueue.jobs
    select sqlqueue.run_schedule('daily')
    select sqlqueue.tidy()
    select sqlqueue.set_policy('queue', 'mail', null)
"""


def test_what_runs_as_its_owner_is_not_fooled_by_names_of_the_caller(place) -> None:
    name = f"test_{os.getpid()}_fooler"
    every = ", ".join(f"sqlqueue_{role}" for role in ROLES)
    rows(place.engine, f"create role {name} in role {every}")
    columns = "insert into sqlqueue.schedule (name, task, cron)"
    rows(place.engine, f"{columns} values ('daily', 'greet', '@daily')")
    rows(place.engine, shadows(place.engine))
    try:
        with psycopg.connect(plain(place.engine.url), autocommit=True) as conn:
            conn.execute(f"set session authorization {name}")
            for kind in TYPES:
                check = "check (evil.refuse())"
                conn.execute(f"create domain pg_temp.{kind} as pg_catalog.{kind} {check}")
            for table in relations(place.engine, "rp"):
                conn.execute(f"create temp table {table} (n integer)")
            conn.execute("set search_path = evil, pg_catalog, public")
            for bait in ("select now() is null", "select 1 + 1", "select cast(null as text)"):
                with pytest.raises(psycopg.Error, match=f"fooled as {name}"):
                    conn.execute(bait)
            for call in CALLS.strip().splitlines():
                conn.execute(call)
            conn.execute("discard temp")  # before the schema is dropped on which it depends
    finally:
        rows(place.engine, "drop schema evil cascade")
        rows(place.engine, f"drop role {name}")
    assert value(place.engine, "select count(*) from sqlqueue.action where affected = 1") >= 8


# What operators do is written down


def actions(engine: Engine) -> list[tuple[Any, ...]]:
    """Verb, target, affected and skipped of each action, in order."""
    columns = "verb, target, affected, skipped"
    return [
        tuple(row) for row in rows(engine, f"select {columns} from sqlqueue.action order by id")
    ]


@pytest.fixture
def quiet(place: Place) -> Place:
    """The place, without jobs, policies, schedules and actions."""
    for table in TABLES:
        rows(place.engine, f"delete from sqlqueue.{table}")
    return place


def test_whatever_an_operator_does_is_written_down(quiet) -> None:
    engine, operator = quiet.engine, quiet.queue("operator")
    sent = quiet.queue("worker").send("greet")
    quiet.queue("worker").set_schedule("daily", sent_call(quiet), Schedule(cron="@daily"))
    job = Job.get(operator, sent.id)

    assert (job.cancel(), job.retry(), job.retry()) == (True, True, False)
    operator.pause("mail", by="ana")
    operator.resume("mail")
    operator.set_policy(Policy(concurrency=1), queue="mail")
    operator.pause(schedule="daily")
    operator.pause(schedule="nightly")
    with quiet.session("operator") as conn:
        conn.execute("select sqlqueue.run_schedule('daily')")
        conn.execute("select sqlqueue.cancel(id) from sqlqueue.live where task = 'greet'")

    assert actions(engine)[:8] == [
        ("cancel", str(job.id), 1, 0),
        ("retry", str(job.id), 1, 0),
        ("retry", str(job.id), 0, 1),
        ("pause", "queue mail", 1, 0),
        ("resume", "queue mail", 1, 0),
        ("set_policy", "queue mail", 1, 0),
        ("pause", "schedule daily", 1, 0),
        ("pause", "schedule nightly", 0, 1),
    ]
    assert [row[0] for row in actions(engine)[8:]] == ["run_schedule", "cancel", "cancel"]
    with quiet.session("view") as conn:
        assert conn.execute("select count(*) from sqlqueue.actions").fetchone() == (11,)


def sent_call(place: Place) -> Any:
    """A call of a task, to be made by a schedule."""
    queue = place.queue("worker")
    return queue.task(name="greet")(print).s()


def test_an_action_names_the_role_whatever_the_actor_says(quiet) -> None:
    user = make_url(quiet.urls["operator"]).username
    with quiet.session("operator") as conn:
        conn.execute(f"select sqlqueue.cancel('{NOBODY}')")
        conn.execute("set application_name = 'psql'")
        with conn.transaction():
            conn.execute("set local sqlqueue.actor = 'ana'")
            conn.execute("set local sqlqueue.origin = '10.0.0.7'")
            conn.execute(f"select sqlqueue.cancel('{NOBODY}')")
        conn.execute(f"select sqlqueue.cancel('{NOBODY}')")

    told = rows(quiet.engine, "select actor, role, origin from sqlqueue.actions")
    assert told == [(user, user, None), ("ana", user, "10.0.0.7"), (user, user, "psql")]


def test_an_action_is_kept_as_long_as_history(quiet) -> None:
    with quiet.session("operator") as conn:
        for _ in range(2):
            conn.execute(f"select sqlqueue.retry('{NOBODY}')")
    rows(
        quiet.engine,
        "update sqlqueue.action set at = now() - interval '31 days'"
        " where id = (select min(id) from sqlqueue.action)",
    )

    rows(quiet.engine, "select sqlqueue.tidy()")

    assert len(actions(quiet.engine)) == 1


def test_what_is_undone_was_never_done(quiet) -> None:
    with quiet.session("operator") as conn, conn.transaction(force_rollback=True):
        conn.execute("select sqlqueue.pause('queue', 'mail')")

    assert actions(quiet.engine) == []
    assert value(quiet.engine, "select count(*) from sqlqueue.queue") == 0


# A worker

queue = Queue("postgresql+psycopg://")  # the tests give it a database
AT_ONCE = Retry(attempts=3, waits=[timedelta(0)])


@queue.task
async def in_loop() -> str:
    """Run on the event loop, and say so."""
    current_run().progress(50, "half")
    current_run().log.info("half of it")
    return "loop"


@queue.task(retry=AT_ONCE)
def in_thread(fails: int) -> str:
    """Run in a thread; fail so many times."""
    if current_run().attempt <= fails:
        raise ConnectionError("no answer")
    return "thread"


@queue.task(executor="process")
def in_process() -> int:
    """Run in a child process; return its id."""
    return os.getpid()


@queue.task(transactional=True)
def in_transaction(session: Session) -> str:
    """Enqueue jobs in the transaction that ends this one."""
    return str(once.using(session).enqueue().id)


@queue.task(unique=Unique(on_conflict="replace"), delay=timedelta(hours=1))
def once() -> None:
    """Be the only job of its kind."""


@queue.task(queue="few", key="a", retry=Retry(attempts=1))
def few(fails: bool) -> None:
    """Wait under policies."""
    assert not fails


@queue.schedule(every=timedelta(seconds=1), name="each_second")
@queue.task
def each_second() -> None:
    """Run once a second."""


def lay_out_upkeep(engine: Engine) -> Job[Any]:
    """Leave work for upkeep: an old partition, a missing one, and a job of a dead worker."""
    week = "sqlqueue.uuid_at('2020-01-06')::text, sqlqueue.uuid_at('2020-01-13')::text"
    rows(engine, f"select sqlqueue.keep_partition('job', 'job_20200106', {week})")
    make_roles(engine)  # the partition is the owner's
    rows(engine, f"drop table sqlqueue.{newest_partition(engine)}")
    job = Queue(engine).send(in_loop.name)
    rows(
        engine,
        "insert into sqlqueue.worker (id, died_at, ttl, pid, slots, host, name, version, queues,"
        " tasks) values (-1, now(), '0', 0, 0, '', '', '', '{}', '{}');"
        "insert into sqlqueue.lease"
        " select job_id, due_at, run + 1, 0, 0, priority, queue, seq, -1, now()"
        " from sqlqueue.ready;"
        "delete from sqlqueue.ready",
    )
    return job


def newest_partition(engine: Engine) -> str:
    """Name the partition of runs that lies furthest ahead."""
    names = [name for name in relations(engine, "r") if re.fullmatch(r"run_\d{8}", name)]
    return max(names)


def test_a_worker_does_all_its_work_with_its_rights(quiet) -> None:
    """All executors, retries, schedules, policies, unique keys, logs, rescue and partitions."""
    engine, ahead = quiet.engine, newest_partition(quiet.engine)
    orphan = lay_out_upkeep(engine)
    assert newest_partition(engine) < ahead
    rules = {"concurrency": 1, "rate_per_key": Rate(100, SOON), "keeps_order": True}
    breaker = {"breaks_after": 5, "breaks_for": SOON}
    Queue(engine).set_policy(Policy(**rules, **breaker), queue="few")
    queue.engine = create_engine(quiet.urls["worker"])

    with queue.worker("default", "few", **POLLING | {"listen": True}):
        given = [in_loop.enqueue(), in_thread.enqueue(2), in_process.enqueue(), few.enqueue(False)]
        failing, parent = few.enqueue(True), in_transaction.enqueue()
        later = in_thread.using(delay=timedelta(seconds=0.2)).enqueue(0)
        results = [job.wait(timedelta(seconds=30)) for job in (*given, parent, later, orphan)]
        replaced = Job.get(queue, parent.result)
        once.enqueue()
        ended = "select count(*) from sqlqueue.jobs where task ~ 'each_second' and ended_at < now()"
        wait_until(lambda: value(engine, ended), what="the end of a job of the schedule")
    queue.engine.dispose()
    gone = "select to_regclass('sqlqueue.job_20200106') is null"
    with quiet.session("worker") as conn:
        if not value(engine, gone):  # it may have been postponed, while jobs came and went
            conn.execute("select sqlqueue.tidy()")

    assert value(engine, gone)
    assert [results[n] for n in (0, 1, 3, 5, 6)] == ["loop", "thread", None, "thread", "loop"]
    assert results[2] != os.getpid()
    assert (failing.state, replaced.refresh().state) == ("failed", "cancelled")
    assert value(engine, "select count(*) from sqlqueue.logs where message = 'half of it'") == 2
    assert newest_partition(engine) == ahead
    owner = "select relowner::regrole::text from pg_class where oid = to_regclass(:name)"
    assert value(engine, owner, name=f"sqlqueue.{ahead}") == "sqlqueue_owner"
    assert actions(engine) == [("set_policy", "queue few", 1, 0)]  # nothing by a worker


released = threading.Event()


@queue.task
async def held() -> str:
    """Run until the test lets it go."""
    while not released.is_set():
        await asyncio.sleep(0.01)
    return "let go"


def test_a_forged_notification_cancels_nothing(quiet) -> None:
    queue.engine = create_engine(quiet.urls["worker"])
    released.clear()
    beats = "select heartbeat_at - interval '1 second' > :since from sqlqueue.worker"
    with queue.worker("default", **CLOCKS) as worker:
        job = held.enqueue()
        wait_until(lambda: job.refresh().state == "running", what="the job runs")
        wait_until(lambda: worker.listener.is_heard, what="the worker hears")
        with quiet.session("enqueue") as conn:
            for to in (0, worker.id):
                conn.execute("select pg_notify('sqlqueue', %s)", [f"{to} cancel {job.id}"])
                conn.execute("select pg_notify('sqlqueue', %s)", [f"{to} {10**30} default"])
        since = value(quiet.engine, "select clock_timestamp()")
        wait_until(lambda: value(quiet.engine, beats, since=since), what="it has beaten since")
        lanes = list(worker.lanes.floors)
        released.set()
        assert job.wait(SOON) == "let go"
    assert {lane.priority for lane in lanes} == {0}
    queue.engine.dispose()


# Who may only enqueue, from Python


@pytest.mark.parametrize("kind", ["Session", "psycopg", "none"])
def test_a_queue_can_enqueue_by_the_function_alone(quiet, kind) -> None:
    own = quiet.queue("enqueue")
    task = own.task(name="greet")(greet)
    with pytest.raises(DBAPIError, match="permission denied"):
        task.enqueue("ana")
    enqueue_only(own)
    bound = task.using(
        priority=5, tags=["a", "b"], headers={"x": "y"}, delay=SOON, key="k", weight=2
    )

    if kind == "Session":
        with Session(own.engine) as session, session.begin():
            job = bound.using(session).enqueue("ana")
    elif kind == "psycopg":
        with quiet.session("enqueue") as conn:
            job = bound.using(conn).enqueue("ana")
    else:
        job = bound.enqueue("ana")
        assert own.enqueue_many([bound.using(id=job.id).s("ana")]) == 1

    seen = quiet.queue("worker")
    other = (
        seen.task(name="greet")(greet)
        .using(priority=5, tags=["a", "b"], headers={"x": "y"}, delay=SOON, key="k", weight=2)
        .enqueue("ana")
    )
    columns = (
        "select to_jsonb(job) - 'id' - 'created_at' - 'due_at' from sqlqueue.job where id = :id"
    )
    assert value(quiet.engine, columns, id=job.id) == value(quiet.engine, columns, id=other.id)
    own.engine.dispose()


def greet(name: str) -> str:
    """Greet somebody."""
    return f"hello {name}"


def test_what_the_function_refuses_is_an_error_of_ours(quiet) -> None:
    own = quiet.queue("enqueue")
    enqueue_only(own)
    Queue(quiet.engine).set_policy(Policy(max_waiting=1), queue="few")

    own.using(queue="few").send("greet")
    with pytest.raises(QueueFull, match="queue few is full"):
        own.using(queue="few").send("greet")
    with pytest.raises(IdOutOfRange):
        own.using(id=UUID("00000000-0000-7000-8000-000000000000")).send("greet")
    with pytest.raises(ValueError, match="cannot take unique keys"):
        own.using(unique=Unique()).send("greet")

    assert value(quiet.engine, "select count(*) from sqlqueue.job") == 1
    own.engine.dispose()
