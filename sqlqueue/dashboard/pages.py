"""The pages: each reads what it shows in one transaction, and changes nothing."""

import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from itertools import islice
from time import monotonic
from typing import Any
from uuid import UUID

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse

from sqlqueue.dashboard.app import SPANS, Site, access_of, site_of, span_name
from sqlqueue.dashboard.hub import EVERY
from sqlqueue.metrics import TYPE
from sqlqueue.metrics import page as metrics
from sqlqueue.reports import LEVELS, Reports, Row
from sqlqueue.reports.search import STATES, Search, parse
from sqlqueue.reports.verbs import STATES as ACTS
from sqlqueue.reports.written import as_json
from sqlqueue.schedule import Schedule

LIST = 50  # jobs on a page
TABS = ("scheduled", "waiting", "ready", "running", "retrying", "succeeded", "failed",
        "cancelled", "expired")  # fmt: skip


def shared(page: Callable[[Request], Response]) -> Callable[[Request], Response]:
    """Have those who watch the same page share what is read for it: once a second for all."""

    def answer(request: Request) -> Response:
        if "x-live" not in request.headers:
            return page(request)
        site, theme = site_of(request), request.cookies.get("theme", "")
        key = (str(request.url), access_of(request), theme)
        with site.lock:  # the others wait here for the first
            now = monotonic()
            site.kept = {one: had for one, had in site.kept.items() if now - had[0] <= EVERY}
            if key not in site.kept:
                site.kept[key] = (now, page(request))
            return site.kept[key][1]

    return answer


def overview(request: Request) -> Response:
    """Show how it goes, and what needs attention."""
    site, span = site_of(request), SPANS[span_name(request)]
    with site.reading() as reports:
        found = {
            "totals": reports.totals(),
            "flow": reports.flow(span),
            "depths": reports.depths(span),
            "attention": [row for row in reports.health() if row["level"] in ("warn", "error")],
            "failures": [row for row in reports.failures() if row["muted_until"] is None][:5],
        }
    return site.page(request, "overview.html", **found)


def jobs(request: Request) -> Response:
    """Show the jobs that a search finds."""
    site, access = site_of(request), access_of(request)
    search, before = parse(request.query_params.get("q", "")), _uuid(request, "before")
    with site.reading() as reports:
        found = search.find(reports, LIST + 1, before)
        cards = [site.shown(row, access) for row in reports.cards(found.ids[:LIST])]
    return site.page(
        request, "jobs.html", jobs=cards, search=search, tabs=TABS, acts=ACTS,
        more=found.ids[LIST - 1] if len(found.ids) > LIST else None,
        looked_back_to=found.looked_back_to, compact="compact" in request.query_params,
        with_line="line" in request.query_params, tab=_tab(search), tab_search=tab_search,
    )  # fmt: skip


def tab_search(tab: str) -> str:
    """Return the search of a tab."""
    if tab == "retrying":
        return "state:scheduled reason:retry"
    return f"state:{tab}" if tab in STATES else ""


def _tab(search: Search) -> str:
    return next((tab for tab in TABS if tab_search(tab) in search.text and tab != "all"), "all")


def job(request: Request) -> Response:
    """Show all of a job."""
    site, access = site_of(request), access_of(request)
    with site.reading() as reports:
        found = _job(request, reports)
        run, level = request.query_params.get("run", ""), request.query_params.get("level", "")
        logs = reports.logs(
            found["id"], int(run) if run.isdigit() and len(run) < 9 else None,
            level if level in LEVELS else None,
        )  # fmt: skip
        why = reports.why(found["id"]) if found["ended_at"] is None else []
        alike = [row for row in reports.failures() if row["fingerprint"] == found["fingerprint"]]
    task = found["task"]
    runs = [site.shown(one, access, task) for one in found["runs"]]
    return site.page(
        request, "job.html", job=site.shown(found, access) | {"runs": runs}, why=why,
        logs=logs if access.sees_args else [], alike=alike[0] if alike else None, levels=LEVELS,
        acts=ACTS, timeline=_timeline(found), copies=_copies(site.shown(found, access)),
    )  # fmt: skip


def _job(request: Request, reports: Reports) -> Row:
    try:
        found = reports.job(UUID(request.path_params["job"]))
    except ValueError:
        found = None
    if found is None:
        raise HTTPException(404, "There is no such job.")
    return found


def _timeline(found: Row) -> dict[str, Any]:
    now = datetime.now(UTC)
    runs = [
        (one["started_at"].timestamp(), (one["ended_at"] or now).timestamp(), one["outcome"],
         f"run {one['run']}: {one['outcome']}")
        for one in found["runs"]
        if one["started_at"]
    ]  # fmt: skip
    ends = [found["created_at"].timestamp(), *(one[1] for one in runs)]
    return {"runs": runs, "first": ends[0], "last": max(ends)}


def _copies(found: Row) -> dict[str, str]:
    """Return the call as a command, in Python and in SQL."""
    args = json.dumps(found["args"], ensure_ascii=False)
    quoted = args.replace("'", "''")
    shell = args.replace("'", "'\\''")
    return {
        "command": f"echo '{shell}' | sqlqueue enqueue {found['task']} --args -",
        "Python": f'queue.send("{found["task"]}", **{found["args"]!r})',
        "SQL": f"select sqlqueue.enqueue('{found['task']}', '{quoted}')",
    }


