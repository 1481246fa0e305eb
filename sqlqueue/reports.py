"""What people read: the settings and what chose them, jobs and queues; and how it is written.

A report reads; it changes nothing. Its queries are over the documented views; what varies in them
is a parameter, and only the name of the schema, which the Store has checked, is put in.
"""

import importlib
import json
import os
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy import URL, Connection, Engine, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError

from sqlqueue.queue import Queue
from sqlqueue.store import Store
from sqlqueue.telemetry import configure_logging

Row = dict[str, Any]
WIDE = 1000  # columns
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
GUESSES = ("tasks", "app", "main")  # modules looked for in the current folder

# Jobs that fit, newest first: ids are uuid v7, so their order is that of enqueuing.
_JOBS = """
select id, state, reason, queue, task, created_at, run, waited, ran, error_type
from sqlqueue.jobs
where (cast(:state as text) is null or state = :state)
  and (cast(:queue as text) is null or queue = :queue)
  and (cast(:task as text) is null or task like :task)
order by id desc
limit :limit
"""

# All of one job.
_JOB = """
select
    id, state, reason, queue, task, description, priority, args, tags, headers, created_at, due_at,
    expires_at, started_at, ended_at, run, attempt, attempts, crashes, timeout, worker_id, waited,
    ran, progress, note, result, error_type, error
from sqlqueue.jobs
where id = :job
"""

# All runs of one job, first to last.
_RUNS = """
select
    run, attempt, worker_id, started_at, ended_at, ran, outcome, final, result, error_type, error,
    traceback
from sqlqueue.runs
where job_id = :job
order by run, ended_at
"""

# The states of some jobs; those that do not exist are left out.
_STATES = "select id, state from sqlqueue.jobs where id = any(:jobs)"

# Queues that hold a job that has not ended, or that somebody has paused once.
_QUEUES = """
select
    queue, ready, waiting, scheduled, running, oldest_wait, concurrency, rate, paused_at, paused_by,
    paused_why, resumes_at
from sqlqueue.queues
order by queue
"""
_LOGS = """
select run, at, level, logger, source, message, fields, progress
from sqlqueue.logs
where job_id = :job
  and (run = :run or cast(:run as integer) is null)
  and (level = any (:levels) or cast(:levels as text[]) is null)
order by run, seq
"""
_SCHEDULES = """
select name, task, cron, every, tz, missed, next_at, last_at, problem, paused_by, paused_why
from sqlqueue.schedules
order by paused_at is not null, next_at, name
"""


class Reports:
    """The reports of one schema, read through one connection."""

    def __init__(self, conn: Connection, schema: str) -> None:
        self._conn = conn
        self._schema = schema

    def _rows(self, query: str, **params: Any) -> list[Row]:
        statement = text(query.replace("sqlqueue.", f"{self._schema}."))
        return [dict(row) for row in self._conn.execute(statement, params).mappings()]

    def jobs(
        self, *, state: str | None, queue: str | None, task: str | None, limit: int
    ) -> list[Row]:
        """Return the newest jobs that fit; in `task`, * and ? stand for any characters."""
        escaped = (task or "").translate({c: f"\\{chr(c)}" for c in b"\\%_"})
        pattern = escaped.replace("*", "%").replace("?", "_") or None
        return self._rows(_JOBS, state=state, queue=queue, task=pattern, limit=limit)

    def job(self, job_id: UUID) -> Row | None:
        """Return all of one job, its runs under "runs"; None if there is no such job."""
        rows = self._rows(_JOB, job=job_id)
        return rows[0] | {"runs": self._rows(_RUNS, job=job_id)} if rows else None

    def states(self, job_ids: Sequence[UUID]) -> dict[UUID, str]:
        """Return the state of each of some jobs that exists."""
        return {row["id"]: row["state"] for row in self._rows(_STATES, jobs=list(job_ids))}

    def logs(self, job_id: UUID, run: int | None, level: str | None) -> list[Row]:
        """Return what a job said, in all its runs or in one, from a level on."""
        levels = list(LEVELS[LEVELS.index(level) :]) if level else None
        return self._rows(_LOGS, job=job_id, run=run, levels=levels)

    def queues(self) -> list[Row]:
        """Return the queues with jobs that have not ended, and those that were ever paused."""
        return self._rows(_QUEUES)

    def schedules(self) -> list[Row]:
        """Return the schedules, the next to be fired first."""
        return self._rows(_SCHEDULES)

    def now(self) -> datetime:
        """Return the time of the database."""
        return self._rows("select now() as now")[0]["now"]  # type: ignore[no-any-return]

    def run_schedule(self, name: str) -> UUID | None:
        """Enqueue the job of a schedule; return its id, None if the queue was full."""
        sql = "select sqlqueue.run_schedule(:name, clock_timestamp()) as id"
        return self._rows(sql, name=name)[0]["id"]  # type: ignore[no-any-return]


