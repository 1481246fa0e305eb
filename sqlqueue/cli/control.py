"""The commands about queues, workers, tasks, failures and schedules."""

from itertools import islice
from typing import Any
from uuid import UUID

import click
from click import option

from sqlqueue.cli import options, words
from sqlqueue.cli.ending import NOTHING, confirm, failure
from sqlqueue.cli.jobs import change
from sqlqueue.policy import Policy
from sqlqueue.reports.control import Control, misuse
from sqlqueue.reports.search import Search
from sqlqueue.schedule import Schedule

queues = click.Group("queues", help="Look at queues; pause, limit and empty them.")
workers = click.Group("workers", help="Look at workers; have them end.")
tasks = click.Group("tasks", help="Look at tasks; pause and resume them.")
failures = click.Group("failures", help="Look at failures by cause; retry, discard, mute them.")
schedules = click.Group("schedules", help="Look at schedules; add, pause, run and remove them.")

# What there is: the rows of the view of that name


def row_of(control: Control, view: str, key: str, name: Any) -> dict[str, Any]:
    """Return the row of a view of that name. Ends the command if there is none."""
    with control.reports() as reports:
        for row in reports.view(view):
            if row[key] == name:
                return row
    raise failure(f"there is no {view.rstrip('s')} {name}", NOTHING)


def looks(group: click.Group, view: str, key: str, kind: Any = str) -> None:
    """Give a group its commands list and show."""
    thing = view.rstrip("s")

    def listed(control: Control) -> None:
        with control.reports() as reports:
            rows = reports.view(view)
        control.write(rows, rows)

    def one(control: Control, name: Any) -> None:
        row = row_of(control, view, key, name)
        pairs = [{"field": field, "value": value} for field, value in row.items()]
        control.write(row, [pair for pair in pairs if pair["value"] is not None])

    listed.__doc__ = f"Write the {view}, a line each."
    one.__doc__ = f"Write all of a {thing}."
    named = click.argument("name", metavar=thing.upper(), type=kind)
    group.command("list")(options.json(click.pass_obj(listed)))
    group.command("show")(named(options.json(click.pass_obj(one))))


def pauses(group: click.Group, view: str, key: str) -> None:
    """Give a group its commands pause and resume."""
    thing = view.rstrip("s")

    def pause(control: Control, /, name: str, **given: Any) -> None:
        if thing == "schedule":
            row_of(control, view, key, name)
        named: Any = {thing: name}
        with misuse():
            by = control.operator.actor
            control.queue.pause(**named, by=by, why=given["why"], lasts=given["for"])

    def resume(control: Control, name: str) -> None:
        row_of(control, view, key, name)
        named: Any = {thing: name}
        control.queue.resume(**named)

    pause.__doc__ = f"Start no more jobs of a {thing} until it is resumed; running ones go on."
    resume.__doc__ = f"Go on with a {thing}."
    named = click.argument("name", metavar=thing.upper())
    why = option("--why", help="Reason, for people.")
    lasts = option("--for", type=words.duration, help="Resume after this.")
    group.command("pause")(named(why(lasts(click.pass_obj(pause)))))
    group.command("resume")(named(click.pass_obj(resume)))


looks(queues, "queues", "queue")
looks(workers, "workers", "id", int)
looks(tasks, "tasks", "task")
looks(failures, "failures", "fingerprint")
looks(schedules, "schedules", "name")
pauses(queues, "queues", "queue")
pauses(tasks, "tasks", "task")
pauses(schedules, "schedules", "name")

# Queues


@queues.command()
@click.argument("queue")
@option("--concurrency", type=options.COUNT, help="Jobs that run at a time.")
@option("--concurrency-per-key", type=options.COUNT, help="Of these, with the same key.")
@option("--rate", metavar="N/DURATION", type=words.rate,
              help="Jobs started in a time, such as 100/1m.")  # fmt: skip
