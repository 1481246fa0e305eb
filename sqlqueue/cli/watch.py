"""The commands that say how it goes: why, stats, top, sql, health, doctor."""

import csv
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import UUID

import click
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from sqlalchemy import text

from sqlqueue.cli.shared import (
    FAILED,
    NOTHING,
    duration,
    failure,
    json_option,
    option,
    watched,
)
from sqlqueue.reports import Reports
from sqlqueue.reports.control import Control
from sqlqueue.reports.search import parse
from sqlqueue.reports.written import as_table

EXACT = """
select queue, state, count(*) as jobs from (
    select queue, 'ready' as state from sqlqueue.ready
    union all select queue, 'waiting' from sqlqueue.waiting
    union all select queue, 'scheduled' from sqlqueue.scheduled
    union all select queue, 'running' from sqlqueue.lease
) as live group by queue, state order by queue, state
"""


@click.command()
@click.argument("job", type=click.UUID)
@json_option
@click.pass_obj
def why(control: Control, job: UUID) -> None:
    """Say why a job does not run."""
    with control.reports() as reports:
        rows = reports.why(job)
    if rows[-1]["reason"] == "unknown":
        raise failure(f"job {job} not found: {rows[-1]['hint']}", NOTHING)
    if "json" in control.given:
        return control.write(rows, rows)
    answer = next(row for row in rows if not row["is_ok"])
    click.echo(f"{answer['reason']}: {answer['detail']}")
    if answer["hint"]:
        click.echo(f"  {answer['hint']}")
    return None


@click.command()
@option("--by", type=click.Choice(["queue", "task"]), default="queue", help="A line for each.")
@option("--exact", is_flag=True, help="Count all, however long it takes.")
@option("--watch", type=duration, help="Write it again at this interval, until Ctrl-C.")
@option("--prometheus", is_flag=True, help="As a page of metrics.")
@json_option
@click.pass_obj
def stats(control: Control, /, by: str, exact: bool, watch: Any, prometheus: bool) -> None:
    """Write how many jobs there are, and how they went."""
    if prometheus:
        from sqlqueue.metrics import page

        with control.reports() as reports:
            return click.echo(page(reports), nl=False)
    read = Reports.queues if by == "queue" else Reports.tasks

    def rows() -> list[dict[str, Any]]:
        with control.reports() as reports:
            return reports.rows(EXACT) if exact else read(reports)

    return watched(control, rows, watch)


@click.command()
@option("--for", type=duration, help="End after this; else with Ctrl-C.")
@click.pass_obj
def top(control: Control, /, **given: Any) -> None:
    """Show totals, queues, running jobs and the last failures, each second."""
    lasts = given["for"]
    ends_at = time.monotonic() + lasts.total_seconds() if lasts else float("inf")
    console = Console()
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while time.monotonic() < ends_at:
            with control.reports(begun=True) as reports:
                live.update(_screen(reports), refresh=True)
            time.sleep(min(1.0, max(ends_at - time.monotonic(), 0)))


def _screen(reports: Reports) -> Group:
    totals = reports.totals()
    line = "  ".join(f"{name} {value}" for name, value in totals["overview"].items())
    names = ("queue", "ready", "running", "failed", "out_1m", "oldest_wait", "workers")
    queues = [{name: row[name] for name in names} for row in totals["queues"][:20]]
    running = reports.jobs(parse("state:running").find(reports, 15).ids)
    shown = ("id", "task", "queue", "run", "waited", "ran")
    failed = ("jobs", "task", "error_type", "source", "last_at")
    causes = [{name: row[name] for name in failed} for row in reports.failures()[:8]]
    parts: list[Any] = [Text(f"{totals['at'].astimezone(UTC):%H:%M:%S} UTC  {line}", "bold")]
    for title, rows in (
        ("queues", queues),
        ("running", [{name: row[name] for name in shown} for row in running]),
        ("failures", causes),
    ):
        parts += [Text(f"\n{title}", "bold"), as_table(rows) if rows else Text("none")]
    return Group(*parts)


# SQL


