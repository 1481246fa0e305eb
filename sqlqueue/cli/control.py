"""The commands about queues and schedules."""

import getpass
from itertools import islice
from typing import Any

import click

from sqlqueue.cli.words import NOTHING, count, duration, failure, json_option, option, rate
from sqlqueue.policy import Policy
from sqlqueue.reports import Control, misuse
from sqlqueue.schedule import Schedule


@click.group()
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


@click.group()
def schedules() -> None:
    """Look at schedules; pause, resume and run them."""


@schedules.command("list")
@json_option
@click.pass_obj
def list_schedules(control: Control) -> None:
    """Write the schedules, the next to be fired first."""
    with control.reports() as reports:
        rows = reports.schedules()
    control.write(rows, rows)


@schedules.command("next")
@click.argument("schedule")
@option("--count", type=count, default=5, help="So many.")
@json_option
@click.pass_obj
def next_times(control: Control, /, schedule: str, **given: Any) -> None:
    """Write the next instants of a schedule."""
    row = found(control, schedule)
    when = Schedule(cron=row["cron"], every=row["every"], tz=row["tz"])
    with control.reports() as reports:
        rows = [{"at": at} for at in islice(when.after(reports.now()), given["count"])]
    control.write(rows, rows)


@schedules.command("run")
@click.argument("schedule")
@click.pass_obj
def run_now(control: Control, schedule: str) -> None:
    """Enqueue the job of a schedule now; its instants stay as they are."""
    found(control, schedule)
    with control.reports() as reports:
        click.echo(reports.run_schedule(schedule))


@schedules.command("pause")
@click.argument("schedule")
@option("--why", help="Reason, for people.")
@option("--for", type=duration, help="Resume after this.")
@click.pass_obj
def pause_schedule(control: Control, /, schedule: str, **given: Any) -> None:
    """Fire a schedule no more until it is resumed."""
    found(control, schedule)
    by, why, lasts = getpass.getuser(), given["why"], given["for"]
    control.queue.pause(schedule=schedule, by=by, why=why, lasts=lasts)


@schedules.command("resume")
@click.argument("schedule")
@click.pass_obj
def resume_schedule(control: Control, schedule: str) -> None:
    """Fire a schedule again, from now on."""
    found(control, schedule)
    control.queue.resume(schedule=schedule)


def found(control: Control, schedule: str) -> dict[str, Any]:
    """Return the row of a schedule. Ends the command if there is none."""
    with control.reports() as reports:
        for row in reports.schedules():
            if row["name"] == schedule:
                return row
    raise failure(f"there is no schedule {schedule}", NOTHING)
