"""The command line, on a real database: what it writes, how it exits, what it refuses."""

import importlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine, create_engine, make_url, text

from sqlqueue import Job, Queue, Schedule
from sqlqueue.cli import main
from sqlqueue.cli.words import duration, rate, size
from sqlqueue.cli.words import time as instant
from sqlqueue.integrations.alembic import migrate
from tests.harness import wait_until

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/command-line.md").read_text()
NOBODY = "019a0000-0000-7000-8000-000000000000"  # a well-formed id of no job
UNREACHABLE = "postgresql://ana:secret@127.0.0.1:1/nowhere"

PROGRAM = """
from datetime import datetime, timedelta

from sqlalchemy import text
from sqlalchemy.orm import Session

from sqlqueue import Queue, Retry, current_run

queue = Queue({url!r}, retry=Retry(attempts=1))
options = dict(name="text")


@queue.task(name="add")
def add(a: int, b: int = 2) -> int:
    return a + b


@queue.task(name="next_day", queue="later")
async def next_day(day: datetime) -> datetime:
    return day + timedelta(days=1)


@queue.task(name="fail")
def fail() -> None:
    raise ValueError("no\\x1b[31m\\ttab\\nand a line")


@queue.task(name="tell")
def tell() -> None:
    run = current_run()
    run.log.info("begins")
    run.log.error("gave\\x1bup", extra={{"by": "hand"}})
    run.progress(50, "half")


@queue.task(name="echo")
def echo(*words, **named):
    return [list(words), named]


@queue.task(name="note", transactional=True)
def note(session: Session, key: str) -> str:
    add.using(session).enqueue(1)
    return session.execute(text("select cast(:key as text)"), {{"key": key}}).scalar_one()


@queue.task(name="note_async", transactional=True)
async def note_async(session, key: str) -> str:
    found = await session.execute(text("select cast(:key as text)"), {{"key": key}})
    return found.scalar_one()


def make():
    return queue
"""


class Shop:
    """A folder with the module `tasks_here`, and the command line in it."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url
        (folder / "tasks_here.py").write_text(PROGRAM.format(url=url))
        self.queue: Queue = importlib.import_module("tasks_here").queue

    def run(self, *words: str, exits: int = 0, **given: Any) -> Result:
        """Run a command here, in this process."""
        result = CliRunner().invoke(main, ["-A", "tasks_here", *words], **given)
        assert result.exception is None or isinstance(result.exception, SystemExit), (
            result.exception
        )
        assert result.exit_code == exits, result.output
        return result

    def json(self, *words: str, **given: Any) -> Any:
        """Run a command with --json; return the document that is all of its stdout."""
        return json.loads(self.run("--json", *words, **given).stdout)

    def work(self) -> None:
        """Run the jobs that are ready."""
        self.queue.worker("default", "later", drain=True).run()

    @contextmanager
    def program(self, *words: str, **given: Any) -> Iterator[subprocess.Popen[str]]:
        """Run a command in a process of its own, which is killed at the end."""
        pipe = subprocess.PIPE
        given = {"stdout": pipe, "stderr": pipe, "text": True} | given
        command = [sys.executable, "-m", "sqlqueue", *words]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            command, cwd=self.folder, env=env, start_new_session=True, **given
        ) as process:
            try:
                yield process
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder that nothing in the environment says anything about."""
    for name in [*os.environ]:
        if name.startswith(("SQLQUEUE_", "PG")) or name == "DATABASE_URL":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def shop(clean: Path, engine: Engine, migrated_url: str) -> Iterator[Shop]:
    """An application on the empty database."""
    shop = Shop(clean, migrated_url)
    yield shop
    shop.queue.engine.dispose()


def job_of(result: Result) -> str:
    """The id that a command wrote."""
    return result.stdout.strip()


