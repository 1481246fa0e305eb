"""The command line: what a person or a script does with jobs, queues and workers.

A command reads its words, calls what the Python API calls, and says what became of it: data on
stdout, the rest on stderr. What can be expected to fail ends in one message and an exit code.
"""

import asyncio
import getpass
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from pdb import post_mortem
from typing import Any
from uuid import UUID

import click
from alembic.util import CommandError
from click.core import ParameterSource
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sqlqueue import __version__
from sqlqueue.codec import encode_call, encode_value
from sqlqueue.errors import JobNotFound, NotEnded, SchemaMismatch, SqlqueueError
from sqlqueue.job import LIVE, Job
from sqlqueue.link import DatabaseError
from sqlqueue.migrate import LOCK_TIMEOUT, check, current, goes_down, head, script
from sqlqueue.migrate import migrate as move_to
from sqlqueue.queue import Queue
from sqlqueue.reports import Choice, Control, fields, inert, misuse
from sqlqueue.supervisor import Supervisor
from sqlqueue.task import Task
from sqlqueue.worker import WorkerOptions

AnyTask = Task[..., Any]
Args = list[Any]
Kwargs = dict[str, Any]

# Exit codes; 0 is done, and 2, which is click's, misused.
FAILED, UNREACHABLE, SCHEMA, NOTHING, IN_PART, TOO_LONG, INTERRUPTED = 1, 3, 4, 5, 6, 124, 130
CODES: dict[type, int] = {JobNotFound: NOTHING, SchemaMismatch: SCHEMA}
RETRYABLE = ("failed", "cancelled")  # as retry.sql has it
STATES = (*LIVE, "succeeded", *RETRYABLE, "expired")
SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
SIZES = {"": 0, "K": 10, "M": 20, "G": 30}  # powers of two
KEYWORD = re.compile(r"([A-Za-z_]\w*)(:?=)(.*)", re.DOTALL)
REVISION = re.compile(r"(head|base|\d{4})(:(head|base|\d{4}))?")

# Words


def duration(text: str) -> timedelta:
    """Read a time span such as 30s."""
    if not (match := re.fullmatch(r"(\d{1,8}(?:\.\d{1,6})?)(ms|[smhd])", text)):
        raise click.BadParameter(f"{text!r} is no duration such as 250ms, 30s, 5m, 2h or 1d")
    return timedelta(seconds=float(match[1]) * SECONDS[match[2]])


def seconds(span: timedelta) -> str:
    """Write a duration as it is given, for a default."""
    return f"{span.total_seconds():g}s"


def time(text: str) -> datetime:
    """Read an instant in ISO 8601, with its time zone."""
    with suppress(ValueError):
        if (instant := datetime.fromisoformat(text)).tzinfo:
            return instant
    raise click.BadParameter(f"{text!r} is no time with a zone such as 2026-11-20T09:00+01:00")


def size(text: str) -> int:
    """Read a number of bytes such as 512M."""
    if not (match := re.fullmatch(r"(\d{1,9})([KMG]?)", text)):
        raise click.BadParameter(f"{text!r} is no size such as 512M")
    return int(match[1]) << SIZES[match[2]]


def json_or_text(word: str) -> Any:
    """Read a word as JSON if it is, as text if not."""
    with suppress(ValueError, RecursionError):
        return json.loads(word, parse_constant=int)  # NaN and Infinity are no JSON
    return word


# Failures


def failure(message: str, code: int) -> click.exceptions.Exit:
    """Say what failed, and return what ends the command with an exit code."""
    click.echo(f"Error: {inert(message)}", err=True)
    return click.exceptions.Exit(code)


