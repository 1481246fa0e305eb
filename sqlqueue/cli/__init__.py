"""The command line: what a person or a script does with jobs, queues and workers.

A command reads its words, calls what the Python API calls, and says what became of it: data on
stdout, the rest on stderr. What can be expected to fail ends in one message and an exit code.
"""

import asyncio
import math
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from pdb import post_mortem
from typing import Any

import click
from click import option
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqlqueue import __version__
from sqlqueue.cli import options, words
from sqlqueue.cli.control import failures, queues, schedules, tasks, workers
from sqlqueue.cli.crew import Served
from sqlqueue.cli.ending import FAILED, Commands, failure
from sqlqueue.cli.jobs import jobs, write_result
from sqlqueue.cli.setup import completion, dashboard, init, prune, report, shell
from sqlqueue.cli.supervisor import Processes, Supervisor
from sqlqueue.cli.watch import doctor, health, sql, stats, top, why
from sqlqueue.codec import encode_value
from sqlqueue.link import async_engine, driver_of
from sqlqueue.policy import Unique
from sqlqueue.queue import Queue
from sqlqueue.reports.control import Control, misuse
from sqlqueue.task import Task
from sqlqueue.worker import WorkerOptions

AnyTask = Task[..., Any]
Args = list[Any]
Kwargs = dict[str, Any]


@click.group(cls=Commands, context_settings=options.CONTEXT)
@options.app
@options.setting("--url", help="Database: postgresql://user@host/name.")
@options.setting("--schema", help="Schema of the tables.")
@options.json
@options.setting("-q", "--quiet", is_flag=True, help="Log warnings only.")
@options.setting("-v", "--verbose", is_flag=True, help="Log every change of state.")
@options.setting(
    "--log-format", type=click.Choice(["text", "json"]), help="How log lines are written."
)
@click.version_option(__version__, prog_name="sqlqueue")
def main() -> None:
    """A durable task queue in the application's own Postgres.

    Every option has a variable: SQLQUEUE_<COMMAND>_<OPTION>.
    """


for command in (
    *(jobs, failures, queues, workers, tasks, schedules),
    *(why, stats, top, sql, health, doctor),
    *(init, prune, report, shell, completion, dashboard),
):
    main.add_command(command)

# The database and the workers


@main.command()
@click.pass_obj
@options.json
def config(control: Control) -> None:
    """Write the settings chosen, and why."""
    control.write(control.settings, control.settings)


@main.command()
@option("--folder", type=click.Path(path_type=Path), help="Text files to work on.")
@option("--port", type=int, default=8787, help="Of the dashboard, on a terminal; 0 for any.")
@option("--no-browser", is_flag=True, help="Do not open it in a browser.")
@click.pass_context
def demo(ctx: click.Context, folder: Path | None, port: int, no_browser: bool) -> None:
    """Run real jobs, and check them.

    They run on a Postgres of their own, which leaves nothing behind. On a terminal the dashboard
    is served until Ctrl-C.
    """
    from sqlqueue.demo import demo

    with misuse():
        ctx.exit(demo(folder, port, browses=not no_browser))


