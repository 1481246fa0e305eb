"""The plans of the statements that must stay quick, whatever the statistics say or do not say."""

import random
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, Engine, create_engine, text

from sqlqueue import Options
from sqlqueue.integrations.alembic import migrate
from sqlqueue.literal import new_id
from sqlqueue.store import Ended, Executes, Lane, Store, statement
from tests.test_store import hire

VERSIONS = Path(__file__).parent.parent / "migrations/versions"
MANY = 20_000
TTL = timedelta(hours=1)
LANE = Lane("default", 0)
HOT = ("ready", "waiting", "scheduled", "lease", "job", "run", "doorbell", "cancel_request")

# What each statement is asked, by the worker with the number given.
ASKED: dict[str, Callable[[Store, Executes, int], object]] = {
    "claim": lambda store, conn, worker: store.claim(conn, LANE, 5, 500, worker),
    "finish": lambda store, conn, worker: store.finish(
        conn,
        [Ended(new_id(), 1, "succeeded", None, 0.1, "1")]
        + [Ended(new_id(), 1, "failed", TTL, 0.1, None, "E", "e", "t") for _ in range(499)],
    ),
    "held": lambda store, conn, worker: store.held(conn, [(new_id(), 1) for _ in range(500)]),
    "jobs": lambda store, conn, worker: store.jobs(conn, [new_id() for _ in range(500)], []),
    "promote": lambda store, conn, worker: store.promote(conn, 10 * TTL, 500),
    "next_due": lambda store, conn, worker: store.next_due(conn),
    "lanes": lambda store, conn, worker: store.lanes(conn, "default", [0, 1], False),
    "leases": lambda store, conn, worker: store.leases(conn, worker, TTL),
    "beat": lambda store, conn, worker: store.beat(conn, worker, [1.0, 1.0, 1.0]),
    "arm": lambda store, conn, worker: store.arm(conn, ["default", "mail"], worker, TTL),
    "disarm": lambda store, conn, worker: store.disarm(conn, ["default", "mail"], worker),
    "orphans": lambda store, conn, worker: store.orphans(conn, 500, None),
}


class Noted(Exception):
    """Instead of running a statement."""

    def __init__(self, statement: str, parameters: Any) -> None:
        self.statement = statement
        self.parameters = parameters


class Notes:
    """Runs nothing; raises what it was asked to run."""

    def exec_driver_sql(self, statement: str, parameters: Any = None, /) -> Any:
        raise Noted(statement, parameters)


def asked(verb: str, store: Store, worker: int) -> tuple[str, Any]:
    """The statement that the store runs for a verb, with its parameters."""
    with pytest.raises(Noted) as noted:
        ASKED[verb](store, Notes(), worker)
    return what_it_runs(noted.value.statement), noted.value.parameters


def what_it_runs(statement: str) -> str:
    """The statement; for one that calls a function in SQL, the last statement of that function."""
    called = re.match(r"select (?:[a-z_, ]+\s*from )?sqlqueue\.(\w+)\(", statement)
    if not called:
        return statement
    name = called[1]
    functions = "".join(path.read_text("utf-8") for path in sorted(VERSIONS.glob("*.py")))
    found = re.search(
        rf"create function sqlqueue\.{name}\((.*?)\)\s+returns .*?as \$\$(.*?)\$\$", functions, re.S
    )
    body = re.sub(r"--.*", "", found[2]).rpartition(";")[2]
    for parameter in filter(None, found[1].split(",")):
        word, kind = parameter.split(maxsplit=1)
        body = re.sub(rf"\b{name}\.{word}\b", f"cast(%({word})s as {kind})", body)
    return body.strip()


# Stages


def make_database(create_database: Callable[[], str]) -> Engine:
    """A migrated database in which nothing is analyzed or vacuumed unless we do."""
    engine = create_engine(create_database())
    migrate(engine)
    with engine.begin() as conn:
        for table in ("ready", "scheduled", "lease", "doorbell"):
            conn.execute(text(f"alter table sqlqueue.{table} set (autovacuum_enabled = off)"))
    return engine


