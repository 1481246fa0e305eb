"""The commands that set up, look after and explain an installation."""

import code
import platform
import sys
from datetime import timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
from click import option
from click.shell_completion import get_completion_class

import sqlqueue
from sqlqueue.cli import options, words
from sqlqueue.cli.ending import confirm, failure
from sqlqueue.reports.control import Control, misuse
from sqlqueue.reports.written import as_json

PROJECT = '[tool.sqlqueue]\napp = "tasks:queue"\n'


@click.command()
@options.dry_run
def init(dry_run: bool) -> None:
    """Write a first tasks.py and its setting into this folder; overwrite nothing."""
    tasks, project = Path("tasks.py"), Path("pyproject.toml")
    known = project.read_text("utf-8") if project.exists() else ""
    if tasks.exists() or "[tool.sqlqueue]" in known:
        raise failure("nothing was written: tasks.py or [tool.sqlqueue] is here")
    would = "would write" if dry_run else "wrote"
    if not dry_run:
        first = files("sqlqueue.cli") / "first_tasks.txt"
        tasks.write_text(first.read_text("utf-8"), "utf-8")
        project.write_text(f"{known}\n{PROJECT}" if known else PROJECT, "utf-8")
    click.echo(f"{would} tasks.py and [tool.sqlqueue] in pyproject.toml", err=True)
    click.echo("next: sqlqueue migrate, sqlqueue worker, sqlqueue enqueue tasks.greet name=Ana")


@click.command()
@option("--older-than", type=words.duration, help="Keep history for so long from now on: 30d.")
@options.dry_run
@options.yes
@click.pass_obj
def prune(control: Control, older_than: timedelta | None, dry_run: bool, yes: bool) -> None:
    """Drop the weeks of history that are past the retention, now."""
    with control.reports() as reports:
        rows = reports.rows("select sqlqueue.past_retention(:lasts) as name", lasts=older_than)
    names = ", ".join(row["name"] for row in rows) or "nothing"
    if dry_run:
        return click.echo(f"would drop {names}; nothing was changed")
    confirm(f"drop {names}?", yes)
    if older_than is not None:
        with misuse():
            control.operator.call("set_retention", lasts=older_than)
    with control.reports() as reports:
        for row in reports.rows("select sqlqueue.tidy() as said"):
            click.echo(row["said"])
    return None


@click.command()
@click.pass_obj
def report(control: Control) -> None:
    """Write what a bug report needs: versions, settings, health; no arguments or passwords."""
    with control.reports() as reports:
        document = {
            "sqlqueue": sqlqueue.__version__,
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "settings": control.settings,
            "totals": reports.totals()["overview"],
            "workers": reports.view("workers"),
            "health": reports.view("health"),
            "storage": reports.view("storage"),
        }
    click.echo(as_json(document))


@click.command()
@click.pass_obj
def shell(control: Control) -> None:
    """Open Python with the application's queue as `queue`."""
    with misuse():
        queue = control.loaders[0]()
    found: dict[str, Any] = {"queue": queue, "Job": sqlqueue.Job, "sqlqueue": sqlqueue}
    code.interact(f"sqlqueue {sqlqueue.__version__}: queue is {queue.engine.url!r}", local=found)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Write the script that completes commands in a shell: eval "$(sqlqueue completion bash)"."""
    from sqlqueue.cli import main

    found = get_completion_class(shell)
    assert found
    click.echo(found(main, {}, "sqlqueue", "_SQLQUEUE_COMPLETE").source())


@click.command()
@option("--host", default="127.0.0.1", help="Address to listen at.")
@option("--port", type=int, default=8787, help="Port; 0 for any.")
@option("--auth", metavar="USER:PASSWORD[:ROLE]", help="Who may enter.")
@option("--role", type=click.Choice(["view", "operate", "admin"]), default="operate",
        help="Of visitors on loopback.")  # fmt: skip
@option("--read-only", is_flag=True, help="Change nothing.")
@option("--insecure", is_flag=True, help="Let anybody in who reaches it.")
@click.pass_obj
def dashboard(control: Control, /, **given: Any) -> None:
    """Serve the dashboard."""
    try:
        from sqlqueue.dashboard.serve import serve
    except ImportError as error:
        raise failure('install "sqlqueue[dashboard]" first') from error
    with misuse():
        serve(control.queue, **given)
