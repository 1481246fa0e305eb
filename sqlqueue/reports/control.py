"""The application and its database: what was chosen for a command, and why.

Settings are looked for once, when they are first needed; nothing connects before that.
"""

import getpass
import importlib
import os
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property, partial
from multiprocessing import parent_process
from pathlib import Path
from socket import gethostname
from time import sleep
from typing import Any, NamedTuple
from uuid import UUID

import click
from rich.console import Console
from sqlalchemy import URL, Connection, Engine, create_engine, make_url
from sqlalchemy.exc import ArgumentError

from sqlqueue.errors import JobNotFound
from sqlqueue.queue import Queue
from sqlqueue.reports import Reports, Row
from sqlqueue.reports.hiding import patterns_of, shown
from sqlqueue.reports.verbs import Operator
from sqlqueue.reports.written import as_json, as_lines, as_table
from sqlqueue.store import Store
from sqlqueue.telemetry import configure_logging

WIDE = 1000  # columns
GUESSES = ("tasks", "app", "main")  # modules looked for in the current folder

# The application and its database


@contextmanager
def misuse() -> Iterator[None]:
    """Say of what is refused within that it was given wrong."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise click.UsageError(str(error)) from error


def load(app: str, url: URL | None, schema: str | None) -> Queue:
    """Return the Queue of an application, put on another database or schema if one is given.

    Worker processes call it too. Raises ValueError if there is no such Queue.
    """
    if parent_process() is not None:
        configure_logging()  # as the parent did, by the environment
    name, _, path = app.partition(":")
    found: Any = imported(name)
    queues = queues_of(found)
    if path:
        for part in path.removesuffix("()").split("."):
            found = getattr(found, part, None)
        found = found() if path.endswith("()") and callable(found) else found
    elif len(queues) == 1:
        (found,) = queues.values()
    if not isinstance(found, Queue):
        names = ", ".join(f"{name}:{attribute}" for attribute in queues) or "none"
        raise ValueError(f"application {app}: which Queue? The module has: {names}")
    found.engine = Queue(url).engine if url else found.engine
    found.store = Store(schema) if schema else found.store
    return found


@contextmanager
def autocommit(engine: Engine) -> Iterator[Connection]:
    """Lend a connection that sees at every statement what others have committed."""
    with engine.connect() as conn:
        yield conn.execution_options(isolation_level="AUTOCOMMIT")


def imported(name: str) -> Any:
    """Import a module of the application, also from the current folder."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if frame.filename[0] == "<" else f" ({frame.filename}:{frame.lineno})"
        raise ValueError(f"cannot import {name}: {type(error).__name__}: {error}{place}") from error


def queues_of(module: Any) -> dict[str, Queue]:
    """Return the queues in a module, each under one of its names."""
    named = {id(value): name for name, value in vars(module).items() if isinstance(value, Queue)}
    return {name: getattr(module, name) for name in named.values()}


def driven(url: str) -> URL:
    """Read a url of Postgres, to be opened by psycopg. Raises ValueError for another."""
    try:
        made = make_url(url)
    except (ValueError, ArgumentError) as error:
        raise ValueError("the url must be like postgresql://user@host:5432/name") from error
    if made.drivername in ("postgres", "postgresql"):
        made = made.set(drivername="postgresql+psycopg")
    if made.drivername != "postgresql+psycopg":
        raise ValueError(f"the url must begin with postgresql://, not {made.drivername}://")
    return made


class Choice(NamedTuple):
    """A setting, and what it was chosen by."""

    value: Any
    why: str