def as_json(document: Any) -> str:
    """Write a document: instants in UTC, durations in seconds."""

    def plain(value: Any) -> Any:
        if isinstance(value, timedelta):
            return value.total_seconds()
        return _utc(value) if isinstance(value, datetime) else str(value)

    return json.dumps(document, default=plain, ensure_ascii=False, indent=2)


def as_lines(rows: Sequence[Row]) -> list[str]:
    """Write a line for each row, its cells separated by tabs; what is inside them is escaped."""
    return ["\t".join(_cell(value).translate(_CONTROLS) for value in row.values()) for row in rows]


def as_table(rows: Sequence[Row]) -> Table:
    """Write rows for a terminal, without empty columns; no text of a job can move the cursor."""
    table = Table(box=None, pad_edge=False)
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)] if rows else []
    for name in names:
        table.add_column(name, overflow="fold", no_wrap=name != "value")
    for row in rows:
        table.add_row(*(Text(inert(_cell(row[name]))) for name in names))
    return table


def fields(job: Row) -> list[Row]:
    """Return a job with its runs as rows of a field and its value, without empty ones."""
    pairs = [pair for pair in job.items() if pair[0] != "runs"]
    for run in job["runs"]:
        pairs += [(f"run {run['run']} {name}", value) for name, value in run.items()]
    return [{"field": name, "value": value} for name, value in pairs if value is not None]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, timedelta):
        return f"{value.total_seconds():.3f}s"
    if isinstance(value, datetime):
        return _utc(value)
    if isinstance(value, dict | list | bool):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _utc(value: datetime) -> str:
    return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


_CONTROLS = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160))}
_MOVES = {code: text for code, text in _CONTROLS.items() if chr(code) not in "\t\n"}


def inert(text: str) -> str:
    """Escape what would do something to a terminal, but for tabs and the ends of lines."""
    return text.translate(_MOVES)


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

    @cached_property
    def app(self) -> Choice:
        """The application, as `module` or `module:attribute`; None if there is none."""
        if choice := self.given.get("app") or self._project.get("app"):
            return choice
        for name in GUESSES:
            with misuse():
                if Path(f"{name}.py").is_file() and queues_of(imported(name)):
                    return Choice(name, f"{name}.py is here and has a Queue")
        return Choice(None, "none given, none found")

    @cached_property
    def url(self) -> Choice:
        """The URL of the database."""
        choice = self.given.get("url")
        if self.app.value and not choice:
            return Choice(self.queue.engine.url, f"the application {self.app.value}")
        choice = choice or self._project.get("url")
        if not choice and "DATABASE_URL" in os.environ:
            choice = Choice(os.environ["DATABASE_URL"], "DATABASE_URL")
        choice = choice or Choice("postgresql://", "libpq, which reads the variables PG*")
        with misuse():
            return Choice(driven(choice.value), choice.why)

    @cached_property
    def schema(self) -> Choice:
        """The schema of the tables."""
        choice = self.given.get("schema")
        if self.app.value and not choice:
            return Choice(self.queue.store.schema, f"the application {self.app.value}")
        return choice or self._project.get("schema") or Choice("sqlqueue", "default")

    @cached_property
    def loader(self) -> Callable[[], Queue]:
        """What loads the application, here or in a child process."""
        if not self.app.value:
            raise click.UsageError("no application: give -A MODULE:ATTR, or set SQLQUEUE_APP")
        url = self.url.value if "url" in self.given else None
        schema = self.schema.value if "schema" in self.given else None
        return partial(load, self.app.value, url, schema)

    @cached_property
    def loaders(self) -> list[Callable[[], Queue]]:
        """What loads the application, and each of the others, each in its own database."""
        if self.others and "url" in self.given:
            raise click.UsageError("several applications have a database each: leave out --url")
        schema = self.schema.value if "schema" in self.given else None
        return [self.loader, *(partial(load, other, None, schema) for other in self.others)]

    @cached_property
    def queue(self) -> Queue:
        """The application's Queue, or one without tasks if there is no application."""
        with misuse():
            if self.app.value:
                return self.loader()
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
    def reports(self) -> Iterator[Reports]:
        """Lend the reports of the database."""
        with autocommit(self.queue.engine) as conn:
            yield Reports(conn, self.queue.store.schema)

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