def prepare(conn: Connection, patience: timedelta) -> None:
    """Prepare the transaction as those of a worker are."""
    params = {"patience": str(patience.total_seconds() * 1000)}
    conn.exec_driver_sql(statement("begin", "sqlqueue"), params)


def enqueue(conn: Connection, store: Store, count: int, **options: Any) -> None:
    params = Options(**options).params
    store.enqueue(conn, [new_id() for _ in range(count)], ["{}"] * count, "greet", params)


def fill(conn: Connection, store: Store) -> None:
    """Add as many jobs to each hot table as a busy day might."""
    worker = hire(conn, store, TTL)
    enqueue(conn, store, MANY, priority=3)
    store.claim(conn, Lane("default", 3), 0, MANY, worker)
    enqueue(conn, store, MANY, delay=timedelta(minutes=5))
    conn.execute(text("update sqlqueue.scheduled set due_at = now() - random() * interval '1 h'"))
    enqueue(conn, store, MANY)
    enqueue(conn, store, MANY, queue="mail", priority=-1)


@pytest.fixture(scope="module", params=["empty", "never analyzed", "analyzed"])
def stage(request: pytest.FixtureRequest, create_database) -> Iterator[Engine]:
    """A database with a worker whose number is 1, in one of three states."""
    engine = make_database(create_database)
    with engine.begin() as conn:
        hire(conn, Store(), TTL)
        if request.param != "empty":
            fill(conn, Store())
    if request.param == "analyzed":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            conn.execute(text("vacuum analyze"))
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def cached(create_database) -> Iterator[Connection]:
    """A session that prepared every statement while all was empty, and does not plan again.

    Unless autovacuum comes in between: then it does, as a worker's would, with its settings.
    """
    engine, store = make_database(create_database), Store()
    with engine.begin() as conn:
        hire(conn, store, TTL)
    with engine.connect() as pooled:
        driver: Any = pooled.connection.driver_connection
        driver.execute("set plan_cache_mode = force_generic_plan")
        for verb in ASKED:
            statement, parameters = asked(verb, store, 1)
            for _ in range(6):
                prepare(pooled, TTL)
                driver.execute(statement, parameters, prepare=True)
                driver.commit()  # a rollback would make the driver forget what it prepared
        with engine.begin() as conn:
            fill(conn, store)
        yield pooled
    engine.dispose()


# Plans


def nodes(plan: dict[str, Any], apart: bool = True) -> Iterator[dict[str, Any]]:
    """The nodes of a plan; with `apart` also those of its subplans and common tables."""
    yield plan
    for child in plan.get("Plans", ()):
        if apart or child.get("Parent Relationship") not in ("InitPlan", "SubPlan"):
            yield from nodes(child, apart)


def table_of(node: dict[str, Any]) -> str | None:
    """The table that a node reads, without the week of its partition."""
    name = node.get("Relation Name")
    return re.sub(r"_(\d{8}|default)$", "", name) if name else None


def check_plan(verb: str, explained: dict[str, Any]) -> None:
    """The index of the header is used, and nothing reads a hot table from end to end."""
    assert "JIT" not in explained, "compiled, which takes longer than a turn may"
    plan = explained["Plan"]
    for node in nodes(plan):
        kind = node["Node Type"]
        if kind in ("Seq Scan", "Bitmap Heap Scan"):
            assert table_of(node) not in HOT, f"{kind} on {table_of(node)}"
        if kind in ("Sort", "Incremental Sort"):
            sorted_tables = {table_of(one) for one in nodes(node, apart=False)}
            assert not sorted_tables & {"ready", "scheduled", "lease"}, "a hot table is sorted"
        assert kind not in ("Hash Join", "Merge Join"), kind
        if node.get("Operation") == "Delete":  # a join may pick its rows again for each of them
            _, *found_by = (one["Node Type"] for one in nodes(node, apart=False))
            assert found_by in (["Tid Scan"], ["Index Scan"]), found_by

    header = (files("sqlqueue") / "sql" / f"{verb}.sql").read_text("utf-8")
    (promised,) = re.findall(r"^-- index   (.*)$", header, re.M)
    used = {re.sub(r"_(\d{8}|default)_", "_", n.get("Index Name", "")) for n in nodes(plan)}
    assert set(promised.split(", ")) <= used


