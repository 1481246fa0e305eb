"""The commands that say how it goes: why, stats, top, sql, health, doctor."""

import csv
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import UUID

import click
from click import option
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from sqlalchemy import text

from sqlqueue.cli import options, words
from sqlqueue.cli.ending import FAILED, NOTHING, failure
from sqlqueue.reports import Reports, Row
from sqlqueue.reports.control import Control
from sqlqueue.reports.search import Search
from sqlqueue.reports.written import as_table


@click.command()
@click.argument("job", type=click.UUID)
@options.json
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
@option("--watch", type=words.duration, help="Write it again at this interval, until Ctrl-C.")
@option("--prometheus", is_flag=True, help="As a page of metrics.")
@options.json
@click.pass_obj
def stats(control: Control, /, by: str, exact: bool, watch: Any, prometheus: bool) -> None:
    """Write how many jobs there are, and how they went."""
    if prometheus:
        from sqlqueue.metrics import page

        with control.reports() as reports:
            return click.echo(page(reports), nl=False)

    def rows() -> list[Row]:
        with control.reports() as reports:
            return reports.view("counts" if exact else f"{by}s")

    return control.watch(rows, watch)


@click.command()
@option("--for", type=words.duration, help="End after this; else with Ctrl-C.")
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
    running = reports.jobs(Search("state:running").find(reports, 15).ids)
    parts: list[Any] = [Text(f"{totals['at'].astimezone(UTC):%H:%M:%S} UTC  {line}", "bold")]
    for title, names, rows in (
        ("queues", "queue ready running failed out_1m oldest_wait workers", totals["queues"][:20]),
        ("running", "id task queue run waited ran", running),
        ("failures", "jobs task error_type source last_at", reports.view("failures", 8)),
    ):
        shown = [{name: row[name] for name in names.split()} for row in rows]
        parts += [Text(f"\n{title}", "bold"), as_table(shown) if shown else Text("none")]
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
@options.json
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
@option(
    "--max-wait", type=words.duration, help="Fail if a job at the head of a queue waits longer."
)
@click.pass_obj
def health(control: Control, what: str, max_wait: timedelta | None) -> None:
    """Say in its exit code whether the database answers (live), and jobs can be run (ready)."""
    with control.reports() as reports:
        reports.now()
        if what == "live":
            return
        workers = [row for row in reports.view("workers") if row["liveness"] in ("alive", "late")]
        waits = [row["oldest_wait"] for row in reports.view("queues") if row["oldest_wait"]]
    if not workers:
        raise failure("no live worker", FAILED)
    if max_wait is not None and waits and max(waits) > max_wait:
        raise failure(f"a job has waited for {max(waits)}", FAILED)
    click.echo(f"{len(workers)} workers", err=True)


# What doctor says of each check.
COLUMNS = ("level", "name", "value", "detail", "fix")
CLAIM = """
select ctid from sqlqueue.ready
where queue = 'default' and is_suspect = false and priority = 0 and seq > 0 order by seq limit 20
"""


def client_checks(control: Control, reports: Reports) -> Iterator[tuple[str, ...]]:
    """Make the checks that only a client can make: level, name, value and detail of each."""
    began = time.monotonic()
    off = abs((reports.now() - datetime.now(UTC)).total_seconds())
    took = (time.monotonic() - began) * 1000
    yield "ok" if took < 50 else "warn", "latency", f"{took:.1f} ms", "for one round trip"
    yield "ok" if off < 2 else "warn", "clocks", f"{off:.3f} s", "between here and the server"

    from sqlqueue.integrations.alembic import current, head

    found, newest = current(control.queue.engine, reports.schema) or "", head() or ""
    level = "ok" if found == newest else "error" if found < newest else "warn"
    yield level, "schema", found, f"this release is made for {newest}: sqlqueue migrate"

    with control.queue.engine.connect() as conn:
        driver: Any = conn.connection.dbapi_connection
        driver.autocommit = True
        driver.execute("listen sqlqueue_doctor")
        driver.execute("notify sqlqueue_doctor")
        heard = list(driver.notifies(timeout=1, stop_after=1))
        conn.invalidate()
    level, value = ("ok", "heard") if heard else ("warn", "deaf")
    yield level, "listen", value, "do notifications come back? Not by some poolers: workers poll"

    with control.reports(begun=True) as own:
        own.rows("select set_config('enable_seqscan', 'off', true)")
        plan = " ".join(str(row["QUERY PLAN"]) for row in own.rows(f"explain {CLAIM}"))
    level = "ok" if "ready_claim" in plan else "error"
    yield level, "claim plan", plan[:60], "a claim reads by the index ready_claim"

    uses = "select has_schema_privilege(:schema, 'usage') as uses, current_user as me"
    (row,) = reports.rows(uses, schema=reports.schema)
    yield "ok" if row["uses"] else "error", "rights", row["me"], "may use the schema"


def invariants(reports: Reports) -> tuple[str, ...]:
    """Check what must hold at every commit; reads all jobs."""
    from sqlqueue.integrations.alembic import folder

    script = (folder() / "invariants.sql").read_text("utf-8")
    found = reports.rows(script.replace(":", r"\:"))
    detail = "; ".join(str(row) for row in found[:3]) or "no job breaks an invariant"
    return "error" if found else "ok", "invariants", str(len(found)), detail


@click.command()
@option("--fix", is_flag=True, help="Run the fixes that cannot hurt, and look again.")
@option("--deep", is_flag=True, help="Check the invariants, too; reads all jobs.")
@option("--strict", is_flag=True, help="Exit 1 for warnings, too.")
@option("--only", multiple=True, metavar="CHECK", help="Only this check; may be repeated.")
@option("--list", is_flag=True, help="Write the names of the checks.")
@options.json
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
    control.write(rows, [{name: row[name] for name in COLUMNS} for row in rows])
    bad = ("error", "warn", "unknown") if given["strict"] else ("error",)
    ctx.exit(FAILED if any(row["level"] in bad for row in rows) else 0)


def _examine(control: Control, deep: bool) -> list[Row]:
    with control.reports() as reports:
        checks = [*client_checks(control, reports), *([invariants(reports)] if deep else [])]
        here = [dict(zip(COLUMNS, (*check, None), strict=True)) for check in checks]
        return here + reports.view("health")


def _fix(control: Control, rows: Sequence[Row]) -> bool:
    """Run what is safe among the fixes of what is not well; return whether there was any."""
    safe = ("vacuum ", f"select {control.queue.store.schema}.tidy()")
    wanted = {row["fix"] for row in rows if (row["fix"] or "").startswith(safe)}
    with control.reports() as reports:
        for statement in sorted(wanted):
            click.echo(f"runs {statement}", err=True)
            reports.conn.execute(text(statement))
    return bool(wanted)
