"""The commands about jobs: look at them, and change them, one by one or by a search."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import click
from click import option

from sqlqueue.cli import options, words
from sqlqueue.cli.ending import FAILED, IN_PART, NOTHING, TOO_LONG, confirm, failure
from sqlqueue.codec import encode_value
from sqlqueue.errors import NotEnded
from sqlqueue.job import Job
from sqlqueue.reports import LEVELS
from sqlqueue.reports.control import Control, misuse
from sqlqueue.reports.hiding import hidden, patterns_of, restored
from sqlqueue.reports.search import STATES as ALL
from sqlqueue.reports.search import Search
from sqlqueue.reports.verbs import MOST, STATES
from sqlqueue.reports.written import as_json, fields

LISTED = (
    "id", "state", "reason", "queue", "task", "created_at", "run", "waited", "ran", "error_type"
)  # fmt: skip


jobs = click.Group("jobs", help="Look at jobs; retry, cancel, move, discard and delete them.")


def which(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which jobs."""
    for one in (
        options.where,
        option("--task", metavar="GLOB", help="Only of these tasks; * stands for anything."),
        option("--queue", metavar="GLOB", help="Only of these queues."),
        option("--state", type=click.Choice(ALL), help="Only those in this state."),
    ):
        command = one(command)
    return command


def search_of(given: dict[str, Any]) -> Search:
    """Return the search that the options make; empties them out of `given`."""
    terms = [(name, given.pop(name)) for name in ("state", "queue", "task")]
    said = [f'{name}:"{value}"' if " " in value else f"{name}:{value}" for name, value in terms
            if value]  # fmt: skip
    with misuse():
        return Search(" ".join([*said, given.pop("where") or ""]))


@jobs.command("list")
@which
@option("--limit", type=options.COUNT, default=50, help="Not more than this.")
@option("--watch", is_flag=True, help="Write it again every two seconds, until Ctrl-C.")
@options.json
@click.pass_obj
def list_jobs(control: Control, /, limit: int, watch: bool, **given: Any) -> None:
    """Write the newest jobs, newest first."""
    search = search_of(given)

    def rows() -> list[dict[str, Any]]:
        with control.reports(begun=True) as reports:
            found = search.find(reports, limit)
            if found.looked_back_to:
                click.echo(f"looked back to {found.looked_back_to:%Y-%m-%d %H:%M} UTC", err=True)
            return [{name: row[name] for name in LISTED} for row in reports.jobs(found.ids)]

    control.watch(rows, timedelta(seconds=2) if watch else None)


@jobs.command()
@click.argument("job", type=click.UUID)
@options.json
@click.pass_obj
def show(control: Control, job: UUID) -> None:
    """Write all of a job, and of its runs."""
    found = control.shown(control.job(job))
    control.write(found, fields(found))


@jobs.command()
@click.argument("job", type=click.UUID)
@options.wait
@options.wait_for
@click.pass_obj
def result(control: Control, job: UUID, wait: bool, wait_for: timedelta | None) -> None:
    """Write the result of a job, as JSON."""
    write_result(control, job, wait=wait or wait_for is not None, wait_for=wait_for)


def write_result(control: Control, job_id: UUID, *, wait: bool, wait_for: timedelta | None) -> None:
    """Write the result of a job as JSON."""
    job = Job.get(control.plain, job_id)
    try:
        result = job.wait(wait_for) if wait else job.result
    except NotEnded as error:
        raise failure(str(error), TOO_LONG if wait else FAILED) from error
    click.echo(encode_value(hidden(result, patterns_of(control.queue, job.task))))


@jobs.command()
@click.argument("job", type=click.UUID)
@option("--run", type=options.COUNT, help="Of this run only.")
@option("--level", type=click.Choice(LEVELS), help="From this level on; without progress.")
@option("-f", "--follow", is_flag=True, help="Go on until the job has ended.")
@options.json
@click.pass_obj
def logs(control: Control, /, job: UUID, run: int | None, level: str | None, follow: bool) -> None:
    """Write what a job said in its runs: its log lines and its progress."""
    known, has_ended = 0, False
    while not has_ended:
        has_ended = control.job(job)["ended_at"] is not None
        with control.reports() as reports:
            rows = reports.logs([job], run, level)
        if not follow:
            return control.write(rows, rows)
        for row in rows[known:]:
            control.write_line(row)
        known = len(rows)
        time.sleep(0 if has_ended else 0.5)
    return None


@jobs.command()
@which
@option("--limit", type=options.COUNT, default=MOST, help="Not more than this.")
@click.pass_obj
def dump(control: Control, /, limit: int, **given: Any) -> None:
    """Write all of each job as JSON, one a line."""
    with control.reports(begun=True) as reports:
        for job in search_of(given).find(reports, limit).ids:
            click.echo(as_json(control.shown(control.job(job)), indent=None))