class Control:
    """What commands work on: settings are chosen and the database opened when first needed.

    given   the settings of the command line and the environment
    others  applications that are given beside the first
    """

    def __init__(self) -> None:
        self.given: dict[str, Choice] = {}
        self.others: Sequence[str] = ()

    @cached_property
    def _project(self) -> dict[str, Choice]:
        path = Path("pyproject.toml")
        with misuse():
            document = tomllib.loads(path.read_text("utf-8")) if path.is_file() else {}
        table = document.get("tool", {}).get("sqlqueue", {})
        return {name: Choice(value, "pyproject.toml") for name, value in table.items()}

    def _chosen(self, name: str) -> Choice | None:
        return self.given.get(name) or self._project.get(name)

    @cached_property
    def app(self) -> Choice:
        """The application, as `module` or `module:attribute`; None if there is none."""
        if choice := self._chosen("app"):
            return choice
        for name in GUESSES:
            with misuse():
                if Path(f"{name}.py").is_file() and queues_of(imported(name)):
                    return Choice(name, f"{name}.py is here and has a Queue")
        return Choice(None, "none given, none found")

    @cached_property
    def url(self) -> Choice:
        """The URL of the database."""
        if self.app.value and "url" not in self.given:
            return Choice(self.queue.engine.url, f"the application {self.app.value}")
        variable = os.environ.get("DATABASE_URL")
        choice = self._chosen("url") or (Choice(variable, "DATABASE_URL") if variable else None)
        choice = choice or Choice("postgresql://", "libpq, which reads the variables PG*")
        with misuse():
            return Choice(driven(choice.value), choice.why)

    @cached_property
    def schema(self) -> Choice:
        """The schema of the tables."""
        if self.app.value and "schema" not in self.given:
            return Choice(self.queue.store.schema, f"the application {self.app.value}")
        return self._chosen("schema") or Choice("sqlqueue", "default")

    @cached_property
    def loaders(self) -> list[Callable[[], Queue]]:
        """What loads the applications, here or in a child process, each with its own database."""
        if not self.app.value:
            raise click.UsageError("no application: give -A MODULE:ATTR, or set SQLQUEUE_APP")
        url = self.url.value if "url" in self.given else None
        if self.others and url:
            raise click.UsageError("several applications have a database each: leave out --url")
        schema = self.schema.value if "schema" in self.given else None
        return [partial(load, app, url, schema) for app in (self.app.value, *self.others)]

    @cached_property
    def queue(self) -> Queue:
        """The application's Queue, or one without tasks if there is no application."""
        with misuse():
            if self.app.value:
                return self.loaders[0]()
            # A pooler may know no prepared statements, and a command would gain little by them.
            how = {"prepare_threshold": None}
            engine = create_engine(self.url.value, hide_parameters=True, connect_args=how)
            return Queue(engine, schema=self.schema.value)

    @cached_property
    def plain(self) -> Queue:
        """A Queue without tasks: it reads results as the JSON they are."""
        return Queue(self.queue.engine, schema=self.queue.store.schema)

    @property
    def settings(self) -> list[Row]:
        """The settings that were chosen, without passwords, and why."""
        url = self.url.value.difference_update_query(["password"]).render_as_string()
        chosen = [("app", self.app), ("url", Choice(url, self.url.why)), ("schema", self.schema)]
        return [{"setting": name, "value": one.value, "why": one.why} for name, one in chosen]

    def start_log(self) -> None:
        """Configure the log of this process and, through the environment, of its children."""
        for name, level in (("quiet", "WARNING"), ("verbose", "DEBUG")):
            if name in self.given:
                os.environ["SQLQUEUE_LOG_LEVEL"] = level
        if "log_format" in self.given:
            os.environ["SQLQUEUE_LOG_FORMAT"] = self.given["log_format"].value
        configure_logging()

    @contextmanager
    def reports(self, begun: bool = False) -> Iterator[Reports]:
        """Lend the reports of the database, in one transaction if it is to be `begun`."""
        with self.queue.engine.begin() if begun else autocommit(self.queue.engine) as conn:
            yield Reports(conn, self.queue.store.schema)

    @cached_property
    def operator(self) -> Operator:
        """Who acts: the user of this machine, from the command line."""
        return Operator(self.queue, getpass.getuser(), f"command line on {gethostname()}")

    def job(self, job_id: UUID) -> Row:
        """Return all of a job. Raises JobNotFound."""
        with self.reports() as reports:
            found = reports.job(job_id)
        if found is None:
            raise JobNotFound(job_id)
        return found

    def shown(self, found: Row) -> Row:
        """Return all of a job without what is secret."""
        patterns = patterns_of(self.queue, found["task"])
        return shown(found, patterns) | {"runs": [shown(run, patterns) for run in found["runs"]]}

    def write_line(self, row: Row) -> None:
        """Write one row of what goes on, as a line of cells or as a document."""
        is_json = "json" in self.given
        click.echo(as_json(row, indent=None) if is_json else as_lines([row])[0])

    def write(self, document: Any, rows: Sequence[Row]) -> None:
        """Write rows as a table, or as lines; or, if JSON is wanted, the document they show."""
        if "json" in self.given:
            click.echo(as_json(document))
        elif sys.stdout.isatty():
            # A terminal wraps long lines better than columns, but for those of a long value.
            is_list = not rows or "value" not in rows[0]
            Console(width=WIDE if is_list else None).print(as_table(rows))
        else:
            click.echo("".join(f"{line}\n" for line in as_lines(rows)), nl=False)

    def watch(self, rows: Callable[[], list[Row]], every: timedelta | None) -> None:
        """Write rows; with `every` again and again: on a terminal afresh, else line by line."""
        while True:
            found = rows()
            if every is None:
                return self.write(found, found)
            if sys.stdout.isatty():
                click.clear()
                self.write(found, found)
            else:
                for row in found:
                    self.write_line(row)
            sleep(every.total_seconds())
