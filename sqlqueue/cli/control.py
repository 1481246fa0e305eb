"""The commands about queues, workers, tasks, failures and schedules."""

import getpass
from collections.abc import Callable
from itertools import islice
from typing import Any
from uuid import UUID

import click

from sqlqueue.cli.shared import (
    FAILED,
    NOTHING,
    arguments,
    confirm,
    count,
    dry_run_option,
    duration,
    failure,
    json_option,
    operator,
    option,
    rate,
    words_argument,
    yes_option,
)
from sqlqueue.policy import Policy
from sqlqueue.reports import Reports
from sqlqueue.reports.control import Control, misuse
from sqlqueue.reports.search import parse
from sqlqueue.reports.verbs import MOST
from sqlqueue.schedule import Schedule

Rows = list[dict[str, Any]]


@click.group()
def queues() -> None:
    """Look at queues; pause, limit and empty them."""


@click.group()
def workers() -> None:
    """Look at workers; have them end."""


@click.group()
def tasks() -> None:
    """Look at tasks; pause and resume them."""


@click.group()
def failures() -> None:
    """Look at failed jobs by cause; retry, discard and mute them."""


@click.group()
def schedules() -> None:
    """Look at schedules; add, pause, run and remove them."""


# What there is


def looks(group: click.Group, key: str, read: Callable[[Reports], Rows], kind: Any = None) -> None:
    """Give a group its commands list and show."""
    thing = group.name.rstrip("s") if group.name else ""

    def listed(control: Control) -> None:
        with control.reports() as reports:
            rows = read(reports)
        control.write(rows, rows)

    def one(control: Control, name: Any) -> None:
        row = found(control, read, thing, key, name)
        pairs = [{"field": field, "value": value} for field, value in row.items()]
        control.write(row, [pair for pair in pairs if pair["value"] is not None])

    listed.__doc__ = f"Write the {group.name}, a line each."
    one.__doc__ = f"Write all of a {thing}."
    group.command("list")(json_option(click.pass_obj(listed)))
    named = click.argument("name", metavar=thing.upper(), type=kind or str)
    group.command("show")(named(json_option(click.pass_obj(one))))


def found(
    control: Control, read: Callable[[Reports], Rows], thing: str, key: str, name: Any
) -> dict[str, Any]:
    """Return the row of that name. Ends the command if there is none."""
    with control.reports() as reports:
        for row in read(reports):
            if row[key] == name:
                return row
    raise failure(f"there is no {thing} {name}", NOTHING)


looks(queues, "queue", Reports.queues)
looks(workers, "id", Reports.workers, int)
looks(tasks, "task", Reports.tasks)
failures.name = "failures"
looks(failures, "fingerprint", Reports.failures)
looks(schedules, "name", Reports.schedules)

# Pausing

why_option = option("--why", help="Reason, for people.")
for_option = option("--for", type=duration, help="Resume after this.")


def pauses(group: click.Group, read: Callable[[Reports], Rows], key: str, what: str) -> None:
    """Give a group its commands pause and resume."""
    thing = group.name.rstrip("s") if group.name else ""

    def pause(control: Control, /, name: str, **given: Any) -> None:
        if thing == "schedule":
            found(control, read, thing, key, name)
        named, by = {thing: name}, getpass.getuser()
        with misuse():
            control.queue.pause(**named, by=by, why=given["why"], lasts=given["for"])

    def resume(control: Control, name: str) -> None:
        found(control, read, thing, key, name)
        control.queue.resume(**{thing: name})

    pause.__doc__ = f"Start no more jobs of a {thing} until it is resumed; running ones go on."
    resume.__doc__ = f"Go on with a {thing}."
    argument = click.argument("name", metavar=thing.upper())
    group.command("pause")(argument(why_option(for_option(click.pass_obj(pause)))))
    group.command("resume")(argument(click.pass_obj(resume)))


pauses(queues, Reports.queues, "queue", "queue")
pauses(tasks, Reports.tasks, "task", "task")
pauses(schedules, Reports.schedules, "name", "schedule")


# Queues


@queues.command()
@click.argument("queue")
@option("--concurrency", type=count, help="Jobs that run at a time.")
@option("--concurrency-per-key", type=count, help="Of these, with the same key.")
@option("--rate", metavar="N/DURATION", type=rate, help="Jobs started in a time, such as 100/1m.")
@option("--max-waiting", type=count, help="More than this are refused.")
@option("--breaks-after", type=count, help="Failures in a row after which it pauses.")
@option("--breaks-for", type=duration, help="For this long, then one job at a time is tried.")
@option("--none", is_flag=True, help="Take all rules away.")
@click.pass_obj
def limit(control: Control, /, queue: str, none: bool, **given: Any) -> None:
    """Set the rules of a queue: those not given are none."""
    if none == any(given.values()):
        raise click.UsageError("give rules, or --none")
    with misuse():
        control.queue.set_policy(None if none else Policy(**given), queue=queue)


