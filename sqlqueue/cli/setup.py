"""The commands that set up, look after and explain an installation."""

import code
import json
import platform
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

import sqlqueue
from sqlqueue.cli.shared import (
    FAILED,
    confirm,
    dry_run_option,
    duration,
    failure,
    operator,
    option,
    yes_option,
)
from sqlqueue.reports.control import Control, misuse

TASKS = '''"""The tasks of this application. Run them: sqlqueue worker"""

import os

from sqlqueue import Queue

queue = Queue(os.environ.get("DATABASE_URL", "postgresql+psycopg:///"))


@queue.task
def greet(name: str) -> str:
    """Say hello; enqueue it: sqlqueue enqueue tasks.greet name=Ana --wait"""
    return f"Hello, {name}"
'''
PROJECT = '[tool.sqlqueue]\napp = "tasks:queue"\n'


@click.command()
@dry_run_option
def init(dry_run: bool) -> None:
    """Write a first tasks.py and its setting into this folder; overwrite nothing."""
    tasks, project = Path("tasks.py"), Path("pyproject.toml")
    known = project.read_text("utf-8") if project.exists() else ""
    if tasks.exists() or "[tool.sqlqueue]" in known:
        raise failure("nothing was written: tasks.py or [tool.sqlqueue] is here", FAILED)
    would = "would write" if dry_run else "wrote"
    if not dry_run:
        tasks.write_text(TASKS, "utf-8")
        project.write_text(f"{known}\n{PROJECT}" if known else PROJECT, "utf-8")
    click.echo(f"{would} tasks.py and [tool.sqlqueue] in pyproject.toml", err=True)
    click.echo("next: sqlqueue migrate, sqlqueue worker, sqlqueue enqueue tasks.greet name=Ana")


@click.command()
@option("--older-than", type=duration, help="Keep history for so long from now on: 30d.")
@dry_run_option
@yes_option
@click.pass_obj
def prune(control: Control, older_than: timedelta | None, dry_run: bool, yes: bool) -> None:
    """Drop the weeks of history that are past the retention, now."""
    with control.reports() as reports:
        (row,) = reports.rows(
            "select string_agg(child.relname, ', ' order by child.relname) as names"
            " from pg_inherits join pg_class as child on child.oid = inhrelid"
            " join pg_class as parent on parent.oid = inhparent, sqlqueue.setting"
            " where parent.relnamespace = to_regnamespace(:schema)"
            " and child.relname ~ '_[0-9]{8}$'"
            " and to_date(right(child.relname, 8), 'YYYYMMDD') + interval '7 days'"
            " <= now() - coalesce(cast(:older as interval), retention)",
            schema=reports.schema, older=older_than,
        )  # fmt: skip
    names = row["names"] or "nothing"
    if dry_run:
        return click.echo(f"would drop {names}; nothing was changed")
    if not yes:
        confirm(f"drop {names}?")
    if older_than is not None:
        with misuse():
            operator(control).call("set_retention", lasts=older_than)
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
            "workers": [
                {name: row[name] for name in ("id", "version", "liveness", "slots", "busy")}
                for row in reports.workers()
            ],
            "health": reports.health(),
            "storage": reports.storage(),
        }
    click.echo(json.dumps(document, indent=2, default=str))


@click.command()
@click.pass_obj
def shell(control: Control) -> None:
    """Open Python with the application's queue as `queue`."""
    with misuse():
        queue = control.loader()
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
        raise failure('install "sqlqueue[dashboard]" first', FAILED) from error
    with misuse():
        serve(control.queue, **given)