@main.command()
@option("--quick", is_flag=True, help="Leave out the long measures.")
@options.json
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
@option("--lock-timeout", type=words.duration, default="2s", help="Then give up.")
@options.yes
@options.json
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
@options.apps
@option(
    "--processes", type=words.numbers, default="1", help="Worker processes: 4, or 1..4 as needed."
)
@option("--slots", type=options.COUNT, default=WorkerOptions.slots, help="Jobs at a time, in each.")
@option("--max-jobs", type=options.COUNT, help="Stop after this many runs, in each.")
@option("--drain", is_flag=True, help="Stop when there is nothing to run.")
@option(
    "--poll", type=words.duration, default=words.seconds(WorkerOptions.poll), help="Longest sleep."
)
@option("--no-listen", is_flag=True, help="Only poll; do without notifications.")
@option(
    "--grace",
    type=words.duration,
    default=words.seconds(WorkerOptions.grace),
    help="Time to end jobs.",
)
@option(
    "--ttl",
    type=words.duration,
    default=words.seconds(WorkerOptions.ttl),
    help="Silence that is death.",
)
@option("--name", help="Name, for people.")
@option(
    "--child-jobs",
    type=options.COUNT,
    default=WorkerOptions.child_runs,
    help="Runs of a child process.",
)
@option("--max-age", type=words.duration, help="Replace worker processes that are as old.")
@option("--max-rss", type=words.size, help="Replace those with more memory, such as 512M.")
@option("--child-age", type=words.duration, help="Age of a child process.")
@option("--child-rss", type=words.size, help="Memory of a child process, such as 512M.")
@option("--exclude", multiple=True, metavar="QUEUE", help="Not this queue; may be repeated.")
@option("--health-port", type=int, help="Answer /live, /ready, /started and /metrics here.")
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

    excluded, port = set(given.pop("exclude")), given.pop("health_port")
    with misuse():
        examples = [load().worker(*queues, **given) for load in control.loaders]
    first, *others = [
        Served(load, [name for name in queues or one.lanes.names if name not in excluded])
        for load, one in zip(control.loaders, examples, strict=True)
    ]
    if not others:  # a worker of several waits for each of them
        check(control.queue.engine, control.queue.store.schema)
    if not all(one.names for one in (Served(*first), *others)):
        raise click.UsageError("no queue is left to serve")
    control.start_log()
    if port is not None:
        os.environ["SQLQUEUE_PROBES"] = str(port)  # for the worker processes
    ctx.exit(Supervisor(*first, examples[0].options, processes, others).run())


def reload(grace: timedelta) -> None:
    """Run this very command, without --reload, again and again: whenever Python files change."""
    try:
        from watchfiles import PythonFilter, run_process
    except ImportError as error:
        raise failure('install "sqlqueue[reload]" first') from error
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
@options.call
@options.app
@option("--args", metavar="@FILE|-", help="Arguments, as a JSON list or object.")
@option("--queue", help="Where it waits.")
@option("--delay", type=words.duration, help="Not to start before this has passed.")
@option("--at", type=words.time, help="Not to start before this.")
@option("--expires", type=words.duration, help="Ends as expired unless started within this.")
@option("--priority", type=int, help="-100 to 100, small is urgent.")
@option("--key", help="What limits, shares and order go by.")
@option("--unique", metavar="KEY", help="Only one such job at a time.")
@option("--tag", multiple=True, help="Word for people and tools; may be repeated.")
@option("--attempts", type=options.COUNT, help="Runs that may fail, the first included.")
@options.wait
@options.wait_for
@options.json
@click.pass_obj
def enqueue(control: Control, /, task: str, arg: Sequence[str], **given: Any) -> None:
    """Enqueue a call; write the id of its job.

    ARG is JSON, or else text; k=v is text. Nothing is checked if the application does not know
    the task.
    """
    known = control.queue.tasks.get(task)
    target: Any = known or control.queue
    with misuse():
        args, kwargs = words.arguments(known, arg, given["args"])
        bound = target.using(**options_of(target, given))
        job = bound.enqueue(*args, **kwargs) if known else bound.send(task, *args, **kwargs)
    if given["wait"] or given["wait_for"] is not None:
        click.echo(f"job {job.id}", err=True)
        write_result(control, job.id, wait=True, wait_for=given["wait_for"])
    else:
        control.write({"id": job.id}, [{"id": job.id}])


def options_of(target: AnyTask | Queue, given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a job that were given, under their names in Options."""
    options = {name: given[name] for name in ("queue", "delay", "expires", "priority", "key")}
    options["unique"] = Unique(key=given["unique"]) if given["unique"] else None
    options |= {"run_at": given["at"], "tags": given["tag"] or None}
    if given["attempts"] is not None:
        options["retry"] = replace(target.options.retry, attempts=given["attempts"])
    return {name: value for name, value in options.items() if value is not None}


@main.command()
@click.argument("task")
@options.call
@options.app
@option("--pdb", is_flag=True, help="Debug what it raises.")
@click.pass_context
def call(ctx: click.Context, task: str, arg: Sequence[str], pdb: bool) -> None:
    """Call a task here and now, without a job.

    Writes its result as JSON.
    """
    control: Control = ctx.obj
    control.start_log()
    with misuse():
        queue = control.loaders[0]()
        if not (known := queue.tasks.get(task)):
            raise ValueError(f"there is no task {task}; known: {', '.join(sorted(queue.tasks))}")
        args, kwargs = words.arguments(known, arg)
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