def commands(group: click.Group = main, path: str = "") -> Iterator[tuple[str, click.Command]]:
    """All commands that are no groups, with their names."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


def options(command: click.Command) -> list[click.Option]:
    return [one for one in command.params if isinstance(one, click.Option)]


# Reference


def section(name: str) -> str:
    """What the page says of a command."""
    (found,) = re.findall(rf"^## {name}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return found


@pytest.mark.parametrize(("name", "command"), [*commands()], ids=[name for name, _ in commands()])
def test_the_page_names_the_options_a_command_has_and_no_others(name: str, command: click.Command):
    has = {word for one in options(command) for word in one.opts if word.startswith("--")}
    own = set(
        re.findall(r"--[a-z-]{2,}", re.sub("^    .*$", "", section(name), flags=re.MULTILINE))
    )

    assert has - own == set()
    assert own - has - {word for one in options(main) for word in one.opts} == set()


def test_the_page_names_every_command_and_every_option_of_all():
    assert {name for name, _ in commands()} == set(re.findall("^## (.+)$", PAGE, re.MULTILINE))
    for one in options(main):
        assert all(f"`{word}`" in PAGE.split("\n## ")[0] for word in one.opts)


@pytest.mark.parametrize(("name", "command"), [*commands()], ids=[name for name, _ in commands()])
def test_help_says_what_each_option_is(name: str, command: click.Command):
    result = CliRunner().invoke(main, [*name.split(), "--help"])

    assert result.exit_code == 0
    for one in options(command):
        assert one.help, one
        assert max(one.opts, key=len) in result.stdout


@pytest.mark.parametrize(
    ("name", "command"), [("", main), *commands()], ids=["sqlqueue", *(n for n, _ in commands())]
)
def test_every_option_has_its_variable(
    name: str, command: click.Command, monkeypatch: pytest.MonkeyPatch
):
    ctx = click.Context(main, info_name="sqlqueue", **main.context_settings)
    group: Any = main
    for word in name.split():
        group = group.commands[word]
        ctx = click.Context(group, info_name=word, parent=ctx)

    for one in options(command):
        if not one.expose_value and one.name in ("version", "help"):
            continue
        option = max(one.opts, key=len).removeprefix("--")
        variable = "_".join(["SQLQUEUE", *name.split(), option]).upper().replace("-", "_")
        monkeypatch.setenv(variable, "given")
        assert one.resolve_envvar_value(ctx) == "given", variable


def test_a_variable_does_what_its_option_does(shop: Shop):
    for number in range(3):
        shop.run("enqueue", "add", str(number))

    result = shop.run("jobs", "list", env={"SQLQUEUE_JOBS_LIST_LIMIT": "2"})

    assert len(result.stdout.splitlines()) == 2
    assert (
        json.loads(shop.run("queues", "list", env={"SQLQUEUE_JSON": "1"}).stdout)[0]["ready"] == 3
    )


def test_the_version_is_that_of_the_package():
    result = CliRunner().invoke(main, ["--version"])
    assert result.stdout == f"sqlqueue, version {importlib.import_module('sqlqueue').__version__}\n"


# Words


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("250ms", timedelta(milliseconds=250)),
        ("30s", timedelta(seconds=30)),
        ("1.5s", timedelta(seconds=1.5)),
        ("5m", timedelta(minutes=5)),
        ("2h", timedelta(hours=2)),
        ("1d", timedelta(days=1)),
    ],
)
def test_a_duration_is_a_number_with_its_unit(word: str, expected: timedelta):
    assert duration(word) == expected


@pytest.mark.parametrize("word", ["", "5", "5x", "-5s", "s", "5 s", "1h30m", "1e3s", "9" * 9 + "d"])
def test_what_is_no_duration_is_refused(word: str):
    with pytest.raises(click.BadParameter, match="is no duration"):
        duration(word)


def test_a_time_has_a_zone():
    assert instant("2026-11-20T09:00+01:00") == datetime(2026, 11, 20, 8, tzinfo=UTC)
    for word in ("2026-11-20T09:00", "tomorrow", ""):
        with pytest.raises(click.BadParameter, match="with a zone"):
            instant(word)


def test_a_size_is_in_powers_of_two():
    assert [size(word) for word in ("12", "2K", "512M", "1G")] == [12, 2048, 1 << 29, 1 << 30]
    with pytest.raises(click.BadParameter, match="is no size"):
        size("1.5M")


# What is chosen


def chosen(*words: str, **given: Any) -> dict[str, tuple[str, str]]:
    result = CliRunner().invoke(main, [*words, "config", "--json"], **given)
    assert result.exit_code == 0, result.output
    return {row["setting"]: (row["value"], row["why"]) for row in json.loads(result.stdout)}


def test_the_database_is_the_first_that_is_named(clean: Path):
    variables = {"SQLQUEUE_URL": "postgres://variable/x", "DATABASE_URL": "postgresql://other/x"}

    assert chosen()["url"][1].startswith("libpq")
    assert chosen(env={"DATABASE_URL": variables["DATABASE_URL"]})["url"] == (
        "postgresql+psycopg://other/x",
        "DATABASE_URL",
    )
    (clean / "pyproject.toml").write_text(
        "[tool.sqlqueue]\nurl = 'postgresql://project/x'\nschema = 'jobs'"
    )
    assert chosen(env={"DATABASE_URL": variables["DATABASE_URL"]})["url"] == (
        "postgresql+psycopg://project/x",
        "pyproject.toml",
    )
    assert chosen()["schema"] == ("jobs", "pyproject.toml")
    (clean / "tasks.py").write_text(
        "from sqlqueue import Queue\nq = Queue('postgresql+psycopg://app/x', schema='apps')"
    )
    assert chosen(env={"DATABASE_URL": variables["DATABASE_URL"]}) == {
        "app": ("tasks", "tasks.py is here and has a Queue"),
        "url": ("postgresql+psycopg://app/x", "the application tasks"),
        "schema": ("apps", "the application tasks"),
    }
    assert chosen(env=variables)["url"] == ("postgresql+psycopg://variable/x", "SQLQUEUE_URL")
    given = chosen("--url", "postgresql://option/x", "--schema", "own", env=variables)
    assert given["url"] == ("postgresql+psycopg://option/x", "--url")
    assert given["schema"] == ("own", "--schema")


def test_a_password_is_not_shown(clean: Path):
    for url in (
        "postgresql://ana:secret@host/x",
        "postgresql://host/x?user=ana&password=secret",
    ):
        result = CliRunner().invoke(main, ["--url", url, "config"])
        assert result.exit_code == 0
        assert "secret" not in result.output
    result = CliRunner().invoke(main, ["--url", UNREACHABLE, "jobs", "list"])
    assert "secret" not in result.output


@pytest.mark.parametrize("name", ["tasks_here", "tasks_here:queue", "tasks_here:make()"])
def test_an_application_is_a_module_an_attribute_or_a_factory(shop: Shop, name: str):
    result = CliRunner().invoke(main, ["call", "-A", name, "add", "1"])
    assert result.stdout == "3\n"


def test_the_application_is_the_first_that_is_named(shop: Shop):
    project = "[tool.sqlqueue]\napp = 'tasks_here'"
    (shop.folder / "main.py").write_text("from tasks_here import queue")
    (shop.folder / "tasks.py").write_text("queue = 'no Queue'")

    assert chosen()["app"] == ("main", "main.py is here and has a Queue")
    (shop.folder / "pyproject.toml").write_text(project)
    assert chosen()["app"] == ("tasks_here", "pyproject.toml")
    named = {"SQLQUEUE_APP": "tasks_here:queue"}
    assert chosen(env=named)["app"] == ("tasks_here:queue", "SQLQUEUE_APP")
    assert chosen("-A", "tasks_here:make()", env=named)["app"] == ("tasks_here:make()", "--app")


@pytest.mark.parametrize(
    ("program", "name", "says"),
    [
        ("", "odd_app", "The module has: none"),
        (
            "from sqlqueue import Queue\na, b = Queue('postgresql+psycopg://'),"
            " Queue('postgresql+psycopg://')",
            "odd_app",
            "The module has: odd_app:a, odd_app:b",
        ),
        ("a = 1", "odd_app:a", "which Queue?"),
        ("a = 1", "odd_app:a.b.c", "which Queue?"),
        ("import nothing_here", "odd_app", "No module named 'nothing_here'"),
        ("\n1 / 0", "odd_app", "ZeroDivisionError: division by zero ("),
        ("\n1 / 0", "odd_app", "odd_app.py:2)"),
        ("def (", "odd_app", "SyntaxError: invalid syntax (odd_app.py, line 1)\n"),
        ("from sys import nothing", "odd_app", "cannot import name 'nothing' from 'sys'"),
        ("", "no_such_app", "cannot import no_such_app"),
    ],
)
def test_an_application_that_is_none_is_misuse(clean: Path, program: str, name: str, says: str):
    (clean / "odd_app.py").write_text(program)

    result = CliRunner().invoke(main, ["call", "-A", name, "add"])

    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_a_url_on_the_command_line_moves_the_application(
    shop: Shop, create_database: Callable[[], str]
):
    url = create_database()
    migrate(create_engine(url), schema="elsewhere")
    there = ("--url", url, "--schema", "elsewhere")

    job_id = job_of(shop.run(*there, "enqueue", "add", "1"))

    other = Queue(url, schema="elsewhere")
    assert Job.get(other, job_id).state == "ready"
    with shop.program(*there, "-A", "tasks_here", "worker", "--drain") as worker:
        assert worker.wait(60) == 0
    assert Job.get(other, job_id).result == 3
    other.engine.dispose()


@pytest.mark.parametrize(
    "words",
    [
        ("--url", "mysql://host/x", "config"),
        ("--url", "postgresql://host:port/x", "config"),
        ("--url", "nothing", "config"),
        ("--schema", "no-name", "jobs", "list"),
        ("worker",),
        ("migrate", "sideways"),
        ("migrate", "up", "+1"),
        ("jobs", "show", "42"),
        ("jobs", "retry", "42"),
        ("jobs", "retry"),
        ("jobs", "list", "--state", "odd"),
        ("queues", "pause", "mail", "--for", "soon"),
        ("nothing",),
    ],
    ids=" ".join,
)
def test_misuse_exits_2_with_a_message(clean: Path, words: tuple[str, ...]):
    result = CliRunner().invoke(main, words)

    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert result.stdout == ""


# The database


@pytest.mark.parametrize(
    "words",
    [
        ("jobs", "list"),
        ("queues", "list"),
        ("migrate",),
        ("enqueue", "x"),
        ("jobs", "show", NOBODY),
        ("bench", "--quick"),
    ],
    ids=" ".join,
)
def test_an_unreachable_database_exits_3(clean: Path, words: tuple[str, ...]):
    result = CliRunner().invoke(main, ["--url", UNREACHABLE, *words])

    assert result.exit_code == 3, result.output
    assert "cannot be reached" in result.stderr
    assert "chosen by --url" in result.stderr


def test_a_worker_without_its_database_exits_3(shop: Shop):
    result = shop.run("--url", UNREACHABLE, "worker", "--drain", exits=3)
    assert "cannot be reached" in result.stderr


@pytest.mark.parametrize(
    "words",
    [("jobs", "list"), ("queues", "list"), ("enqueue", "x"), ("worker",), ("migrate", "status")],
    ids=" ".join,
)
def test_a_missing_schema_exits_4(shop: Shop, words: tuple[str, ...]):
    shop.run("--schema", "not_there", *words, exits=4)


def test_a_schema_of_a_later_release_serves(bare: Any):
    bare("migrate")
    engine = create_engine(bare.url)
    with engine.begin() as conn:
        conn.execute(text("update sqlqueue.alembic_version set version_num = '9999'"))
    engine.dispose()

    assert bare("migrate", "status").stdout.startswith("sqlqueue\t9999\t")
    assert bare("migrate", "status").exit_code == 0
    assert bare("migrate", "up").exit_code == 1


# migrate


@pytest.fixture
def bare(clean: Path, create_database: Callable[[], str]) -> Iterator[Callable[..., Result]]:
    """Runs commands on an empty database."""
    url = create_database()

    def run(*words: str) -> Result:
        return CliRunner().invoke(main, ["--url", url, *words])

    run.url = url
    return run


def test_migrate_goes_up_and_down_and_says_where_it_is(bare: Any):
    head = json.loads(bare("migrate", "status", "--json").stdout)["head"]

    assert bare("migrate", "status").exit_code == 4
    up = bare("migrate", "--json")
    assert json.loads(up.stdout) == {"schema": "sqlqueue", "revision": head, "head": head}
    assert bare("migrate", "status").stdout == f"sqlqueue\t{head}\t{head}\n"
    assert bare("migrate", "up").exit_code == 0
    down = bare("migrate", "down", "--yes", "--json")
    assert json.loads(down.stdout)["revision"] is None
    assert bare("jobs", "list").exit_code == 4


def test_only_what_migrates_waits_for_the_import_of_alembic():
    code = "import sys, sqlqueue.__main__; sys.exit('alembic' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_migrate_never_goes_the_other_way(bare: Any):
    bare("migrate")
    wrong = bare("migrate", "up", "base")
    same = bare("migrate", "down", "head", "--yes")

    assert (wrong.exit_code, same.exit_code) == (1, 1)
    assert "nothing was changed" in wrong.stderr
    assert bare("migrate", "status").exit_code == 0


def test_going_down_needs_yes_without_a_terminal(bare: Any):
    bare("migrate")

    result = bare("migrate", "down")

    assert result.exit_code == 1
    assert "give --yes" in result.stderr
    assert bare("migrate", "status").exit_code == 0


def test_migrate_writes_its_statements(bare: Any):
    up = bare("migrate", "--sql", "--lock-timeout", "5s").stdout
    down = bare("migrate", "down", "--sql").stdout

    assert "set local lock_timeout = '5000ms'" in up
    assert bare("migrate", "status").exit_code == 4  # nothing was run
    engine = create_engine(bare.url, isolation_level="AUTOCOMMIT")
    with engine.connect() as conn:
        conn.connection.cursor().execute(up)
        assert bare("migrate", "status").exit_code == 0
        conn.connection.cursor().execute(down)
        assert bare("migrate", "status").exit_code == 4
    engine.dispose()


def test_migrate_gives_up_on_a_lock(bare: Any):
    bare("migrate")
    engine = create_engine(bare.url)
    with engine.connect() as conn:
        conn.execute(text("select from sqlqueue.job"))
        result = bare("migrate", "down", "--yes", "--lock-timeout", "100ms")
        conn.rollback()

    assert result.exit_code == 1
    assert "lock timeout" in result.stderr
    assert bare("migrate", "status").exit_code == 0
    engine.dispose()


# enqueue and call


def test_enqueue_writes_the_id_of_the_job(shop: Shop):
    job = Job.get(shop.queue, job_of(shop.run("enqueue", "add", "40")))
    assert (job.state, job.task) == ("ready", "add")
    assert shop.json("enqueue", "add", "40").keys() == {"id"}


def test_options_of_a_job_are_those_given(shop: Shop):
    words = ["--queue", "mail", "--delay", "5m", "--expires", "1h", "--priority", "-7"]
    words += ["--tag", "vip", "--tag", "eu", "--attempts", "3"]

    job = shop.json("jobs", "show", job_of(shop.run("enqueue", "add", "1", *words)))

    assert (job["queue"], job["state"], job["priority"]) == ("mail", "scheduled", -7)
    assert (job["tags"], job["attempts"]) == (["vip", "eu"], 3)
    created, due = (datetime.fromisoformat(job[name]) for name in ("created_at", "due_at"))
    assert due - created == timedelta(minutes=5)
    assert datetime.fromisoformat(job["expires_at"]) - created == timedelta(hours=1)
    at = shop.run("enqueue", "add", "1", "--at", "2126-11-20T09:00+01:00")
    assert shop.json("jobs", "show", job_of(at))["due_at"] == "2126-11-20T08:00:00.000Z"


def test_words_are_json_or_text(shop: Shop):
    words = ("1", "true", "two", '"3"', "NaN", "[1, 2]", "a=1", "b:=1", "c=", 'd:={"e": null}')

    job_id = job_of(shop.run("enqueue", "not.known", *words))

    assert shop.json("jobs", "show", job_id)["args"] == {
        "*": [1, True, "two", "3", "NaN", [1, 2]],
        "a": "1",
        "b": 1,
        "c": "",
        "d": {"e": None},
    }
    called = shop.run("call", "echo", *words)
    assert json.loads(called.stdout)[1] == {"a": "1", "b": 1, "c": "", "d": {"e": None}}


def test_arguments_come_from_a_file_or_stdin(shop: Shop):
    (shop.folder / "args.json").write_text('{"a": 1, "b": 5}')

    named = job_of(shop.run("enqueue", "add", "--args", "@args.json"))
    listed = job_of(shop.run("enqueue", "add", "--args", "-", "b:=7", input="[1]"))

    assert shop.json("jobs", "show", named)["args"] == {"a": 1, "b": 5}
    assert shop.json("jobs", "show", listed)["args"] == {"a": 1, "b": 7}


def test_annotations_read_the_words_of_a_task_that_is_known(shop: Shop):
    day = "2026-11-20T09:00:00+01:00"
    assert shop.run("call", "next_day", day).stdout == '"2026-11-21T09:00:00+01:00"\n'
    job_id = job_of(shop.run("enqueue", "next_day", day))
    shop.work()
    assert shop.run("jobs", "result", job_id).stdout == '"2026-11-21T09:00:00+01:00"\n'


@pytest.mark.parametrize(
    "words",
    [
        ("add", "x"),
        ("add", "1", "2", "3"),
        ("add", "1", "c=4"),
        ("add", "a:=nothing"),
        ("add", "1", "--delay", "5"),
        ("add", "1", "--delay", "5m", "--at", "2126-11-20T09:00Z"),
        ("add", "1", "--at", "2126-11-20T09:00"),
        ("add", "1", "--priority", "500"),
        ("add", "1", "--attempts", "0"),
        ("add", "1", "--queue", "no queue"),
        ("add", "--args", "missing.json"),
        ("add", "--args", "@missing.json"),
        ("add", "--args", "@odd.json"),
        ("no task",),
    ],
    ids=" ".join,
)
def test_a_call_that_does_not_fit_is_misuse_and_writes_nothing(shop: Shop, words: tuple[str, ...]):
    (shop.folder / "odd.json").write_text("42")
    result = shop.run("enqueue", *words, exits=2)
    assert result.stdout == ""
    assert shop.json("jobs", "list") == []


def test_enqueue_waits_for_the_result(shop: Shop):
    with shop.queue.worker("default"):
        done = shop.run("enqueue", "add", "1", "--wait")
        failed = shop.run("enqueue", "fail", "--wait-for", "60s", exits=1)

    assert done.stdout == "3\n"
    assert re.match(r"job [0-9a-f-]{36}\n$", done.stderr)
    assert failed.stdout == ""
    assert "ValueError" in failed.stderr


def test_waiting_too_long_exits_124_and_the_job_goes_on(shop: Shop):
    result = shop.run("enqueue", "add", "1", "--wait-for", "50ms", exits=124)
    job_id = re.match(r"job (\S+)\n", result.stderr)[1]
    shop.run("jobs", "result", job_id, "--wait-for", "50ms", exits=124)

    shop.work()

    assert shop.run("jobs", "result", job_id, "--wait").stdout == "3\n"


def test_waiting_for_no_time_at_all_exits_124(shop: Shop):
    with shop.program("-A", "tasks_here", "enqueue", "add", "1", "--wait-for", "0s") as waiting:
        assert waiting.wait(20) == 124


def test_an_interrupt_exits_130(shop: Shop):
    with shop.program("-A", "tasks_here", "enqueue", "add", "1", "--wait") as waiting:
        assert waiting.stderr.readline().startswith("job ")
        waiting.send_signal(signal.SIGINT)
        said, complaint = waiting.communicate(timeout=20)

    assert waiting.returncode == 130
    assert (said, complaint) == ("", "Error: interrupted\n")


def test_call_runs_the_function_without_a_job(shop: Shop):
    assert shop.run("call", "add", "1", "b:=5").stdout == "6\n"
    assert shop.json("jobs", "list") == []


def test_call_commits_the_transaction_of_a_transactional_task(shop: Shop):
    assert shop.run("call", "note", "key").stdout == '"key"\n'
    assert [job["task"] for job in shop.json("jobs", "list")] == ["add"]
    assert shop.run("call", "note_async", "key").stdout == '"key"\n'


def test_call_shows_what_the_function_raises(shop: Shop):
    result = shop.run("call", "fail", exits=1)
    assert "ValueError: no" in result.stderr
    assert result.stdout == ""
    assert "there is no task sub; known: add, echo" in shop.run("call", "sub", exits=2).stderr


def test_call_debugs_what_the_function_raises(shop: Shop):
    pipe = subprocess.PIPE
    with shop.program("call", "-A", "tasks_here", "fail", "--pdb", stdin=pipe) as process:
        said, _ = process.communicate("p 6 * 7\nq\n", timeout=60)

    assert "(Pdb) 42" in said
    assert process.returncode == 1


# jobs


@pytest.fixture
def ended(shop: Shop) -> dict[str, str]:
    """The ids of a job in each of some states."""
    jobs = {"succeeded": job_of(shop.run("enqueue", "add", "1"))}
    jobs["failed"] = job_of(shop.run("enqueue", "fail"))
    shop.work()
    jobs["scheduled"] = job_of(shop.run("enqueue", "add", "1", "--delay", "1h"))
    jobs["ready"] = job_of(shop.run("enqueue", "next_day", "2026-11-20T09:00:00Z"))
    return jobs


def test_what_a_job_said_is_written(shop: Shop):
    job = job_of(shop.run("enqueue", "tell"))
    shop.work()

    said = shop.json("jobs", "logs", job)
    assert [(row["run"], row["level"], row["message"]) for row in said] == [
        (1, "INFO", "begins"), (1, "ERROR", "gave\x1bup"), (1, "PROGRESS", "half"),
    ]  # fmt: skip
    assert said[2]["progress"] == 50
    (line,) = shop.run("jobs", "logs", job, "--level", "WARNING").stdout.splitlines()
    assert line.endswith('gave\\x1bup\t{"by": "hand"}\t')
    assert shop.run("jobs", "logs", job, "--run", "2").stdout == ""
    assert "not found" in shop.run("jobs", "logs", NOBODY, exits=5).stderr


def test_jobs_are_listed_newest_first(shop: Shop, ended: dict[str, str]):
    lines = shop.run("jobs", "list").stdout.splitlines()

    assert [line.split("\t")[:2] for line in lines] == [
        [ended[state], state] for state in ("ready", "scheduled", "failed", "succeeded")
    ]
    assert {len(line.split("\t")) for line in lines} == {10}
    assert [job["id"] for job in shop.json("jobs", "list", "--limit", "2")] == [
        ended["ready"],
        ended["scheduled"],
    ]


@pytest.mark.parametrize(
    ("words", "states"),
    [
        (("--state", "failed"), ["failed"]),
        (("--queue", "later"), ["ready"]),
        (("--task", "add"), ["scheduled", "succeeded"]),
        (("--task", "*dd"), ["scheduled", "succeeded"]),
        (("--task", "*_d*"), ["ready"]),
        (("--task", "%"), []),
        (("--task", "a__"), []),
        (("--task", "a*", "--state", "succeeded"), ["succeeded"]),
    ],
)
def test_jobs_are_listed_by_state_queue_and_task(
    shop: Shop, ended: dict[str, str], words: tuple[str, ...], states: list[str]
):
    assert [job["state"] for job in shop.json("jobs", "list", *words)] == states


def test_all_of_a_job_is_shown(shop: Shop, ended: dict[str, str]):
    job = shop.json("jobs", "show", ended["failed"])

    assert (job["state"], job["error_type"], job["error"][:2]) == ("failed", "ValueError", "no")
    (run,) = job["runs"]
    assert (run["run"], run["outcome"], run["final"]) == (1, "failed", True)
    assert "raise ValueError" in run["traceback"]
    assert isinstance(run["ran"], float)
    assert datetime.fromisoformat(run["ended_at"]).utcoffset() == timedelta(0)

    lines = dict(
        line.split("\t") for line in shop.run("jobs", "show", ended["failed"]).stdout.splitlines()
    )
    assert lines["state"] == "failed"
    assert lines["run 1 error"] == r"no\x1b[31m\ttab\nand a line"
    assert r"raise ValueError" in lines["run 1 traceback"]


def test_a_result_is_written_as_json(shop: Shop, ended: dict[str, str]):
    assert shop.run("jobs", "result", ended["succeeded"]).stdout == "3\n"
    assert "has not ended" in shop.run("jobs", "result", ended["ready"], exits=1).stderr
    assert "ValueError" in shop.run("jobs", "result", ended["failed"], exits=1).stderr


@pytest.mark.parametrize("verb", ["show", "result", "retry", "cancel"])
def test_a_job_that_is_not_there_exits_5(shop: Shop, verb: str):
    result = shop.run("jobs", verb, NOBODY, exits=5)
    assert NOBODY in result.stderr


def test_one_job_is_retried_or_cancelled_without_asking(shop: Shop, ended: dict[str, str]):
    retried = shop.run("jobs", "retry", ended["failed"])
    cancelled = shop.run("jobs", "cancel", ended["scheduled"])

    assert (retried.stdout, retried.stderr) == (f"{ended['failed']}\n", "retry 1 of 1 jobs\n")
    assert cancelled.stdout == f"{ended['scheduled']}\n"
    assert Job.get(shop.queue, ended["failed"]).state == "ready"
    assert Job.get(shop.queue, ended["scheduled"]).state == "cancelled"


def test_what_is_refused_exits_1_and_is_left_alone(shop: Shop, ended: dict[str, str]):
    retried = shop.run("jobs", "retry", ended["succeeded"], exits=1)
    cancelled = shop.run("jobs", "cancel", ended["failed"], exits=1)

    assert f"job {ended['succeeded']} is succeeded" in retried.stderr
    assert f"job {ended['failed']} is failed" in cancelled.stderr
    assert (retried.stdout, cancelled.stdout) == ("", "")


def test_what_is_done_in_part_exits_6(shop: Shop, ended: dict[str, str]):
    words = ("jobs", "cancel", *ended.values(), NOBODY, "--yes")

    result = shop.run("--json", *words, exits=6)

    assert json.loads(result.stdout) == {
        "done": [ended["scheduled"], ended["ready"]],
        "refused": {
            ended["succeeded"]: "succeeded",
            ended["failed"]: "failed",
            NOBODY: "unknown",
        },
    }
    assert result.stderr.endswith("cancel 2 of 5 jobs\n")


def test_several_jobs_need_yes_without_a_terminal(shop: Shop, ended: dict[str, str]):
    both = (ended["scheduled"], ended["ready"])

    result = shop.run("jobs", "cancel", *both, exits=1)

    assert "give --yes" in result.stderr
    assert {Job.get(shop.queue, job).state for job in both} == {"scheduled", "ready"}
    shop.run("jobs", "cancel", *both, "--yes")
    assert {Job.get(shop.queue, job).state for job in both} == {"cancelled"}


def test_a_dry_run_changes_nothing(shop: Shop, ended: dict[str, str]):
    result = shop.run("jobs", "retry", *ended.values(), "--dry-run", exits=6)

    assert result.stdout == f"{ended['failed']}\n"
    assert result.stderr.endswith("would retry 1 of 4 jobs\n")
    assert Job.get(shop.queue, ended["failed"]).state == "failed"


def test_what_a_list_wrote_names_the_jobs_to_change(shop: Shop, ended: dict[str, str]):
    listed = shop.run("jobs", "list", "--state", "failed").stdout

    unsure = shop.run("jobs", "retry", "-", exits=1, input=listed)
    result = shop.run("jobs", "retry", "-", "--yes", input=listed)

    assert "give --yes" in unsure.stderr
    assert result.stdout == f"{ended['failed']}\n"
    shop.run("jobs", "retry", "-", "--yes", input="", exits=5)


# queues


def test_queues_are_listed_with_their_levels(shop: Shop, ended: dict[str, str]):
    rows = shop.json("queues", "list")

    assert [(row["queue"], row["ready"], row["scheduled"], row["running"]) for row in rows] == [
        ("default", 0, 1, 0),
        ("later", 1, 0, 0),
    ]
    assert rows[0]["oldest_wait"] is None
    assert rows[1]["oldest_wait"] >= 0
    assert shop.run("queues", "list").stdout.startswith("default\t0\t0\t1\t0\t")


def test_a_queue_is_paused_and_resumed(shop: Shop):
    job_id = job_of(shop.run("enqueue", "add", "1"))

    shop.run("queues", "pause", "default", "--why", "db upgrade", "--for", "30m")
    (row,) = shop.json("queues", "list")
    shop.work()

    assert row["paused_why"] == "db upgrade"
    assert row["paused_by"]
    paused, resumes = (datetime.fromisoformat(row[at]) for at in ("paused_at", "resumes_at"))
    assert resumes - paused == timedelta(minutes=30)
    assert Job.get(shop.queue, job_id).state == "ready"

    shop.run("queues", "resume", "default")
    (row,) = shop.json("queues", "list")
    shop.work()

    assert {row["paused_at"], row["paused_by"], row["paused_why"]} == {None}
    assert Job.get(shop.queue, job_id).state == "succeeded"


def test_a_pause_that_is_over_is_not_shown(shop: Shop, engine: Engine):
    shop.run("queues", "pause", "mail", "--for", "1m")
    with engine.begin() as conn:
        conn.execute(text("update sqlqueue.queue set resumes_at = now() - interval '1 s'"))

    (row,) = shop.json("queues", "list")

    assert {row["paused_at"], row["paused_by"], row["resumes_at"]} == {None}


def test_a_queue_has_a_name(shop: Shop):
    assert "queue must match" in shop.run("queues", "pause", "no queue", exits=2).stderr


def test_resuming_a_queue_that_nobody_knows_exits_5(shop: Shop):
    assert "there is no queue mial" in shop.run("queues", "resume", "mial", exits=5).stderr


def test_jobs_are_retried_by_what_they_are_after_a_preview(shop: Shop, ended: dict[str, str]):
    trial = shop.run("jobs", "retry", "--state", "failed", "--dry-run")
    assert trial.stderr == "would retry 1 of 1 jobs\n"
    assert Job.get(shop.queue, ended["failed"]).state == "failed"

    assert "--yes" in shop.run("jobs", "retry", "--task", "fai*", exits=1).stderr
    shop.run("jobs", "retry", "--task", "fai*", "--yes")
    shop.run("jobs", "cancel", "--state", "scheduled", "--yes")

    assert Job.get(shop.queue, ended["failed"]).state == "ready"
    assert Job.get(shop.queue, ended["scheduled"]).state == "cancelled"


@pytest.mark.parametrize("words", [[], [NOBODY, "--queue", "later"]])
def test_jobs_are_named_or_described(shop: Shop, words: list[str]):
    assert "name jobs, or say which" in shop.run("jobs", "retry", *words, exits=2).stderr


def test_a_queue_is_limited_and_set_free(shop: Shop, engine: Engine):
    words = (
        "--concurrency",
        "3",
        "--concurrency-per-key",
        "1",
        "--rate",
        "100/1m",
        "--max-waiting",
        "9",
    )
    shop.run("queues", "limit", "default", *words)

    with engine.connect() as conn:
        sql = "select concurrency, concurrency_per_key, rate, max_waiting from sqlqueue.policy"
        (row,) = conn.execute(text(sql))
        assert tuple(row) == (3, 1, pytest.approx(100 / 60), 9)
        shop.run("queues", "limit", "default", "--none")
        assert conn.execute(text(sql)).all() == []
    shop.run("queues", "limit", "default", exits=2)


def test_a_queue_shows_what_waits_and_why(shop: Shop):
    shop.run("queues", "limit", "default", "--concurrency", "3")
    shop.run("enqueue", "add", "1")

    (row,) = shop.json("queues", "list")

    assert (row["waiting"], row["ready"], row["concurrency"], row["rate"]) == (1, 0, 3, None)


def test_a_rate_is_read():
    assert rate("100/1m").per == timedelta(minutes=1)
    for wrong in ("100", "x/1m", "0/1m", "1/x"):
        with pytest.raises(click.BadParameter):
            rate(wrong)


def test_schedules_are_listed_paused_and_run(shop: Shop):
    call = shop.queue.tasks["add"].s(1)
    shop.queue.set_schedule("daily", call, Schedule(cron="0 7 * * *", tz="Europe/Paris"))

    times = shop.json("schedules", "next", "daily", "--count", "2")
    first, second = (datetime.fromisoformat(row["at"]) for row in times)
    assert second - first in {timedelta(hours=hours) for hours in (23, 24, 25)}
    job_id = shop.run("schedules", "run", "daily").stdout.strip()
    assert Job.get(shop.queue, job_id).state == "ready"
    shop.run("schedules", "pause", "daily", "--why", "holiday")
    (row,) = shop.json("schedules", "list")
    assert (row["cron"], row["paused_why"]) == ("0 7 * * *", "holiday")
    shop.run("schedules", "resume", "daily")
    assert shop.json("schedules", "list")[0]["paused_by"] is None


@pytest.mark.parametrize("command", ["next", "run", "pause", "resume"])
def test_a_schedule_that_nobody_knows_exits_5(shop: Shop, command: str):
    assert "there is no schedule" in shop.run("schedules", command, "dayly", exits=5).stderr


# reload


def test_a_worker_starts_anew_when_its_code_changes(shop: Shop):
    job = shop.queue.send("late")
    words = ("-A", "tasks_here", "worker", "--reload", "--poll", "250ms", "--no-listen")
    with shop.program(*words):
        wait_until(lambda: job.refresh().run, within=30, what="a worker that does not know it")
        source = shop.folder / "tasks_here.py"
        source.write_text(source.read_text() + '\n\n@queue.task(name="late")\ndef late(): ...\n')

        wait_until(lambda: job.refresh().state == "succeeded", within=40, what="the new code")


# demo


def test_demo_refuses_a_folder_without_files(clean: Path):
    result = CliRunner().invoke(main, ["demo", "--folder", str(clean / "empty")])
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


# worker


def test_a_worker_works_until_it_is_told_to_stop(shop: Shop):
    words = ("-A", "tasks_here:queue", "--poll", "250ms", "--grace", "5s", "--name", "web-3")
    with shop.program("worker", *words) as worker:
        result = shop.run("enqueue", "add", "1", "--wait-for", "60s")
        with shop.queue.engine.connect() as conn:
            names = conn.execute(text("select name, queues from sqlqueue.worker")).all()
        worker.send_signal(signal.SIGTERM)
        said, log = worker.communicate(timeout=20)

    assert result.stdout == "3\n"
    assert [tuple(row) for row in names] == [("web-3", ["default", "later"])]
    assert worker.returncode == 0
    assert said == ""
    assert re.search(r"^\S+ \S+ INFO worker \d+: stopped after 1 runs$", log, re.MULTILINE)


def test_a_worker_logs_as_it_is_told(shop: Shop):
    shop.run("enqueue", "add", "1")
    shop.run("enqueue", "fail")

    with shop.program(
        "-v", "--log-format", "json", "worker", "-A", "tasks_here", "--drain"
    ) as loud:
        _, log = loud.communicate(timeout=60)
    shop.run("enqueue", "fail")
    with shop.program("-q", "worker", "-A", "tasks_here", "--drain") as quiet:
        _, warnings = quiet.communicate(timeout=60)

    lines = [json.loads(line) for line in log.splitlines()]
    assert {line["level"] for line in lines} == {"DEBUG", "INFO", "WARNING"}
    assert all(datetime.fromisoformat(line["at"]).tzinfo for line in lines)
    assert [line.split()[2] for line in warnings.splitlines()] == ["WARNING"]


def test_a_worker_keeps_to_its_queues_and_its_number_of_runs(shop: Shop):
    later = job_of(shop.run("enqueue", "next_day", "2026-11-20T09:00:00Z"))
    jobs = [job_of(shop.run("enqueue", "add", str(n))) for n in range(3)]

    words = ("worker", "-A", "tasks_here", "default", "--max-jobs", "2", "--slots", "1")
    with shop.program(*words, "--no-listen") as worker:
        assert worker.wait(60) == 0

    states = [Job.get(shop.queue, job).state for job in (later, *jobs)]
    assert states == ["ready", "succeeded", "succeeded", "ready"]


@pytest.mark.parametrize(
    "words",
    [
        ("mail:0",),
        ("no queue",),
        ("--slots", "0"),
        ("--ttl", "1ms"),
        ("--processes", "0"),
        ("--processes", "4..1"),
        ("--processes", "1.."),
        ("--processes", "many"),
        ("--max-age", "old"),
        ("--max-age", "0s"),
        ("--max-rss", "0"),
        ("--child-rss", "much"),
    ],
    ids=" ".join,
)
def test_a_worker_that_cannot_work_so_is_misuse(shop: Shop, words: tuple[str, ...]):
    assert "Error: " in shop.run("worker", *words, exits=2).stderr


# Terminals


@contextmanager
def terminal(shop: Shop, *words: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a command at a terminal; lends the process, and the side at which a person sits."""
    person, machine = pty.openpty()
    try:
        with shop.program(*words, stdin=machine, stdout=machine, stderr=machine) as process:
            os.close(machine)
            yield process, person
    finally:
        os.close(person)