class Commands(click.Group):
    """The commands, whose expected failures end in a message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort) as error:
            raise failure("interrupted", INTERRUPTED) from error
        except (SqlqueueError, CommandError) as error:
            raise failure(str(error), CODES.get(type(error), FAILED)) from error
        except DatabaseError as error:
            raise database_failure(error, ctx.obj) from error


def database_failure(error: Exception, control: Control) -> click.exceptions.Exit:
    """Say what a database error means, by its code in Postgres; without one, nothing answered."""
    cause = getattr(error, "orig", error)
    code = getattr(cause, "sqlstate", None)
    at = "the database of {value}, chosen by {why}".format(**control.settings[1])
    if code is None or code.startswith(("08", "57P")):
        return failure(f"{at}, cannot be reached: {cause}", UNREACHABLE)
    if code in ("3F000", "42P01", "42703", "42883"):  # no such schema, table, column, function
        where = f"schema {control.schema.value} in {at}"
        return failure(f"{where}, is missing or of another version: run sqlqueue migrate", SCHEMA)
    return failure(f"{at}, refused: {cause}", FAILED)


def confirm(question: str) -> None:
    """Ask before a change. Ends the command unless the answer, at a terminal, is yes."""
    if not sys.stdin.isatty():
        raise failure("nothing was changed: without a terminal to ask at, give --yes", FAILED)
    if not click.confirm(question, err=True):
        raise failure("nothing was changed", FAILED)


# Options that may stand before the command or after it, and those that several commands have


def keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Take note of a setting and of how it was given."""
    control = ctx.ensure_object(Control)
    if value and param.name:
        is_variable = ctx.get_parameter_source(param.name) is ParameterSource.ENVIRONMENT
        variable = f"{ctx.auto_envvar_prefix}_{param.name.upper()}"
        control.given[param.name] = Choice(value, variable if is_variable else f"--{param.name}")


CONTEXT = {"auto_envvar_prefix": "SQLQUEUE", "show_default": True}
count = click.IntRange(1)
option = click.option
setting = partial(option, expose_value=False, callback=keep)
app_option = setting("-A", "--app", metavar="MODULE:ATTR", help="Application: where its Queue is.")
json_option = setting("--json", is_flag=True, help="Write one JSON document.")
yes_option = option("--yes", is_flag=True, help="Do not ask.")
dry_run_option = option("--dry-run", is_flag=True, help="Say what would happen; change nothing.")
wait_option = option("--wait", is_flag=True, help="Wait for the job, and write its result.")
wait_for_option = option("--wait-for", type=duration, help="Wait so long at most, else exit 124.")
words_argument = click.argument("words", metavar="[ARG...] [k=v] [k:=JSON]", nargs=-1)


@click.group(cls=Commands, context_settings=CONTEXT)
@app_option
@setting("--url", help="Database: postgresql://user@host/name.")
@setting("--schema", help="Schema of the tables.")
@json_option
@setting("-q", "--quiet", is_flag=True, help="Log warnings only.")
@setting("-v", "--verbose", is_flag=True, help="Log every change of state.")
@setting("--log-format", type=click.Choice(["text", "json"]), help="How log lines are written.")
@click.version_option(__version__, prog_name="sqlqueue")
def main() -> None:
    """A durable task queue in the application's own Postgres.

    Every option has a variable: SQLQUEUE_<COMMAND>_<OPTION>.
    """


# The database and the workers


@main.command()
@click.pass_obj
@json_option
def config(control: Control) -> None:
    """Write the settings chosen, and why."""
    control.write(control.settings, control.settings)


@main.command()
@option("--folder", type=click.Path(path_type=Path), help="Text files to work on.")
@click.pass_context
def demo(ctx: click.Context, folder: Path | None) -> None:
    """Run real jobs, and check them.

    They run on a Postgres of their own, which leaves nothing behind.
    """
    from sqlqueue.demo import demo

    with misuse():
        ctx.exit(demo(folder))


@main.command()
@option("--quick", is_flag=True, help="Leave out the long measures.")
@json_option
@click.pass_context
def bench(ctx: click.Context, quick: bool) -> None:
    """Measure how fast it is here.

    On the server of --url, else on one of its own.
    """
    from sqlqueue.bench import bench

    control: Control = ctx.obj
    url = (
        control.url.value.render_as_string(hide_password=False) if "url" in control.given else None
    )
    ctx.exit(bench(url, quick=quick, as_json="json" in control.given))