@queues.command()
@click.argument("queue")
@dry_run_option
@yes_option
@click.pass_obj
def purge(control: Control, queue: str, dry_run: bool, yes: bool) -> None:
    """Delete the jobs of a queue that have not started, the newest 10,000."""
    bulk(control, "delete", f'state:scheduled,waiting,ready queue:"{queue}"', dry_run, yes)


def bulk(control: Control, verb: str, where: str, dry_run: bool, yes: bool) -> None:
    """Do a verb to all jobs that a search finds, having asked; say to how many."""
    with control.reports(begun=True) as reports:
        ids = parse(where).find(reports, MOST).ids
    if not ids:
        raise failure("nothing matched", NOTHING)
    if dry_run:
        return click.echo(f"would {verb} {len(ids)} jobs; nothing was changed")
    if not yes:
        confirm(f"{verb} {len(ids)} jobs?")
    done = operator(control).change(verb, ids, where)
    click.echo(f"{verb}: {len(done.ids)} done, {len(done.skipped)} left", err=True)
    if not done.ids:
        raise click.exceptions.Exit(FAILED)
    return None


# Workers


def told(name: str, doc: str) -> None:
    """Make a command that tells a worker something."""

    def command(control: Control, worker: int) -> None:
        if not operator(control).call("tell_worker", worker=worker, what=name):
            raise failure(f"there is no live worker {worker}", NOTHING)

    command.__doc__ = doc
    workers.command(name)(click.argument("worker", type=int)(click.pass_obj(command)))


told("drain", "Have a worker take no more jobs, and end within its grace period.")
told("stop", "Have a worker hand its jobs back, and end.")

# Failures


def of_group(name: str, doc: str) -> None:
    """Make a command for the jobs of a group of failures, or for all of them."""

    def command(control: Control, group: str | None, all: bool, dry_run: bool, yes: bool) -> None:
        if (group is None) != all:
            raise click.UsageError("name a group, or give --all")
        where = "state:failed" + (f" group:{group}" if group else "")
        bulk(control, name, where, dry_run, yes)

    command.__doc__ = doc
    made: Any = click.pass_obj(command)
    for one in (
        *(yes_option, dry_run_option, option("--all", is_flag=True, help="Of all groups.")),
        click.argument("group", required=False),
    ):
        made = one(made)
    failures.command(name)(made)


of_group("retry", "Retry the jobs of a group, the newest 10,000.")
of_group("discard", "Make the jobs of a group cancelled.")


@failures.command()
@click.argument("group")
@option("--for", type=duration, default="1d", help="For so long.")
@click.pass_obj
def mute(control: Control, /, group: str, **given: Any) -> None:
    """Say that a group needs no attention for a while."""
    found(control, Reports.failures, "failure", "fingerprint", group)
    operator(control).call("mute_failures", fingerprint=group, lasts=given["for"])


# Schedules


@schedules.command("next")
@click.argument("schedule")
@option("--count", type=count, default=5, help="So many.")
@json_option
@click.pass_obj
def next_times(control: Control, /, schedule: str, **given: Any) -> None:
    """Write the next instants of a schedule."""
    row = found(control, Reports.schedules, "schedule", "name", schedule)
    when = Schedule(cron=row["cron"], every=row["every"], tz=row["tz"])
    with control.reports() as reports:
        rows = [{"at": at} for at in islice(when.after(reports.now()), given["count"])]
    control.write(rows, rows)


@schedules.command("run")
@click.argument("schedule")
@click.pass_obj
def run_now(control: Control, schedule: str) -> None:
    """Enqueue the job of a schedule now; its instants stay as they are."""
    found(control, Reports.schedules, "schedule", "name", schedule)
    made: UUID | None = operator(control).call("run_schedule", name=schedule)
    click.echo(made)


@schedules.command()
@click.argument("name")
@click.argument("task")
@words_argument
@option("--cron", help="When: a cron line, or an alias such as @hourly.")
@option("--every", type=duration, help="Or at this interval.")
@option("--tz", default="UTC", help="Time zone of the cron line.")
@option("--queue", help="Where its jobs go.")
@click.pass_obj
def add(control: Control, /, name: str, task: str, words: tuple[str, ...], **given: Any) -> None:
    """Add a schedule, or change it; it lives in the database."""
    with misuse():
        known = control.queue.tasks.get(task)
        args, kwargs = arguments(known, words, None)
        target: Any = known or control.queue
        bound = target.using(**({"queue": given["queue"]} if given["queue"] else {}))
        call = bound.s(*args, **kwargs) if known else bound._call(task, args, kwargs)
        when = Schedule(cron=given["cron"], every=given["every"], tz=given["tz"])
        control.queue.set_schedule(name, call, when)


@schedules.command()
@click.argument("schedule")
@yes_option
@click.pass_obj
def remove(control: Control, schedule: str, yes: bool) -> None:
    """Remove a schedule; one that code declares comes back with its workers."""
    found(control, Reports.schedules, "schedule", "name", schedule)
    if not yes:
        confirm(f"remove schedule {schedule}?")
    operator(control).call("remove_schedule", name=schedule)