def document_of(request: Request) -> Response:
    """Send the arguments, the result or the logs of a job as a file."""
    site, access, what = site_of(request), access_of(request), request.path_params["what"]
    with site.reading() as reports:
        found = _job(request, reports)
        rows = reports.logs(found["id"], None, None)
    if not access.sees_args or what not in ("args", "result", "logs"):
        raise HTTPException(403, "You may not see that.")
    text = as_json(rows if what == "logs" else site.shown(found, access)[what])
    name = f"{found['id']}-{what}.json"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(text, media_type="application/json", headers=headers)


def logs(request: Request) -> Response:
    """Show what the jobs of a search logged, by time."""
    site, access = site_of(request), access_of(request)
    if not access.sees_args:
        raise HTTPException(403, "You may not see logs.")
    search, level = parse(request.query_params.get("q", "")), request.query_params.get("level")
    with site.reading() as reports:
        ids = search.find(reports, LIST, _uuid(request, "before")).ids
        lines = reports.lines(ids, level if level in LEVELS else None)
    return site.page(
        request, "logs.html", lines=lines, search=search, levels=LEVELS, number=len(ids)
    )


def _uuid(request: Request, name: str) -> UUID | None:
    try:
        return UUID(request.query_params[name]) if name in request.query_params else None
    except ValueError as error:
        raise HTTPException(400, f"{name} is no id") from error


def listing(template: str, read: Callable[[Reports], Any]) -> Callable[[Request], Response]:
    """Make the page of a report whose rows are all shown."""

    def page(request: Request) -> Response:
        site = site_of(request)
        with site.reading() as reports:
            rows = read(reports)
        return site.page(request, template, rows=rows)

    return page


def failures(request: Request) -> Response:
    """Show failed jobs by cause."""
    site, access = site_of(request), access_of(request)
    with site.reading() as reports:
        rows = reports.failures()
    if not access.sees_args:
        rows = [row | {"sample_error": None} for row in rows]
    return site.page(request, "failures.html", rows=rows)


def tasks(request: Request) -> Response:
    """Show the tasks, with their signatures where the application is known."""
    site = site_of(request)
    with site.reading() as reports:
        rows = reports.tasks()
    known = {name: str(task.__signature__) if hasattr(task, "__signature__") else ""
             for name, task in site.queue.tasks.items()}  # fmt: skip
    return site.page(request, "tasks.html", rows=rows, signatures=known)


def schedules(request: Request) -> Response:
    """Show the schedules and their next instants."""
    site = site_of(request)
    with site.reading() as reports:
        rows, now = reports.schedules(), reports.now()
    for row in rows:
        when = Schedule(cron=row["cron"], every=row["every"], tz=row["tz"])
        row["next"] = list(islice(when.after(now), 3)) if row["is_enabled"] else []
    return site.page(request, "schedules.html", rows=rows)


def system(request: Request) -> Response:
    """Show health, storage and what operators did."""
    site = site_of(request)
    with site.reading() as reports:
        found = {
            "health": reports.health(),
            "storage": reports.storage(),
            "actions": reports.actions(),
        }
    told = as_json({"health": found["health"], "storage": found["storage"]})
    return site.page(request, "system.html", diagnosis=told, **found)


def theme(request: Request) -> Response:
    """Keep the choice of colours in a cookie, and go back."""
    name = request.path_params["name"]
    root = request.scope.get("root_path", "").rstrip("/")
    back = request.query_params.get("back", "")
    place = f"{root}{back}" if back.startswith("/") and not back.startswith("//") else f"{root}/"
    response = RedirectResponse(place, 303)
    if name in ("light", "dark"):
        response.set_cookie("theme", name, 31_536_000, samesite="strict", httponly=True)
    else:
        response.delete_cookie("theme")
    return response


# What programs ask for


def prometheus(request: Request) -> Response:
    """Show the metrics of the database."""
    with site_of(request).reading() as reports:
        return PlainTextResponse(metrics(reports), media_type=TYPE)


async def snapshot(request: Request) -> Response:
    """Return the live snapshot; nothing, if it is the one that is known."""
    told, tag = await site_of(request).hub.snapshot()
    headers = {"ETag": f'"{tag}"'}
    if request.headers.get("if-none-match") == f'"{tag}"':
        return Response(status_code=304, headers=headers)
    return Response(told, media_type="application/json", headers=headers)


async def events(request: Request) -> Response:
    """Tell, for as long as it is listened to, which topics have changed."""
    if request.scope.get("wsgi_environ") is not None or "wsgi" in str(request.scope.get("server")):
        return Response(status_code=204)  # it would hold a thread: pages poll then
    return StreamingResponse(
        _stream(site_of(request), request), media_type="text/event-stream",
        headers={"X-Accel-Buffering": "no"},
    )  # fmt: skip


async def _stream(site: Site, request: Request) -> AsyncIterator[str]:
    async for event in site.hub.events():
        if await request.is_disconnected():
            return
        yield event


PAGES: dict[str, Callable[..., Any]] = {
    "/": shared(overview),
    "/jobs": shared(jobs),
    "/jobs/{job}": shared(job),
    "/jobs/{job}/{what}.json": document_of,
    "/logs": shared(logs),
    "/failures": shared(failures),
    "/queues": shared(listing("queues.html", Reports.queues)),
    "/workers": shared(listing("workers.html", Reports.workers)),
    "/tasks": shared(tasks),
    "/schedules": shared(schedules),
    "/system": shared(system),
    "/theme/{name}": theme,
    "/metrics": prometheus,
    "/snapshot": snapshot,
    "/events": events,
}
