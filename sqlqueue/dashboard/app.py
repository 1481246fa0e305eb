"""The application: what all pages share, the guard before them, and the table of routes."""

import inspect
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice
from time import monotonic
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sqlqueue.dashboard.access import HEADERS, Access, Authorize, Forms
from sqlqueue.dashboard.hub import Hub
from sqlqueue.dashboard.svg import brief, plot
from sqlqueue.link import DatabaseError
from sqlqueue.queue import Queue
from sqlqueue.reports import Reports
from sqlqueue.reports.hiding import patterns_of, shown
from sqlqueue.reports.search import SearchError
from sqlqueue.reports.verbs import Operator
from sqlqueue.reports.written import as_json
from sqlqueue.schedule import Schedule

POOL = 3  # connections
STATEMENT = "5s"  # longest time of one read
LOOK_EVERY = 10.0  # seconds between two looks whether the database can be written to
SPANS = {"1h": timedelta(hours=1), "6h": timedelta(hours=6), "1d": timedelta(days=1),
         "7d": timedelta(days=7)}  # fmt: skip
# What a visitor did last, if that was just now.
_DONE = """
select * from sqlqueue.actions
where actor = :actor and at > now() - interval '30 s' order by at desc limit 1
"""
LARGE = 64 * 1024  # characters of a document that a page shows
NARROW = "57014"  # a statement that was ended: it took too long
SECRET = ("args", "result", "error", "traceback", "headers", "note", "last_line", "sample_error")


