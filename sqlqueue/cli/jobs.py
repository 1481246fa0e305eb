"""The commands about jobs: look at them, and change them, one by one or by a search."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import click

from sqlqueue.cli.shared import (
    FAILED,
    IN_PART,
    NOTHING,
    confirm,
    count,
    dry_run_option,
    duration,
    failure,
    json_option,
    operator,
    option,
    wait_for_option,
    wait_option,
    watched,
    where_option,
    write_result,
    yes_option,
)
from sqlqueue.errors import JobNotFound
from sqlqueue.reports import LEVELS
from sqlqueue.reports.control import Control, misuse
from sqlqueue.reports.hiding import restored
from sqlqueue.reports.search import STATES as ALL
from sqlqueue.reports.search import Search, parse
from sqlqueue.reports.verbs import MOST, STATES
from sqlqueue.reports.written import as_json, fields


@click.group()
def jobs() -> None:
    """Look at jobs; retry, cancel, move, discard and delete them."""


def which(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which jobs."""
    for one in (
        where_option,
        option("--task", metavar="GLOB", help="Only of these tasks; * stands for anything."),
        option("--queue", metavar="GLOB", help="Only of these queues."),
        option("--state", type=click.Choice(ALL), help="Only those in this state."),
    ):
        command = one(command)
    return command


def search_of(given: dict[str, Any]) -> Search:
    """Return the search that the options make; empties them out of `given`."""
    names = ("state", "queue", "task")
    terms = [f'{name}:"{value}"' if " " in value else f"{name}:{value}"
             for name in names if (value := given.pop(name))]  # fmt: skip
    with misuse():
        return parse(" ".join([*terms, given.pop("where") or ""]))


@jobs.command("list")
@which
@option("--limit", type=count, default=50, help="Not more than this.")
@option("--watch", is_flag=True, help="Write it again every two seconds, until Ctrl-C.")
@json_option
@click.pass_obj
def list_jobs(control: Control, /, limit: int, watch: bool, **given: Any) -> None:
    """Write the newest jobs, newest first."""
    search = search_of(given)

    def rows() -> list[dict[str, Any]]:
        with control.reports(begun=True) as reports:
            found = search.find(reports, limit)
            if found.looked_back_to:
                click.echo(f"looked back to {found.looked_back_to:%Y-%m-%d %H:%M} UTC", err=True)
            return reports.jobs(found.ids)

    watched(control, rows, timedelta(seconds=2) if watch else None)


@jobs.command()
@click.argument("job", type=click.UUID)
@json_option
@click.pass_obj
def show(control: Control, job: UUID) -> None:
    """Write all of a job, and of its runs."""
    found = control.shown(job)
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
@click.argument("job", type=click.UUID)
@option("--run", type=count, help="Of this run only.")
@option("--level", type=click.Choice(LEVELS), help="From this level on; without progress.")
@option("-f", "--follow", is_flag=True, help="Go on until the job has ended.")
@json_option
@click.pass_obj
def logs(control: Control, /, job: UUID, run: int | None, level: str | None, follow: bool) -> None:
    """Write what a job said in its runs: its log lines and its progress."""
    known = 0
    while True:
        with control.reports() as reports:
            found = reports.job(job)
            if found is None:
                raise JobNotFound(job)
            rows = reports.logs(job, run, level)
        if not follow:
            return control.write(rows, rows)
        for row in rows[known:]:
            control.write_line(row)
        known = len(rows)
        if found["ended_at"] is not None:
            return None
        time.sleep(0.5)


@jobs.command()
@which
@option("--limit", type=count, default=MOST, help="Not more than this.")
@click.pass_obj
def dump(control: Control, /, limit: int, **given: Any) -> None:
    """Write all of each job as JSON, one a line."""
    search = search_of(given)
    with control.reports(begun=True) as reports:
        for job in search.find(reports, limit).ids:
            click.echo(as_json(control.shown(job), indent=None))


@jobs.command()
@click.argument("job", type=click.UUID)
@option("--args", metavar="JSON", help="The new arguments; else an editor opens.")
@json_option
@click.pass_obj
def edit(control: Control, job: UUID, args: str | None) -> None:
    """Enqueue a job anew with other arguments, and discard it; write the new id.

    For a job that failed or was cancelled, or has not started. What is hidden stays as it is.
    """
    with control.reports() as reports:
        found = reports.job(job)
    if found is None:
        raise JobNotFound(job)
    text = args or click.edit(as_json(control.shown(job)["args"]), extension=".json")
    if text is None:
        raise failure("nothing was changed", FAILED)
    with misuse():
        made = operator(control).edit(found, restored(json.loads(text), found["args"]))
    control.write({"id": made}, [{"id": made}])