@pytest.mark.parametrize("verb", ASKED)
def test_a_plan_uses_the_index_and_nothing_else(stage, store, verb) -> None:
    statement, parameters = asked(verb, store, 1)

    with stage.connect() as conn:
        prepare(conn, TTL)
        (plan,) = conn.exec_driver_sql(f"explain (format json) {statement}", parameters).scalar()

    check_plan(verb, plan)


@pytest.mark.direct
@pytest.mark.parametrize("verb", ASKED)
def test_a_plan_made_while_all_was_empty_uses_the_index(cached, store, verb) -> None:
    driver: Any = cached.connection.driver_connection
    statement, parameters = asked(verb, store, 1)
    order = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", statement)))
    for place, parameter in enumerate(order, 1):
        statement = statement.replace(f"%({parameter})s", f"${place}")
    find = "select name, generic_plans from pg_prepared_statements where statement = %s"
    ((name, generic_plans),) = driver.execute(find, [statement.replace("%%", "%")]).fetchall()
    assert generic_plans == 6
    values = ", ".join(f"%({parameter})s" for parameter in order)
    call = psycopg.ClientCursor(driver).mogrify(f"({values})" if order else "", parameters)

    driver.commit()
    prepare(cached, TTL)
    (plan,) = driver.execute(f"explain (format json) execute {name}{call}").fetchone()[0]
    driver.commit()

    check_plan(verb, plan)


# What is read


def test_no_history_is_read_to_see_that_jobs_have_not_ended(conn, store) -> None:
    fill(conn, store)
    (ids,) = conn.execute(text("select array_agg(cast(id as text)) from sqlqueue.job")).one()
    prepare(conn, TTL)

    with pytest.raises(Noted) as noted:
        store.jobs(Notes(), random.sample(ids, 1000), [])
    explain = f"explain (analyze, format json) {noted.value.statement}"
    (plan,) = conn.exec_driver_sql(explain, noted.value.parameters).scalar()

    loops = {"run": 0.0}
    for node in nodes(plan["Plan"]):
        table = table_of(node) or ""
        loops[table] = loops.get(table, 0) + node["Actual Loops"]
    assert loops["run"] == 0 < loops["lease"] <= loops["job"] <= loops["ready"] == 1000


def test_a_finish_reads_only_what_it_ends_although_lease_was_analyzed_while_empty(
    conn: Connection, store: Store
) -> None:
    worker = hire(conn, store)
    prepare(conn, TTL)
    for analyze in (True, False):
        enqueue(conn, store, 2_000)
        batches = [store.claim(conn, LANE, 0, 500, worker) for _ in range(4)]
        ended = [[Ended(o.job_id, o.run, "succeeded") for o in rows] for rows in batches]
        if analyze:  # it has pages, and no rows
            for some in ended:
                store.finish(conn, some)
            conn.execute(text("analyze sqlqueue.lease"))

    with pytest.raises(Noted) as noted:
        store.finish(Notes(), ended[-1])
    explain = f"explain (analyze, format json) {noted.value.statement}"
    (plan,) = conn.exec_driver_sql(explain, noted.value.parameters).scalar()

    compared = [node.get("Rows Removed by Join Filter", 0) for node in nodes(plan["Plan"])]
    assert max(compared) == 0  # each lease beside each run would be a million pairs