@main.command()
@click.argument("action", type=click.Choice(["up", "down", "status"]), default="up")
@click.argument("revision", required=False)
@option("--sql", is_flag=True, help="Write the statements; connect to nothing.")
@option("--lock-timeout", type=duration, default=seconds(LOCK_TIMEOUT), help="Then give up.")
@yes_option
@json_option
@click.pass_obj
def migrate(
    control: Control, /, action: str, revision: str | None, sql: bool, **given: Any
) -> None:
    """Bring the schema to a revision.

    Up to the newest, or down to nothing, unless REVISION says otherwise; with --sql it is
    FROM:TO. Going down drops jobs, so it asks. `status` exits 4 if this release cannot work on
    the schema.
    """
    is_down, schema, lock_timeout = action == "down", control.schema.value, given["lock_timeout"]
    if revision and not REVISION.fullmatch(revision):
        raise click.UsageError(f"{revision} is no revision such as 0001, base or head")
    if sql:
        revisions = revision or ("head:base" if is_down else "base:head")
        with misuse():
            click.echo(script(schema, revisions, is_down=is_down, lock_timeout=lock_timeout))
        return
    engine = control.queue.engine
    if action != "status":
        revision = revision or ("base" if is_down else "head")
        found = current(engine, schema)
        if goes_down(found, revision) != is_down:
            raise failure(
                f"nothing was changed: {revision} is not {action} from {found or 'base'}", FAILED
            )
        if is_down and not given["yes"]:
            confirm(f"Go down to {revision}, and drop the jobs in schema {schema}?")
        move_to(engine, schema, revision, lock_timeout=lock_timeout)
    row = {"schema": schema, "revision": current(engine, schema), "head": head()}
    control.write(row, [row])
    if action == "status":
        check(engine, schema)


@main.command()
@click.argument("queues", metavar="[QUEUE[:WEIGHT]...]", nargs=-1)
@app_option
@option("--processes", type=count, default=1, help="Worker processes.")
@option("--slots", type=count, default=WorkerOptions.slots, help="Jobs at a time, in each.")
@option("--max-jobs", type=count, help="Stop after this many runs, in each.")
@option("--drain", is_flag=True, help="Stop when there is nothing to run.")
@option("--poll", type=duration, default=seconds(WorkerOptions.poll), help="Longest sleep.")
@option("--no-listen", is_flag=True, help="Only poll; do without notifications.")
@option("--grace", type=duration, default=seconds(WorkerOptions.grace), help="Time to end jobs.")
@option("--ttl", type=duration, default=seconds(WorkerOptions.ttl), help="Silence that is death.")
@option("--name", help="Name, for people.")
@option(
    "--child-jobs", type=count, default=WorkerOptions.child_runs, help="Runs of a child process."
)
@option("--child-rss", type=size, help="Memory of a child process, such as 512M.")
@click.pass_context
def worker(ctx: click.Context, /, queues: Sequence[str], processes: int, **given: Any) -> None:
    """Run the jobs of some queues.

    Without QUEUE, of the queues that the tasks are for.

    A first SIGTERM or Ctrl-C lets running jobs end, a second one hands them back at once.
    """
    control: Control = ctx.obj
    given["listen"] = not given.pop("no_listen")
    given["child_runs"] = given.pop("child_jobs")
    given["child_bytes"] = given.pop("child_rss")
    load, queue = control.loader, control.queue
    with misuse():
        example = queue.worker(*queues, **given)
    check(queue.engine, queue.store.schema)
    control.start_log()
    ctx.exit(Supervisor(load, queues or example.lanes.names, example.options, processes).run())


# Calls


@main.command()
@click.argument("task")
@words_argument
@app_option
@option("--args", metavar="@FILE|-", help="Arguments, as a JSON list or object.")
@option("--queue", help="Where it waits.")
@option("--delay", type=duration, help="Not to start before this has passed.")
@option("--at", type=time, help="Not to start before this.")
@option("--expires", type=duration, help="Ends as expired unless started within this.")
@option("--priority", type=int, help="-100 to 100, small is urgent.")
@option("--tag", multiple=True, help="Word for people and tools; may be repeated.")
@option("--attempts", type=count, help="Runs that may fail, the first included.")
@wait_option
@wait_for_option
@json_option
@click.pass_obj
def enqueue(control: Control, /, task: str, words: Sequence[str], **given: Any) -> None:
    """Enqueue a call; write the id of its job.

    ARG is JSON, or else text; k=v is text. Nothing is checked if the application does not know
    the task.
    """
    known = control.queue.tasks.get(task)
    target: Any = known or control.queue
    with misuse():
        args, kwargs = arguments(known, words, given["args"])
        bound = target.using(**options_of(target, given))
        job = bound.enqueue(*args, **kwargs) if known else bound.send(task, *args, **kwargs)
    if given["wait"] or given["wait_for"] is not None:
        click.echo(f"job {job.id}", err=True)
        write_result(control, job.id, wait=True, wait_for=given["wait_for"])
    else:
        control.write({"id": job.id}, [{"id": job.id}])