def read(person: int, until: str = "") -> str:
    """What a terminal shows until a text appears, or until its program has ended."""
    shown = ""
    while not until or until not in shown:
        assert select.select([person], [], [], 30)[0], shown
        try:
            shown += os.read(person, 10_000).decode()
        except OSError:  # the other side is closed
            break
    return shown


def test_a_terminal_gets_a_table_that_no_job_can_spoil(shop: Shop, ended: dict[str, str]):
    with terminal(shop, "-A", "tasks_here", "jobs", "list") as (_, person):
        listed = read(person)
    with terminal(shop, "-A", "tasks_here", "jobs", "show", ended["failed"]) as (_, person):
        shown = read(person)

    with terminal(shop, "-A", "tasks_here", "jobs", "result", ended["failed"]) as (_, person):
        failed = read(person)
    with terminal(shop, "-A", "tasks_here", "queues", "list") as (_, person):
        queues = read(person)

    lines = listed.splitlines()
    assert "created_at" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == list(reversed(ended.values()))
    assert "oldest_wait" in queues
    assert "paused_at" not in queues  # nothing is in that column
    assert "raise ValueError" in shown
    for text_of_the_job in (shown, failed):
        assert r"no\x1b[31m" in text_of_the_job
        assert "\x1b[31m" not in text_of_the_job