class Site:
    """What the pages of one dashboard share: the queue, its database, templates, the hub."""

    def __init__(self, queue: Queue, *, read_only: bool, insecure: bool) -> None:
        self.queue = queue
        self.insecure = insecure
        self.forms = Forms()
        self.hub = Hub(self._totals)
        self.engine = create_engine(
            queue.engine.url, pool_size=POOL, max_overflow=0, pool_pre_ping=True,
            hide_parameters=True,
        )  # fmt: skip
        self.lock = threading.Lock()
        self.kept: dict[Any, tuple[float, Response]] = {}  # pages that several watch
        self.templates = Environment(
            loader=PackageLoader("sqlqueue.dashboard"), autoescape=select_autoescape(),
            undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        self.templates.globals |= {
            "plot": plot, "brief": brief, "ago": ago, "span": span, "clock": clock,
            "document": document, "count": count_of, "now": lambda: datetime.now(UTC),
            "site": self, "spans": SPANS, "upcoming": upcoming,
        }  # fmt: skip
        self._read_only = read_only
        self._writable = (float("-inf"), False)

    @contextmanager
    def reading(self) -> Iterator[Reports]:
        """Lend reports in a read-only transaction whose statements end soon."""
        with self.engine.connect() as conn, conn.begin() as transaction:
            conn.execute(text("set transaction read only"))
            conn.execute(text(f"set local statement_timeout = '{STATEMENT}'"))
            yield Reports(conn, self.queue.store.schema)
            transaction.rollback()

    def signature(self, task: str) -> str:
        """Return how a task is called, if the application is known here."""
        known = self.queue.tasks.get(task)
        return str(inspect.signature(known.function)) if known else ""

    def _totals(self) -> dict[str, Any]:
        with self.reading() as reports:
            return reports.totals()

    @property
    def is_writable(self) -> bool:
        """Whether anything can be changed: not read-only, no replica, and with the rights to."""
        at, is_writable = self._writable
        if not self._read_only and monotonic() - at > LOOK_EVERY:
            sql = "select not pg_is_in_recovery() and has_function_privilege("
            sql += f"'{self.queue.store.schema}.change(text,uuid[],jsonb)', 'execute')"
            with self.engine.connect() as conn:
                is_writable = bool(conn.execute(text(sql)).scalar())
            self._writable = (monotonic(), is_writable)
        return is_writable


class Visit:
    """One request: who comes, what was asked for, and what is written in answer.

    query  what was asked for, "" if it was not
    root   path below which the dashboard is mounted
    here   path and query of this page below that
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.site: Site = request.scope["sqlqueue.site"]
        self.access: Access = request.scope["sqlqueue.access"]
        self.query = defaultdict(str, request.query_params)
        self.root = request.scope.get("root_path", "").rstrip("/")
        self.here = self.link().removeprefix(self.root) or "/"
        self.theme = request.cookies.get("theme", "")
        self.span_name = self.query["span"] if self.query["span"] in SPANS else "1h"
        self.token = self.site.forms.token(self.access)

    def link(self, path: str | None = None, **changes: Any) -> str:
        """Return a link to a page, or to this one with some choices changed; None: taken away."""
        kept = {} if path else {**self.request.query_params, "done": None}
        kept = {name: one for name, one in (kept | changes).items() if one is not None}
        place = f"{self.root}{path}" if path else self.request.url.path
        return f"{place}?{urlencode(kept)}" if kept else place

    def can(self, role: str) -> bool:
        """Whether the visitor may do what takes a role, and anything can be changed at all."""
        return self.access.may(role) and self.site.is_writable

    def must_see(self) -> None:
        """Raise 403 for who may not see arguments, results and logs."""
        if not self.access.sees_args:
            raise HTTPException(403, "You may not see that.")

    def shown(self, row: Mapping[str, Any], task: str = "") -> dict[str, Any]:
        """Return a row without what is secret, or without documents for who may not see them."""
        row = shown(row, patterns_of(self.site.queue, task or row.get("task")))
        hidden = () if self.access.sees_args else SECRET
        return {name: None if name in hidden else value for name, value in row.items()}

    def operator(self) -> Operator:
        """Return who acts."""
        host = self.request.client.host if self.request.client else "?"
        return Operator(self.site.queue, self.access.actor, f"dashboard from {host}")

    def write(self, template: str, **found: Any) -> Response:
        """Write an answer."""
        page = self.site.templates.get_template(template)
        told = vars(self) | {"link": self.link, "can": self.can} | found
        return HTMLResponse(page.render(told), found.get("code", 200))

    def page(self, template: str, read: Callable[["Visit", Reports], dict[str, Any]]) -> Response:
        """Write a page: what it shows is read, and what all pages show."""
        with self.site.reading() as reports:
            found = {"notice": None, "totals": reports.totals()} | read(self, reports)
            if "done" in self.query:
                found["notice"] = next(iter(reports.rows(_DONE, actor=self.access.actor)), None)
        response = self.write(template, **found)
        if wait := number(self.query["refresh"]):
            response.headers["Refresh"] = str(max(wait, 2))
        return response

    def back(self, place: str, mark: str = "") -> Response:
        """Go to a page of ours, and nowhere else; `mark` is added to what is asked for there."""
        is_ours = place.startswith("/") and not place.startswith("//") and "\\" not in place
        place = place if is_ours else "/"
        sign = "&" if "?" in place else "?"
        return RedirectResponse(f"{self.root}{place}{sign if mark else ''}{mark}", 303)


def number(text: str) -> int | None:
    """Read a number that somebody asked for; None if it is none."""
    return int(text) if text.isdecimal() and len(text) < 9 else None


# How values are written


def span(value: Any) -> str:
    """Write a duration, given as one or in seconds."""
    if value is None:
        return ""
    seconds = value.total_seconds() if isinstance(value, timedelta) else float(value)
    return brief(max(seconds, 0), "s") if seconds < 172800 else f"{seconds / 86400:.0f} d"


def ago(value: datetime | None) -> str:
    """Write how long ago something was, or in how long it will be."""
    if value is None:
        return ""
    seconds = (datetime.now(UTC) - value).total_seconds()
    return f"{span(seconds)} ago" if seconds >= 0 else f"in {span(-seconds)}"


def clock(value: datetime | None) -> str:
    """Write an instant, in UTC."""
    return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}" if value else ""


def document(value: Any, indent: int | None = None) -> str:
    """Write a JSON document; a large one is cut."""
    if value is None:
        return ""
    written = as_json(value, indent)
    return written if len(written) <= LARGE else f"{written[:LARGE]} … cut: download it"


def count_of(value: int) -> str:
    """Write a number of jobs; beyond what is counted it is `10,000+`."""
    return f"{value:,}" if value <= 10_000 else "10,000+"


def upcoming(schedule: Mapping[str, Any]) -> list[datetime]:
    """Return the next three instants of a schedule that is fired."""
    when = Schedule(cron=schedule["cron"], every=schedule["every"], tz=schedule["tz"])
    return list(islice(when.after(datetime.now(UTC)), 3)) if schedule["is_enabled"] else []


# The guard


class Guard:
    """Stands before all: finds out who comes, sends away who may not enter, sets the headers."""

    def __init__(self, app: ASGIApp, site: Site, authorize: Authorize) -> None:
        self._app = app
        self._site = site
        self.hub = site.hub
        self._authorize = authorize

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = {} if "/static/" in scope["path"] else {"Cache-Control": "no-store"}
                for name, value in (HEADERS | kept).items():
                    MutableHeaders(scope=message).setdefault(name, value)
            await send(message)

        refusal = HTTPException(403)
        try:
            access = self._authorize(Request(scope, receive))
        except HTTPException as error:
            access, refusal = None, error
        scope["sqlqueue.access"], scope["sqlqueue.site"] = access, self._site
        answer: ASGIApp = self._app
        if access is None:
            answer = PlainTextResponse("You may not enter.\n", refusal.status_code, refusal.headers)
        await answer(scope, receive, send_with_headers)


def _failed(request: Request, error: Exception) -> Response:
    """Say what failed: never a traceback, never an argument."""
    state = getattr(getattr(error, "orig", error), "sqlstate", None)
    if isinstance(error, HTTPException):
        code, says = error.status_code, error.detail
    elif isinstance(error, SearchError):
        code, says = 400, str(error)
    elif state is None:
        code, says = 503, "The database cannot be reached."
    elif state == NARROW:
        code, says = 200, "That took too long: narrow the search."
    elif state.startswith(("22", "23")):
        code, says = 400, "The database refused a value."
    else:
        code, says = 503, f"The database refused that ({state})."
    return Visit(request).write("error.html", says=says, code=code)


def dashboard(
    queue: Queue,
    *,
    authorize: Authorize,
    read_only: bool = False,
    insecure: bool = False,
) -> Guard:
    """Return the dashboard of a queue's database, to mount in an ASGI application.

    authorize  a function of the request that returns Access, or None for who may not enter; it is
               required: nobody is let in by default
    read_only  show no action and refuse each
    insecure   whether to warn on each page that anybody may enter

    Raises TypeError without `authorize`.
    """
    from sqlqueue.dashboard import actions, pages

    if not callable(authorize):
        raise TypeError("authorize must be a function that says who may enter")
    site = Site(queue, read_only=read_only, insecure=insecure)
    routes = [
        *(Route(path, page, methods=["GET"]) for path, page in pages.PAGES.items()),
        Route("/act/{name}", actions.act, methods=["POST"]),
        Mount("/static", StaticFiles(packages=[("sqlqueue.dashboard", "static")])),
    ]
    handlers: Any = dict.fromkeys((HTTPException, SearchError, DBAPIError, *DatabaseError), _failed)
    return Guard(Starlette(routes=routes, exception_handlers=handlers), site, authorize)
