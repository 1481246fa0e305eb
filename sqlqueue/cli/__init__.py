"""The command line: what a person or a script does with jobs, queues and workers.

A command reads its words, calls what the Python API calls, and says what became of it: data on
stdout, the rest on stderr. What can be expected to fail ends in one message and an exit code.
"""

import asyncio
import json
import math
import os
import shlex
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from pdb import post_mortem
from typing import Any

import click
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqlqueue import __version__
from sqlqueue.cli.control import queues, schedules
from sqlqueue.cli.crew import Served
from sqlqueue.cli.jobs import jobs
from sqlqueue.cli.supervisor import Processes, Supervisor
from sqlqueue.cli.words import (
    CONTEXT,
    FAILED,
    KEYWORD,
    Commands,
    app_option,
    apps_option,
    count,
    duration,
    failure,
    json_option,
    json_or_text,
    numbers,
    option,
    seconds,
    setting,
    size,
    time,
    wait_for_option,
    wait_option,
    words_argument,
    write_result,
    yes_option,
)
from sqlqueue.codec import encode_call, encode_value
from sqlqueue.link import async_engine, driver_of
from sqlqueue.queue import Queue
from sqlqueue.reports import Control, misuse
from sqlqueue.task import Task
from sqlqueue.worker import WorkerOptions

AnyTask = Task[..., Any]
Args = list[Any]
Kwargs = dict[str, Any]


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


main.add_command(jobs)
main.add_command(queues)
main.add_command(schedules)

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
@option("--roles", is_flag=True, help="Make the roles and their grants, too.")
@option("--sql", is_flag=True, help="Write the statements; connect to nothing.")
@option("--lock-timeout", type=duration, default="2s", help="Then give up.")
@yes_option
@json_option
@click.pass_obj
def migrate(control: Control, /, action: str, revision: str | None, **given: Any) -> None:
    """Bring the schema to a revision.

    Up to the newest, or down to nothing, unless REVISION says otherwise; with --sql it is
    FROM:TO. Going down drops jobs, so it asks. `status` exits 4 if this release cannot work on
    the schema.
    """
    from sqlqueue.cli.schema import bring

    bring(control, action, revision, **given)


@main.command()
@click.argument("queues", metavar="[QUEUE[:WEIGHT]...]", nargs=-1)
@apps_option
@option("--processes", type=numbers, default="1", help="Worker processes: 4, or 1..4 as needed.")
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
@option("--max-age", type=duration, help="Replace worker processes that are as old.")
@option("--max-rss", type=size, help="Replace those with more memory, such as 512M.")
@option("--child-age", type=duration, help="Age of a child process.")
@option("--child-rss", type=size, help="Memory of a child process, such as 512M.")
@option("--reload", is_flag=True, help="Start anew when Python files in this folder change.")
@click.pass_context
def worker(ctx: click.Context, /, queues: Sequence[str], **given: Any) -> None:
    """Run the jobs of some queues.

    Without QUEUE, of the queues that the tasks are for. With -A more than once, of several
    databases, which share the slots.

    A first SIGTERM or Ctrl-C lets running jobs end, a second one hands them back at once.
    """
    control: Control = ctx.obj
    if given.pop("reload"):
        reload(given["grace"])
        ctx.exit(0)
    limits = {"max_age": given.pop("max_age"), "max_bytes": given.pop("max_rss")}
    with misuse():
        processes = Processes(*given.pop("processes"), **limits)
    given["listen"] = not given.pop("no_listen")
    given["child_runs"] = given.pop("child_jobs")
    given["child_bytes"] = given.pop("child_rss")
    from sqlqueue.integrations.alembic import check

    with misuse():
        examples = [load().worker(*queues, **given) for load in control.loaders]
    first, *others = [
        Served(load, queues or one.lanes.names)
        for load, one in zip(control.loaders, examples, strict=True)
    ]
    if not others:  # a worker of several waits for each of them
        check(control.queue.engine, control.queue.store.schema)
    control.start_log()
    ctx.exit(Supervisor(*first, examples[0].options, processes, others).run())


def reload(grace: timedelta) -> None:
    """Run this very command, without --reload, again and again: whenever Python files change."""
    try:
        from watchfiles import PythonFilter, run_process
    except ImportError as error:
        raise failure('install "sqlqueue[reload]" first', FAILED) from error
    os.environ.pop("SQLQUEUE_WORKER_RELOAD", None)
    words = [word for word in sys.argv[1:] if word != "--reload"]
    command = shlex.join([sys.executable, "-m", "sqlqueue", *words])
    run_process(
        ".",
        target=command,
        target_type="command",
        watch_filter=PythonFilter(),
        sigint_timeout=math.ceil(grace.total_seconds()) + 5,
    )


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
    click.echo(encode_value(result, known.shape.returns))


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
    with queue.engine.connect() as conn:
        engine = async_engine(queue.engine.url, driver_of(conn))
    try:
        async with AsyncSession(engine, expire_on_commit=False) as session, session.begin():
            return await task.function(session, *args, **kwargs)
    finally:
        await engine.dispose()