@jobs.command()
@click.argument("job", type=click.UUID)
@option("--args", metavar="JSON", help="The new arguments; else an editor opens.")
@options.json
@click.pass_obj
def edit(control: Control, job: UUID, args: str | None) -> None:
    """Enqueue a job anew with other arguments, and discard it; write the new id.

    For a job that failed or was cancelled, or has not started. What is hidden stays as it is.
    """
    found = control.job(job)
    text = args or click.edit(as_json(control.shown(found)["args"]), extension=".json")
    if text is None:
        raise failure("nothing was changed")
    with misuse():
        made = control.operator.edit(found, restored(json.loads(text), found["args"]))
    control.write({"id": made}, [{"id": made}])


def verb(name: str, doc: str, *more: Callable[..., Any]) -> None:
    """Make the command of a verb of the Operator; `more` says how it is done."""

    def command(ctx: click.Context, /, job: Sequence[str], yes: bool, **given: Any) -> None:
        is_described = any(given[one] for one in ("state", "queue", "task", "where"))
        if bool(job) == is_described:
            raise click.UsageError("name jobs, or say which, by --where and the like")
        search, named = search_of(given), [word for word in job if word != "-"]
        is_one = job == (*named,) and len(job) == 1
        if len(named) < len(job):
            named += [line.split()[0] for line in sys.stdin if line.strip()]
        with misuse():
            ids = list(dict.fromkeys(UUID(word) for word in named))
        act = "move" if name == "priority" else name.replace("-", "_")
        change(ctx, act, search if is_described else ids, yes=yes or is_one, **given)

    command.__doc__ = doc
    made: Any = click.pass_context(command)
    limit = option("--limit", type=options.COUNT, default=MOST, help="Not more than this.")
    job = click.argument("job", nargs=-1)
    shared: list[Any] = [options.json, options.yes, options.dry_run, which, limit, job, *more]
    for one in shared:
        made = one(made)
    jobs.command(name)(made)


NAMED = """

    Name them, or say which: by --where and the like. With - for JOB, ids are the first words of
    the lines on stdin. Exits 1 if none could be, 6 if only some.
    """
verb("retry", "Make jobs that failed or were cancelled ready again; past runs are kept." + NAMED,
     option("--spread", type=words.duration, help="Over this time, evenly."))  # fmt: skip
verb("cancel", "Cancel jobs that have not ended; running ones are told to stop." + NAMED,
     option("--reason", help="Why, for people."))  # fmt: skip
verb("discard", "Make failed jobs cancelled: nobody means to retry them." + NAMED)
verb("delete", "Remove jobs that do not run, with their runs and lines." + NAMED)
verb("run-now", "Make scheduled jobs due now." + NAMED)
verb("move", "Put jobs that have not started into another queue." + NAMED,
     option("--to", metavar="QUEUE", required=True, help="That queue."))  # fmt: skip
verb("priority", "Give jobs that have not started another priority, -100 to 100." + NAMED,
     click.argument("priority", metavar="NUMBER", type=click.IntRange(-100, 100)))  # fmt: skip


def change(
    ctx: click.Context, act: str, chosen: Search | list[UUID], *,
    yes: bool, dry_run: bool, limit: int = MOST, **how: Any,
) -> None:  # fmt: skip
    """Change those of some jobs that are in a state for it, and say what became of each."""
    control: Control = ctx.obj
    name, text = ctx.info_name, chosen.text if isinstance(chosen, Search) else ""
    how["queue"] = how.pop("to", None)
    with control.reports(begun=True) as reports:
        if isinstance(chosen, Search):
            chosen.states &= set(STATES[act])
            chosen = chosen.find(reports, limit).ids
        found = reports.states(chosen)
    done = [job for job in chosen if found.get(job) in STATES[act]]
    if done and not dry_run:
        confirm(f"{name} {len(done)} jobs?", yes)
        with misuse():
            done = control.operator.change(act, done, text, how).ids
    refused = {str(job): found.get(job, "unknown") for job in chosen if job not in set(done)}
    for job, state in refused.items():
        click.echo(f"job {job} is {state}", err=True)
    control.write({"done": done, "refused": refused}, [{"id": job} for job in done])
    would = "would " if dry_run else ""
    click.echo(f"{would}{name} {len(done)} of {len(chosen)} jobs", err=True)
    if not done:
        ctx.exit(FAILED if found else NOTHING)
    ctx.exit(IN_PART if refused else 0)