def test_a_person_is_asked_before_jobs_are_dropped(bare: Any, clean: Path):
    bare("migrate")
    (clean / "tasks_here.py").write_text(PROGRAM.format(url=bare.url))

    shop = Shop(clean, bare.url)

    def answer(text: str) -> int:
        with terminal(shop, "--url", bare.url, "migrate", "down") as (process, person):
            assert "drop the jobs in schema sqlqueue" in read(person, until="[y/N]")
            if text:
                os.write(person, text.encode())
            else:
                # It may be about to read, which a signal that came just before does not end: again.
                while process.poll() is None:
                    process.send_signal(signal.SIGINT)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(5)
            read(person)
            return process.wait(30)

    assert answer("n\n") == 1
    assert bare("migrate", "status").exit_code == 0
    assert answer("") == 130
    assert bare("migrate", "status").exit_code == 0
    assert answer("y\n") == 0
    assert bare("migrate", "status").exit_code == 4


def test_the_variables_of_libpq_name_a_database(clean: Path, migrated_url: str, engine: Engine):
    url = make_url(migrated_url)
    env = {"PGHOST": url.host, "PGPORT": str(url.port), "PGUSER": url.username}
    env |= {"PGDATABASE": url.database, "PGPASSWORD": url.password or ""}

    result = CliRunner().invoke(main, ["queues", "list", "--json"], env=env)

    assert (result.exit_code, json.loads(result.stdout)) == (0, [])


def test_waiting_is_over_when_the_job_ends_elsewhere(shop: Shop):
    """Cancelled by another command while one waits: it failed, in its own words."""
    with shop.program("-A", "tasks_here", "enqueue", "add", "1", "--wait") as waiting:
        job_id = waiting.stderr.readline().split()[1]
        shop.run("jobs", "cancel", job_id)
        wait_until(lambda: waiting.poll() is not None, within=20)

    assert waiting.returncode == 1
