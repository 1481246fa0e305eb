"""The commands about jobs: look at them, retry and cancel them, one by one or by what they are."""

import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import click

from sqlqueue.cli.words import (
    FAILED,
    IN_PART,
    LIVE,
    MOST,
    NOTHING,
    RETRYABLE,
    STATES,
    confirm,
    count,
    dry_run_option,
    json_option,
    option,
    wait_for_option,
    wait_option,
    write_result,
    yes_option,
)
from sqlqueue.errors import JobNotFound
from sqlqueue.job import Job
from sqlqueue.reports import LEVELS, Control, fields, misuse


@click.group()
def jobs() -> None:
    """Look at jobs; retry and cancel them."""


state_option = option("--state", type=click.Choice(STATES), help="Only those in this state.")
queue_option = option("--queue", help="Only those of this queue.")
task_option = option(
    "--task", metavar="GLOB", help="Only of these tasks: * and ? stand for others."
)


@jobs.command("list")
@state_option
@queue_option
@task_option
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
@click.argument("job", type=click.UUID)
@option("--run", type=count, help="Of this run only.")
@option("--level", type=click.Choice(LEVELS), help="From this level on; without progress.")
@json_option
@click.pass_obj
def logs(control: Control, /, job: UUID, run: int | None, level: str | None) -> None:
    """Write what a job said in its runs: its log lines and its progress."""
    with control.reports() as reports:
        if reports.job(job) is None:
            raise JobNotFound(job)
        rows = reports.logs(job, run, level)
    control.write(rows, rows)


@jobs.command()
@click.argument("job", nargs=-1)
@state_option
@queue_option
@task_option
@dry_run_option
@yes_option
@json_option
@click.pass_context
def retry(ctx: click.Context, /, **given: Any) -> None:
    """Make jobs that failed or were cancelled ready again; past runs are kept.

    Name them, or say which: by state, queue and task. With - for JOB, ids are the first words of
    the lines on stdin. Exits 1 if none could be, 6 if only some.
    """
    change(ctx, RETRYABLE, Job.retry, **given)


@jobs.command()
@click.argument("job", nargs=-1)
@state_option
@queue_option
@task_option
@dry_run_option
@yes_option
@json_option
@click.pass_context
def cancel(ctx: click.Context, /, **given: Any) -> None:
    """Cancel jobs that have not ended; running ones are told to stop.

    Name them, or say which: by state, queue and task. With - for JOB, ids are the first words of
    the lines on stdin. Exits 1 if none could be, 6 if only some.
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
    which = {name: given[name] for name in ("state", "queue", "task")}
    is_described = any(which.values())
    if bool(given["job"]) == is_described:
        raise click.UsageError("name jobs, or say which by --state, --queue or --task")
    with misuse():
        ids = list(dict.fromkeys(UUID(word) for word in words))
    with control.reports() as reports:
        if is_described:
            rows = reports.jobs(**which, limit=MOST)
            found = {row["id"]: row["state"] for row in rows if row["state"] in states}
            ids = list(found)
        else:
            found = reports.states(ids)
    able = [job for job in ids if found.get(job) in states]
    is_bulk = is_piped or len(ids) > 1 or is_described
    if able and is_bulk and not (is_trial or given["yes"]):
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