def verb(name: str, doc: str, *more: Callable[..., Any], argument: Any = None) -> None:
    """Make the command of a verb of the Operator."""

    def command(ctx: click.Context, /, **given: Any) -> None:
        change(ctx, "move" if name == "priority" else name.replace("-", "_"), **given)

    command.__doc__ = doc
    made: Any = click.pass_context(command)
    for one in (
        *(json_option, yes_option, dry_run_option, *more, which),
        option("--limit", type=count, default=MOST, help="Not more than this."),
        click.argument("job", nargs=-1),
        *([argument] if argument else []),
    ):
        made = one(made)
    jobs.command(name)(made)


NAMED = """

    Name them, or say which: by --where and the like. With - for JOB, ids are the first words of
    the lines on stdin. Exits 1 if none could be, 6 if only some.
    """
spread = option("--spread", type=duration, help="Over this time, evenly.")
verb("retry", "Make jobs that failed or were cancelled ready again; past runs are kept." + NAMED,
     spread)  # fmt: skip
verb("cancel", "Cancel jobs that have not ended; running ones are told to stop." + NAMED,
     option("--reason", help="Why, for people."))  # fmt: skip
verb("discard", "Make failed jobs cancelled: nobody means to retry them." + NAMED)
verb("delete", "Remove jobs that do not run, with their runs and lines." + NAMED)
verb("run-now", "Make scheduled jobs due now." + NAMED)
verb("move", "Put jobs that have not started into another queue." + NAMED,
     option("--to", metavar="QUEUE", required=True, help="That queue."))  # fmt: skip
verb("priority", "Give jobs that have not started another priority, -100 to 100." + NAMED,
     argument=click.argument("number", type=click.IntRange(-100, 100)))  # fmt: skip


def change(ctx: click.Context, name: str, **given: Any) -> None:
    """Change those of some jobs that are in a state for it, and say what became of each."""
    control: Control = ctx.obj
    is_trial, words = given.pop("dry_run"), [word for word in given["job"] if word != "-"]
    is_piped = len(words) < len(given["job"])
    if is_piped:
        words += [line.split()[0] for line in sys.stdin if line.strip()]
    is_described = any(given[name] for name in ("state", "queue", "task", "where"))
    if bool(given["job"]) == is_described:
        raise click.UsageError("name jobs, or say which: by --where, --state, --queue or --task")
    search, how = search_of(given), how_of(given)
    with misuse():
        ids = list(dict.fromkeys(UUID(word) for word in words))
    with control.reports(begun=True) as reports:
        if is_described:
            search.states &= set(STATES[name])
            ids = search.find(reports, given["limit"]).ids
        found = reports.states(ids)
    able = [job for job in ids if found.get(job) in STATES[name]]
    is_bulk = is_piped or len(ids) > 1 or is_described
    if able and is_bulk and not (is_trial or given["yes"]):
        confirm(f"{ctx.info_name} {len(able)} jobs?")
    with misuse():
        done = able if is_trial or not able else operator(control).change(
            name, able, search.text, how
        ).ids  # fmt: skip
    report(ctx, ids, done, found, is_trial)


def how_of(given: dict[str, Any]) -> dict[str, Any]:
    """Return what a verb takes beside the jobs."""
    told = {"queue": given.get("to"), "priority": given.get("number")}
    told |= {"spread": given.get("spread"), "reason": given.get("reason")}
    return {name: value for name, value in told.items() if value is not None}


def report(
    ctx: click.Context,
    ids: Sequence[UUID],
    done: Sequence[UUID],
    found: dict[UUID, str],
    is_trial: bool,
) -> None:
    """Write which jobs were changed, say of the others why not, and end the command."""
    refused = {job: found.get(job, "unknown") for job in ids if job not in set(done)}
    for job, state in refused.items():
        click.echo(f"job {job} is {state}", err=True)
    document = {"done": list(done), "refused": {str(job): refused[job] for job in refused}}
    ctx.obj.write(document, [{"id": job} for job in done])
    would = "would " if is_trial else ""
    click.echo(f"{would}{ctx.info_name} {len(done)} of {len(ids)} jobs", err=True)
    if not done:
        ctx.exit(FAILED if found else NOTHING)
    ctx.exit(IN_PART if refused else 0)
