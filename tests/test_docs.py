"""The documents: their programs and queries run, their links lead somewhere, each claim has a test.

What is between two fences is read from the pages themselves, so nothing is said twice.
"""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import pytest
from sqlalchemy import Engine, create_engine

from sqlqueue import Queue, Retry
from sqlqueue.integrations.alembic import migrate
from tests.faults import results
from tests.harness import wait_until

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
GUARANTEES = [f"G{n}" for n in range(1, 17)]


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def guarantees() -> dict[str, str]:
    """The test of each guarantee, as file::name."""
    page = (ROOT / "docs/semantics.md").read_text()
    return dict(re.findall(r"^\| (G\d+) \| .+ \| `(\S+)` \|$", page, re.MULTILINE))


def queries() -> list[tuple[str, str]]:
    """The queries of the page, each with its heading."""
    page = (ROOT / "docs/queries.md").read_text()
    found = re.findall(r"^## (.+?)\n.*?```sql\n(.*?)```", page, re.DOTALL | re.MULTILINE)
    assert len(found) == page.count("\n## ") == page.count("```sql")
    return found


@pytest.fixture
def shop_url(create_database: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A migrated database that the environment names, as the pages expect it."""
    url = create_database()
    migrate(create_engine(url))
    monkeypatch.setenv("SQLQUEUE_URL", url)
    return url


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """A function that saves a program under a name and imports it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded: list[str] = []

    def save_and_import(name: str, program: str) -> ModuleType:
        (tmp_path / f"{name}.py").write_text(program)
        loaded.append(name)
        return importlib.import_module(name)

    yield save_and_import
    for name in loaded:
        sys.modules.pop(name, None)


def make_tables(engine: Engine) -> None:
    with engine.begin() as conn:
        conn.exec_driver_sql(
            """
            create table customers (id bigint primary key, name text not null);
            create table orders (
                id bigint primary key,
                customer_id bigint not null references customers,
                total numeric not null,
                placed_at timestamptz not null default now(),
                shipped_at timestamptz
            );
            create table archived (order_id bigint primary key, parts integer not null);
            insert into customers values (1, 'Ana'), (2, 'Bo');
            insert into orders (id, customer_id, total, placed_at) values
                (1, 1, 10, now()), (2, 1, 20, now()), (3, 2, 30, now()), (4, 2, 40, now()),
                (5, 2, 50, now() - interval '4 days');
            """
        )


# Claims


def test_every_guarantee_of_this_release_is_stated():
    assert list(guarantees()) == GUARANTEES


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_a_guarantee_has_its_test(guarantee: str):
    file, name = guarantees()[guarantee].split("::")
    tree = ast.parse((ROOT / file).read_text())
    functions = [one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef)]
    assert name in [function.name for function in functions], f"{file} has no {name}"


def test_the_page_of_the_bars_shows_their_results():
    known = json.loads((ROOT / "docs/bars.json").read_text())
    assert (ROOT / "docs/bars.md").read_text() == results.page(known)


# Pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_decision_is_listed():
    listed = re.findall(r"decisions/(\S+\.md)", (ROOT / "docs/architecture.md").read_text())
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs/decisions").iterdir())


# Queries


@pytest.fixture(scope="module")
def shop(create_database: Callable[[], str]) -> Iterator[Engine]:
    """A shop's database with jobs in every state that the queries ask for."""
    queue = Queue(create_database())
    migrate(queue.engine)
    make_tables(queue.engine)
    until = threading.Event()

    @queue.task(name="shop.send_receipt", retry=Retry(attempts=2, waits=[timedelta(0)]))
    def send_receipt(order_id: int, fails: int) -> None:
        if fails:
            raise ConnectionError("no answer")

    @queue.task(name="shop.charge", queue="charges", retry=Retry(attempts=2, waits=[timedelta(0)]))
    def charge(order_id: int) -> None:
        until.wait()

    for order, fails in ((1, 0), (2, 0), (3, 1)):
        send_receipt.enqueue(order, fails)
    queue.worker("default", drain=True).run()
    send_receipt.using(delay=timedelta(days=1)).enqueue(4, 0)
    charge.using(queue="tomorrow").enqueue(3)
    charge.enqueue(4)
    with queue.worker("charges"), queue.engine.connect() as conn:
        running = "select from sqlqueue.live where state = 'running'"
        wait_until(lambda: conn.exec_driver_sql(running).rowcount, what="a job runs")
        conn.commit()
        yield queue.engine
        until.set()
    queue.engine.dispose()


@pytest.mark.parametrize(
    "query", [sql for _, sql in queries()], ids=[name for name, _ in queries()]
)
def test_a_query_of_the_page_finds_something(shop: Engine, query: str):
    with shop.connect() as conn:
        assert conn.exec_driver_sql(query).all()