def options_of(target: AnyTask | Queue, given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a job that were given, under their names in Options."""
    options = {name: given[name] for name in ("queue", "delay", "expires", "priority")}
    options |= {"run_at": given["at"], "tags": given["tag"] or None}
    if given["attempts"] is not None:
        options["retry"] = replace(target.options.retry, attempts=given["attempts"])
    return {name: value for name, value in options.items() if value is not None}


def arguments(
    task: AnyTask | None, words: Iterable[str], source: str | None
) -> tuple[Args, Kwargs]:
    """Read the arguments of a call; those of a task that is known, by its annotations.

    Raises ValueError or TypeError for what cannot be read or does not fit.
    """
    args: Args = []
    kwargs: Kwargs = {}
    if source is not None:
        if source != "-" and not source.startswith("@"):
            raise ValueError(f"--args must be @FILE or -, got {source}")
        with click.open_file(source.removeprefix("@"), encoding="utf-8") as file:
            document = json.load(file)
        if not isinstance(document, list | dict):
            raise ValueError("--args must be a JSON list or object")
        args, kwargs = (document, {}) if isinstance(document, list) else ([], document)
    for word in words:
        if match := KEYWORD.fullmatch(word):
            kwargs[match[1]] = json.loads(match[3]) if match[2] == ":=" else match[3]
        else:
            args.append(json_or_text(word))
    return task.shape.decode(encode_call(tuple(args), kwargs)) if task else (args, kwargs)


def write_result(control: Control, job_id: UUID, *, wait: bool, wait_for: timedelta | None) -> None:
    """Write the result of a job as JSON."""
    job = Job.get(control.plain, job_id)
    try:
        result = job.wait(wait_for) if wait else job.result
    except NotEnded as error:
        raise failure(str(error), TOO_LONG if wait else FAILED) from error
    click.echo(encode_value(result))


@main.command()
@click.argument("task")
@words_argument
@app_option
@option("--pdb", is_flag=True, help="Debug what it raises.")
@click.pass_context
def call(ctx: click.Context, task: str, words: Sequence[str], pdb: bool) -> None:
    """Call a task here and now, without a job.

    Writes its result as JSON.
    """
    control: Control = ctx.obj
    control.start_log()
    with misuse():
        queue = control.loader()
        if not (known := queue.tasks.get(task)):
            raise ValueError(f"there is no task {task}; known: {', '.join(sorted(queue.tasks))}")
        args, kwargs = arguments(known, words, None)
    try:
        result = perform(queue, known, args, kwargs)
    except Exception as error:
        traceback.print_exception(error)
        if pdb:
            post_mortem(error.__traceback__)
        ctx.exit(FAILED)
    click.echo(encode_value(result, known.returns))


def perform(queue: Queue, task: AnyTask, args: Args, kwargs: Kwargs) -> Any:
    """Call the function of a task, a transactional one in a transaction of its own."""
    if task.is_async:
        return asyncio.run(perform_async(queue, task, args, kwargs))
    if not task.transactional:
        return task.function(*args, **kwargs)
    with Session(queue.engine) as session, session.begin():
        return task.function(session, *args, **kwargs)


async def perform_async(queue: Queue, task: AnyTask, args: Args, kwargs: Kwargs) -> Any:
    """Do what `perform` does, for a coroutine function."""
    if not task.transactional:
        return await task.function(*args, **kwargs)
    engine = create_async_engine(queue.engine.url, hide_parameters=True)
    try:
        async with AsyncSession(engine, expire_on_commit=False) as session, session.begin():
            return await task.function(session, *args, **kwargs)
    finally:
        await engine.dispose()


# Jobs


@main.group()
def jobs() -> None:
    """Look at jobs; retry and cancel them."""


@jobs.command("list")
@option("--state", type=click.Choice(STATES), help="Only those in this state.")
@option("--queue", help="Only those of this queue.")
@option("--task", metavar="GLOB", help="Only those of these tasks: * and ? stand for others.")
@option("--limit", type=count, default=50, help="Not more than this.")
@json_option
@click.pass_obj
def list_jobs(control: Control, /, **given: Any) -> None:
    """Write the newest jobs, newest first."""
    with control.reports() as reports:
        rows = reports.jobs(**given)
    control.write(rows, rows)


@jobs.command()
@click.argument("job", type=click.UUID)
@json_option
@click.pass_obj
def show(control: Control, job: UUID) -> None:
    """Write all of a job, and of its runs."""
    with control.reports() as reports:
        found = reports.job(job)
    if found is None:
        raise JobNotFound(job)
    control.write(found, fields(found))


@jobs.command()
@click.argument("job", type=click.UUID)
@wait_option
@wait_for_option
@click.pass_obj
def result(control: Control, job: UUID, wait: bool, wait_for: timedelta | None) -> None:
    """Write the result of a job, as JSON."""
    write_result(control, job, wait=wait or wait_for is not None, wait_for=wait_for)


@jobs.command()
@click.argument("job", nargs=-1, required=True)
@dry_run_option
@yes_option
@json_option
@click.pass_context
def retry(ctx: click.Context, /, **given: Any) -> None:
    """Make jobs that failed or were cancelled ready again; past runs are kept.

    With - for JOB, ids are the first words of the lines on stdin. Exits 1 if none could be, 6 if
    only some.
    """
    change(ctx, RETRYABLE, Job.retry, **given)


@jobs.command()
@click.argument("job", nargs=-1, required=True)
@dry_run_option
@yes_option
@json_option
@click.pass_context
def cancel(ctx: click.Context, /, **given: Any) -> None:
    """Cancel jobs that have not ended; running ones are told to stop.

    With - for JOB, ids are the first words of the lines on stdin. Exits 1 if none could be, 6 if
    only some.
    """
    change(ctx, LIVE, Job.cancel, **given)


def change(
    ctx: click.Context, states: Sequence[str], act: Callable[[Job[Any]], bool], **given: Any
) -> None:
    """Change those of some jobs that are in one of `states`, and say what became of each."""
    control: Control = ctx.obj
    is_trial, words = given["dry_run"], [word for word in given["job"] if word != "-"]
    is_piped = len(words) < len(given["job"])
    if is_piped:
        words += [line.split()[0] for line in sys.stdin if line.strip()]
    with misuse():
        ids = list(dict.fromkeys(UUID(word) for word in words))
    with control.reports() as reports:
        found = reports.states(ids)
    able = [job for job in ids if found.get(job) in states]
    if able and (is_piped or len(ids) > 1) and not (is_trial or given["yes"]):
        confirm(f"{ctx.info_name} {len(able)} jobs?")
    done = {job: None for job in able if is_trial or act(Job(control.plain, job))}
    refused = {job: found.get(job, "unknown") for job in ids if job not in done}
    for job, state in refused.items():
        click.echo(f"job {job} is {state}", err=True)
    rows = [{"id": job} for job in done]
    control.write(
        {"done": list(done), "refused": {str(job): refused[job] for job in refused}}, rows
    )
    would = "would " if is_trial else ""
    click.echo(f"{would}{ctx.info_name} {len(done)} of {len(ids)} jobs", err=True)
    if not done:
        ctx.exit(FAILED if found else NOTHING)
    ctx.exit(IN_PART if refused else 0)


# Queues


@main.group()
def queues() -> None:
    """Look at queues; pause and resume them."""


@queues.command("list")
@json_option
@click.pass_obj
def list_queues(control: Control) -> None:
    """Write the queues that have jobs which have not ended, or have ever been paused."""
    with control.reports() as reports:
        rows = reports.queues()
    control.write(rows, rows)


@queues.command()
@click.argument("queue")
@option("--why", help="Reason, for people.")
@option("--for", type=duration, help="Resume after this.")
@click.pass_obj
def pause(control: Control, /, queue: str, **given: Any) -> None:
    """Start no more jobs of a queue until it is resumed; running ones go on."""
    with misuse():
        control.queue.pause(queue, by=getpass.getuser(), why=given["why"], lasts=given["for"])


@queues.command()
@click.argument("queue")
@click.pass_obj
def resume(control: Control, queue: str) -> None:
    """Go on with the jobs of a queue."""
    with control.reports() as reports:
        if all(row["queue"] != queue for row in reports.queues()):
            raise failure(f"there is no queue {queue}", NOTHING)
    control.queue.resume(queue)