def canned() -> dict[str, str]:
    """Return the queries that come with the package, by name."""
    folder = files("sqlqueue") / "reports" / "queries"
    found = [one for one in folder.iterdir() if one.name.endswith(".sql")]
    return {one.name.removesuffix(".sql"): one.read_text("utf-8") for one in sorted(found, key=str)}


@click.command()
@click.argument("query", metavar="NAME|QUERY", required=False)
@option("-f", "--file", type=click.Path(path_type=Path, exists=True), help="Read it from here.")
@option("--list", is_flag=True, help="Write the names of the queries there are.")
@option("--csv", is_flag=True, help="Write comma-separated values.")
@json_option
@click.pass_obj
def sql(control: Control, /, query: str | None, file: Path | None, **given: Any) -> None:
    """Run a query that comes with sqlqueue, or one of your own; read-only."""
    known = canned()
    if given["list"]:
        rows = [{"name": name, "says": text.splitlines()[0].removeprefix("-- ")}
                for name, text in known.items()]  # fmt: skip
        return control.write(rows, rows)
    if (query is None) == (file is None):
        raise click.UsageError("give a name, a query or -f FILE; --list writes the names")
    statement = file.read_text("utf-8") if file else known.get(query or "", query or "")
    with control.reports(begun=True) as reports:
        reports.conn.execute(text("set transaction read only"))
        rows = reports.rows(statement.replace(":", r"\:"))
    if given["csv"]:
        out = StringIO()
        writer = csv.DictWriter(out, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
        return click.echo(out.getvalue(), nl=False)
    return control.write(rows, rows)


# Health


@click.command()
@click.argument("what", type=click.Choice(["live", "ready"]), default="ready")
@option("--max-wait", type=duration, help="Fail if a job at the head of a queue waits longer.")
@click.pass_obj
def health(control: Control, what: str, max_wait: timedelta | None) -> None:
    """Say in its exit code whether the database answers (live), and jobs can be run (ready)."""
    with control.reports() as reports:
        reports.now()
        if what == "live":
            return
        workers = [row for row in reports.workers() if row["liveness"] in ("alive", "late")]
        waits = [row["oldest_wait"] for row in reports.queues() if row["oldest_wait"]]
    if not workers:
        raise failure("no live worker", FAILED)
    if max_wait is not None and waits and max(waits) > max_wait:
        raise failure(f"a job has waited for {max(waits)}", FAILED)
    click.echo(f"{len(workers)} workers", err=True)


def client_checks(control: Control) -> list[tuple[str, Callable[[Reports], tuple[str, str, str]]]]:
    """Return the checks that only a client can make: name, and what finds level, value, detail."""

    def latency(reports: Reports) -> tuple[str, str, str]:
        began = time.monotonic()
        reports.now()
        took = (time.monotonic() - began) * 1000
        return "ok" if took < 50 else "warn", f"{took:.1f} ms", "for one round trip"

    def clocks(reports: Reports) -> tuple[str, str, str]:
        off = abs((reports.now() - datetime.now(UTC)).total_seconds())
        return "ok" if off < 2 else "warn", f"{off:.3f} s", "between this clock and the server's"

    def schema(reports: Reports) -> tuple[str, str, str]:
        from sqlqueue.integrations.alembic import current, head

        found = current(control.queue.engine, reports.schema)
        newest = head() or ""
        level = "ok" if found == newest else "error" if (found or "") < newest else "warn"
        return level, str(found), f"this release is made for {newest}: sqlqueue migrate"

    def listening(reports: Reports) -> tuple[str, str, str]:
        with control.queue.engine.connect() as conn:
            driver: Any = conn.connection.dbapi_connection
            driver.autocommit = True
            driver.execute("listen sqlqueue_doctor")
            driver.execute("notify sqlqueue_doctor")
            heard = list(driver.notifies(timeout=1, stop_after=1))
            driver.execute("unlisten sqlqueue_doctor")
            conn.invalidate()
        said = "notifications come back" if heard else "a pooler? workers poll"
        return ("ok" if heard else "warn"), "heard" if heard else "deaf", said

    def plan(reports: Reports) -> tuple[str, str, str]:
        sql = "explain select ctid from sqlqueue.ready where queue = 'default' and is_suspect ="
        sql += " false and priority = 0 and seq > 0 order by seq limit 20"
        reports.rows("select set_config('enable_seqscan', 'off', false)")
        lines = " ".join(str(row["QUERY PLAN"]) for row in reports.rows(sql))
        is_good = "ready_claim" in lines or "_queue_is_suspect_priority_seq_idx" in lines
        return "ok" if is_good else "error", lines[:60], "the plan of a claim uses ready_claim"

    def rights(reports: Reports) -> tuple[str, str, str]:
        sql = "select has_schema_privilege(:schema, 'usage') as uses, current_user as me"
        (row,) = reports.rows(sql, schema=reports.schema)
        return ("ok" if row["uses"] else "error"), row["me"], "may use the schema"

    return [("latency", latency), ("clocks", clocks), ("schema", schema), ("listen", listening),
            ("claim plan", plan), ("rights", rights)]  # fmt: skip


def invariants(reports: Reports) -> list[dict[str, Any]]:
    """Check what must hold at every commit, a row for each invariant; reads all jobs."""
    from sqlqueue.integrations.alembic import folder

    script = (folder() / "invariants.sql").read_text("utf-8")
    found = reports.rows(script.replace(":", r"\:"))
    level = "error" if found else "ok"
    detail = "; ".join(str(row) for row in found[:3]) or "no job breaks an invariant"
    return [{"name": "invariants", "level": level, "value": str(len(found)), "detail": detail,
             "fix": None}]  # fmt: skip


SAFE = ("select sqlqueue.tidy()", "vacuum ")  # what --fix runs


@click.command()
@option("--fix", is_flag=True, help="Run the fixes that cannot hurt, and look again.")
@option("--deep", is_flag=True, help="Check the invariants, too; reads all jobs.")
@option("--strict", is_flag=True, help="Exit 1 for warnings, too.")
@option("--only", multiple=True, metavar="CHECK", help="Only this check; may be repeated.")
@option("--list", is_flag=True, help="Write the names of the checks.")
@json_option
@click.pass_context
def doctor(ctx: click.Context, /, fix: bool, deep: bool, **given: Any) -> None:
    """Look for what is not well, and say what helps.

    Exits 1 if there is an error.
    """
    control: Control = ctx.obj
    rows = _examine(control, deep)
    if fix and _fix(control, rows):
        rows = _examine(control, deep)
    names = [row["name"] for row in rows]
    if unknown := set(given["only"]) - set(names):
        raise click.UsageError(f"there is no check {min(unknown)}: {', '.join(names)}")
    if given["list"]:
        found = [{"name": name} for name in names]
        control.write(found, found)
        ctx.exit(0)
    rows = [row for row in rows if not given["only"] or row["name"] in given["only"]]
    control.write(rows, [{name: row[name] for name in _COLUMNS} for row in rows])
    bad = ("error", "warn", "unknown") if given["strict"] else ("error",)
    ctx.exit(FAILED if any(row["level"] in bad for row in rows) else 0)


_COLUMNS = ("level", "name", "value", "detail", "fix")


def _examine(control: Control, deep: bool) -> list[dict[str, Any]]:
    with control.reports() as reports:
        rows = []
        for name, look in client_checks(control):
            level, found, detail = look(reports)
            rows.append(dict(zip(_COLUMNS, (level, name, found, detail, None), strict=True)))
        return rows + reports.health() + (invariants(reports) if deep else [])


def _fix(control: Control, rows: Sequence[dict[str, Any]]) -> bool:
    """Run what is safe among the fixes of what is not well; return whether there was any."""
    schema = control.queue.store.schema
    safe = tuple(one.replace("sqlqueue.", f"{schema}.") for one in SAFE)
    wanted = {row["fix"] for row in rows if (row["fix"] or "").startswith(safe)}
    with control.reports() as reports:
        for statement in sorted(wanted):
            click.echo(f"runs {statement}", err=True)
            reports.conn.execute(text(statement))
    return bool(wanted)