@option("--max-waiting", type=options.COUNT, help="More than this are refused.")
@option("--breaks-after", type=options.COUNT, help="Failures in a row after which it pauses.")
@option("--breaks-for", type=words.duration,
              help="For this long, then one job at a time is tried.")  # fmt: skip
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
@options.dry_run
@options.yes
@options.json
@click.pass_context
def purge(ctx: click.Context, /, queue: str, **given: Any) -> None:
    """Delete the jobs of a queue that have not started, the newest 10,000."""
    change(ctx, "delete", Search(f'state:scheduled,waiting,ready queue:"{queue}"'), **given)


# Workers


def told(name: str, doc: str) -> None:
    """Make a command that tells a worker something."""

    def command(control: Control, worker: int) -> None:
        if not control.operator.call("tell_worker", worker=worker, what=name):
            raise failure(f"there is no live worker {worker}", NOTHING)

    command.__doc__ = doc
    workers.command(name)(click.argument("worker", type=int)(click.pass_obj(command)))


told("drain", "Have a worker take no more jobs, and end within its grace period.")
told("stop", "Have a worker hand its jobs back, and end.")

# Failures


def of_group(name: str, doc: str) -> None:
    """Make a command for the jobs of a group of failures, or for all of them."""

    def command(ctx: click.Context, /, group: str | None, all: bool, **given: Any) -> None:
        if (group is None) != all:
            raise click.UsageError("name a group, or give --all")
        change(ctx, name, Search("state:failed" + (f" group:{group}" if group else "")), **given)

    command.__doc__ = doc
    made: Any = click.pass_context(command)
    every = option("--all", is_flag=True, help="Of all groups.")
    group = click.argument("group", required=False)
    for one in (options.json, options.yes, options.dry_run, every, group):
        made = one(made)
    failures.command(name)(made)


of_group("retry", "Retry the jobs of a group, the newest 10,000.")
of_group("discard", "Make the jobs of a group cancelled.")


@failures.command()
@click.argument("group")
@option("--for", type=words.duration, default="1d", help="For so long.")
@click.pass_obj
def mute(control: Control, /, group: str, **given: Any) -> None:
    """Say that a group needs no attention for a while."""
    row_of(control, "failures", "fingerprint", group)
    control.operator.call("mute_failures", fingerprint=group, lasts=given["for"])


# Schedules


@schedules.command("next")
@click.argument("schedule")
@option("--count", type=options.COUNT, default=5, help="So many.")
@options.json
@click.pass_obj
def next_times(control: Control, /, schedule: str, **given: Any) -> None:
    """Write the next instants of a schedule."""
    row = row_of(control, "schedules", "name", schedule)
    when = Schedule(cron=row["cron"], every=row["every"], tz=row["tz"])
    with control.reports() as reports:
        rows = [{"at": at} for at in islice(when.after(reports.now()), given["count"])]
    control.write(rows, rows)


@schedules.command("run")
@click.argument("schedule")
@click.pass_obj
def run_now(control: Control, schedule: str) -> None:
    """Enqueue the job of a schedule now; its instants stay as they are."""
    row_of(control, "schedules", "name", schedule)
    made: UUID | None = control.operator.call("run_schedule", name=schedule)
    click.echo(made)


@schedules.command()
@click.argument("name")
@click.argument("task")
@options.call
@option("--cron", help="When: a cron line, or an alias such as @hourly.")
@option("--every", type=words.duration, help="Or at this interval.")
@option("--tz", default="UTC", help="Time zone of the cron line.")
@option("--queue", help="Where its jobs go.")
@click.pass_obj
def add(control: Control, /, name: str, task: str, queue: str | None, **given: Any) -> None:
    """Add a schedule, or change it; it lives in the database."""
    with misuse():
        known = control.queue.tasks.get(task)
        args, kwargs = words.arguments(known, given.pop("arg"))
        target: Any = known or control.queue
        bound = target.using(queue=queue) if queue else target.using()
        call = bound.s(*args, **kwargs) if known else bound._call(task, args, kwargs)
        control.queue.set_schedule(name, call, Schedule(**given))


@schedules.command()
@click.argument("schedule")
@options.yes
@click.pass_obj
def remove(control: Control, schedule: str, yes: bool) -> None:
    """Remove a schedule; one that code declares comes back with its workers."""
    row_of(control, "schedules", "name", schedule)
    confirm(f"remove schedule {schedule}?", yes)
    control.operator.call("remove_schedule", name=schedule)
