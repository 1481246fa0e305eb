"""The pages: each reads what it shows in one transaction, and changes nothing."""

from collections.abc import Callable
from time import monotonic
from typing import Any
from uuid import UUID

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from sqlqueue.dashboard.app import SPANS, Visit, number
from sqlqueue.dashboard.hub import EVERY
from sqlqueue.metrics import TYPE
from sqlqueue.metrics import page as metrics
from sqlqueue.reports import LEVELS, LOG_LINES, Reports, Row
from sqlqueue.reports.search import Search
from sqlqueue.reports.verbs import STATES as ACTS
from sqlqueue.reports.written import as_json

LIST = 50  # jobs on a page
MANY = 500  # rows of another view
VIEWS = ("failures", "queues", "workers", "tasks", "schedules")
NAMES = "scheduled waiting ready running retrying succeeded failed cancelled expired"
TABS = {name: f"state:{name}" for name in NAMES.split()}  # the search of each
TABS["retrying"] = "state:scheduled reason:retry"


def html(template: str, read: Callable[[Visit, Reports], Row]) -> Callable[[Request], Response]:
    """Make a page. Those who watch the same one share what is read for it: once a second for all.

    read  returns what the template shows
    """

    def answer(request: Request) -> Response:
        visit = Visit(request)
        if "x-live" not in request.headers:
            return visit.page(template, read)
        site, key = visit.site, (str(request.url), visit.access, visit.theme)
        with site.lock:  # the others wait here for the first
            now = monotonic()
            site.kept = {one: had for one, had in site.kept.items() if now - had[0] <= EVERY}
            if key not in site.kept:
                site.kept[key] = (now, visit.page(template, read))
            return site.kept[key][1]

    return answer


def overview(visit: Visit, reports: Reports) -> Row:
    """Show how it goes, and what needs attention."""
    span = SPANS[visit.span_name]
    return {
        "flow": reports.flow(span),
        "depths": reports.depths(span),
        "health": reports.view("health"),
        "failures": [row for row in reports.view("failures", 5) if row["muted_until"] is None],
    }


def jobs(visit: Visit, reports: Reports) -> Row:
    """Show the jobs that a search finds."""
    search = Search(visit.query["q"])
    found = search.find(reports, LIST + 1, _before(visit))
    return {
        "jobs": [visit.shown(row) for row in reports.jobs(found.ids[:LIST])],
        "search": search,
        "tabs": TABS,
        "tab": next((tab for tab in reversed(TABS) if TABS[tab] in search.text), "all"),
        "more": found.ids[LIST - 1] if len(found.ids) > LIST else None,
        "looked_back_to": found.looked_back_to,
        "compact": "compact" in visit.query,
        "with_line": "line" in visit.query,
    }


def job(visit: Visit, reports: Reports) -> Row:
    """Show all of a job."""
    found = _job(visit, reports)
    groups = reports.view("failures") if found["state"] == "failed" else []
    alike = [row for row in groups if row["fingerprint"] == found["fingerprint"]]
    logs = reports.logs([found["id"]], number(visit.query["run"]), _level(visit))
    runs = [visit.shown(run, found["task"]) for run in found["runs"]]
    return {
        "job": visit.shown(found) | {"runs": runs},
        "why": reports.why(found["id"]) if found["ended_at"] is None else [],
        "logs": logs if visit.access.sees_args else [],
        "alike": alike[0] if alike else None,
        "levels": LEVELS,
        "acts": ACTS,
    }


def _job(visit: Visit, reports: Reports) -> Row:
    found = reports.job(_id(visit.request.path_params["job"]))
    if found is None:
        raise HTTPException(404, "There is no such job.")
    return found


def _id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError as error:
        raise HTTPException(404, "That is no id of a job.") from error


def _before(visit: Visit) -> UUID | None:
    return _id(visit.query["before"]) if "before" in visit.query else None


def _level(visit: Visit) -> str | None:
    return visit.query["level"] if visit.query["level"] in LEVELS else None


def logs(visit: Visit, reports: Reports) -> Row:
    """Show what the jobs of a search logged, by time."""
    visit.must_see()
    search = Search(visit.query["q"])
    ids = search.find(reports, LIST, _before(visit)).ids
    lines = reports.logs(ids, None, _level(visit), LOG_LINES)
    return {"lines": lines, "search": search, "levels": LEVELS, "number": len(ids)}


def views(template: str, *names: str) -> Callable[[Request], Response]:
    """Make the page of some views, each shown whole."""

    def read(visit: Visit, reports: Reports) -> Row:
        return {name: [visit.shown(row) for row in reports.view(name, MANY)] for name in names}

    return html(template, read)


def theme(request: Request) -> Response:
    """Keep the choice of colours in a cookie, and go back."""
    visit = Visit(request)
    response = visit.back(visit.query["back"])
    response.set_cookie(
        "theme", request.path_params["name"], 31_536_000, samesite="strict", httponly=True
    )
    return response


# What programs ask for


def document_of(request: Request) -> Response:
    """Send the arguments, the result or the logs of a job as a file."""
    visit, what = Visit(request), request.path_params["what"]
    visit.must_see()
    with visit.site.reading() as reports:
        found = _job(visit, reports)
        documents = visit.shown(found) | {"logs": reports.logs([found["id"]])}
    if what not in ("args", "result", "logs"):
        raise HTTPException(404, "There is no such document.")
    headers = {"Content-Disposition": f'attachment; filename="{found["id"]}-{what}.json"'}
    return Response(as_json(documents[what]), media_type="application/json", headers=headers)


def prometheus(request: Request) -> Response:
    """Show the metrics of the database."""
    with Visit(request).site.reading() as reports:
        return PlainTextResponse(metrics(reports), media_type=TYPE)


async def snapshot(request: Request) -> Response:
    """Return the live snapshot; nothing, if it is the one that is known."""
    told, tag = await Visit(request).site.hub.snapshot()
    is_known = request.headers.get("if-none-match") == f'"{tag}"'
    headers = {"ETag": f'"{tag}"'}
    return Response("" if is_known else told, 304 if is_known else 200, headers, "application/json")


async def events(request: Request) -> Response:
    """Tell, for as long as it is listened to, which topics have changed."""
    if "wsgi_environ" in request.scope:
        return Response(status_code=204)  # it would hold a thread: pages poll then
    headers = {"X-Accel-Buffering": "no"}
    told = Visit(request).site.hub.events()
    return StreamingResponse(told, media_type="text/event-stream", headers=headers)


PAGES: dict[str, Callable[..., Any]] = {
    "/": html("overview.html", overview),
    "/jobs": html("jobs.html", jobs),
    "/jobs/{job}": html("job.html", job),
    "/jobs/{job}/{what}.json": document_of,
    "/logs": html("logs.html", logs),
    **{f"/{name}": views(f"{name}.html", name) for name in VIEWS},
    "/system": views("system.html", "health", "storage", "actions"),
    "/theme/{name}": theme,
    "/metrics": prometheus,
    "/snapshot": snapshot,
    "/events": events,
}