# Programs


def test_the_tasks_page_is_a_program_that_runs(shop_url: str, load: Callable[..., ModuleType]):
    engine = create_engine(shop_url)
    make_tables(engine)

    page = load("page_tasks", "\n".join(blocks(ROOT / "docs/tasks.md", "python")))
    page.queue.worker(drain=True).run()

    with engine.connect() as conn:
        ended = conn.exec_driver_sql(
            "select distinct task, state from sqlqueue.jobs where ended_at is not null"
        ).all()
        unknown = conn.exec_driver_sql(
            "select task, count(*) from sqlqueue.live where reason = 'snooze' group by task"
        ).all()
        shipped = (
            "select count(*) from orders join archived on order_id = id where shipped_at < now()"
        )
        assert conn.exec_driver_sql(shipped).scalar() == 1
    succeeded = {"send_receipt", "refund", "ship", "archive", "poll_bank", "weigh"}
    assert {tuple(row) for row in ended} == {
        *((f"page_tasks.{name}", "succeeded") for name in succeeded),
        ("page_tasks.export", "cancelled"),
    }
    assert [tuple(row) for row in unknown] == [("stock.reserve", 2)]
    page.engine.dispose()
    engine.dispose()


@pytest.mark.parametrize("name", ["policies", "schedules"])
def test_a_page_of_rules_is_a_program_that_runs(
    shop_url: str, load: Callable[..., ModuleType], name: str
):
    page = load(f"page_{name}", "\n".join(blocks(ROOT / f"docs/{name}.md", "python")))
    page.queue.worker(drain=True, poll=timedelta(seconds=0.25)).run()

    with page.queue.engine.connect() as conn:
        failed = conn.exec_driver_sql("select error from sqlqueue.jobs where state = 'failed'")
        assert failed.all() == []
        schedules = conn.exec_driver_sql("select count(next_at) from sqlqueue.schedule").scalar()
        assert schedules == {"policies": 0, "schedules": 3}[name]
    page.queue.engine.dispose()


def test_a_policy_names_a_test_that_exists() -> None:
    page = (ROOT / "docs/policies.md").read_text()
    named = re.findall(r"`(tests/\w+\.py)::(\w+)` \|$", page, re.MULTILINE)
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text()
    assert len(named) >= 13


def test_a_claim_about_security_names_a_test_that_exists() -> None:
    page = (ROOT / "docs/security.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_(?!security|r38_input)\w+)`", page))
    assert len(named) >= 20
    assert [name for name in named if f"def {name}(" not in tests] == []


def test_the_programs_and_statements_of_the_operating_page_run(
    shop_url: str, load: Callable[..., ModuleType]
):
    page = ROOT / "docs/operating.md"
    shop = load("shop", *blocks(ROOT / "README.md", "python"))

    load("page_operating", "\n".join(blocks(page, "python")))

    with shop.engine.connect() as conn:
        for statement in blocks(page, "sql"):
            conn.exec_driver_sql(statement)
        conn.rollback()
    shop.engine.dispose()


def test_the_readme_can_be_followed(tmp_path: Path):
    readme = ROOT / "README.md"
    (tmp_path / "shop.py").write_text(*blocks(readme, "python"))
    console = "".join(blocks(readme, "console")).splitlines()
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    @contextmanager
    def program(beginning: str) -> Iterator[subprocess.Popen[bytes]]:
        (line,) = [line for line in console if line.startswith(f"$ {beginning}")]
        command = shlex.split(line.removeprefix("$ "))
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=tmp_path, env=env, stdin=pipe, stdout=pipe) as running:
            yield running
            running.terminate()

    def output(beginning: str) -> str:
        with program(beginning) as running:
            said, _ = running.communicate(timeout=60)
            assert running.returncode == 0
        return said.decode()

    with program('python -c "from sqlqueue.embedded') as server:
        env["SQLQUEUE_URL"] = os.read(server.stdout.fileno(), 1000).decode()
        output("sqlqueue migrate")
        output('python -c "import shop; shop.Base')
        with program("sqlqueue worker"):
            ordered = 'python -c "import shop; print'
            said = output(ordered)
        engine = create_engine(env["SQLQUEUE_URL"])
        with engine.connect() as conn:
            (row,) = conn.exec_driver_sql(*blocks(readme, "sql")).all()
        engine.dispose()

    (place,) = [at for at, line in enumerate(console) if line.startswith(f"$ {ordered}")]
    assert said.splitlines() == [console[place + 1]]
    assert (row.customer, row.state, row.attempt) == ("Ana", "succeeded", 1)
