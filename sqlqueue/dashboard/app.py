"""The application: what all pages share, the guard before them, and the table of routes."""

import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any
from urllib.parse import parse_qs, urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError, OperationalError
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sqlqueue.dashboard import svg
from sqlqueue.dashboard.access import HEADERS, Access, Authorize, Forms
from sqlqueue.dashboard.hub import Hub
from sqlqueue.link import DatabaseError
from sqlqueue.queue import Queue
from sqlqueue.reports import Reports
from sqlqueue.reports.hiding import shown
from sqlqueue.reports.search import SearchError
from sqlqueue.reports.verbs import Operator

POOL = 3  # connections
STATEMENT = "5s"  # longest time of one read
LOOK_EVERY = 10.0  # seconds between two looks whether the database can be written to
SPANS = {"1h": timedelta(hours=1), "6h": timedelta(hours=6), "1d": timedelta(days=1),
         "7d": timedelta(days=7)}  # fmt: skip
LARGE = 64 * 1024  # characters of a document that a page shows
NARROW = "57014"  # a statement that was ended: it took too long


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
        self._read_only = read_only
        self._writable = (float("-inf"), False)
        self._templates = Environment(
            loader=PackageLoader("sqlqueue.dashboard"), autoescape=select_autoescape(),
            undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        self._templates.globals |= {
            "svg": svg, "ago": ago, "span": span, "clock": clock, "document": document,
            "now": lambda: datetime.now(UTC), "bytes": size_of, "count": count_of,
        }  # fmt: skip

    @contextmanager
    def reading(self) -> Iterator[Reports]:
        """Lend reports in a read-only transaction whose statements end soon."""
        with self.engine.connect() as conn, conn.begin() as transaction:
            conn.execute(text("set transaction read only"))
            conn.execute(text(f"set local statement_timeout = '{STATEMENT}'"))
            yield Reports(conn, self.queue.store.schema)
            transaction.rollback()

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

    def shown(self, row: Mapping[str, Any], access: Access, task: str = "") -> dict[str, Any]:
        """Return a row without what is secret, or without documents for who may not see them."""
        known = self.queue.tasks.get(task or row.get("task") or "")
        row = shown(row, known.options.redact if known else ())
        if not access.sees_args:
            hidden = ("args", "result", "error", "traceback", "headers", "note", "last_line")
            row |= {name: None for name in hidden if name in row}
        return row

    def operator(self, request: Request) -> Operator:
        """Return who acts in a request."""
        host = request.client.host if request.client else "?"
        return Operator(self.queue, access_of(request).actor, f"dashboard from {host}")

    def page(self, request: Request, template: str, **found: Any) -> Response:
        """Write a page; the rest of what it shows is read here."""
        access = access_of(request)
        query = defaultdict(str, request.query_params)
        found |= {
            "access": access, "site": self, "request": request, "query": query,
            "here": here(request), "root": request.scope.get("root_path", "").rstrip("/"),
            "can": access.may if self.is_writable else (lambda _: False),
            "token": self.forms.token(access), "theme": request.cookies.get("theme", ""),
            "span_name": span_name(request), "spans": SPANS, "link": partial_link(request),
        }  # fmt: skip
        with self.reading() as reports:
            found.setdefault("totals", reports.totals())
            found["notice"] = self._notice(reports, access) if "done" in query else None
        found["failing"] = found["totals"]["overview"]["failed"]
        response = HTMLResponse(self._templates.get_template(template).render(found))
        if (wait := query.get("refresh", "")).isdigit():
            response.headers["Refresh"] = str(max(int(wait), 2))
        return response

    def _notice(self, reports: Reports, access: Access) -> Mapping[str, Any] | None:
        """Return what this visitor did last, if that was just now."""
        rows = [row for row in reports.actions(20) if row["actor"] == access.actor]
        is_new = rows and reports.now() - rows[0]["at"] < timedelta(seconds=30)
        return rows[0] if is_new else None


def access_of(request: Request) -> Access:
    """Return what the guard found out about the visitor."""
    found: Access = request.scope["sqlqueue.access"]
    return found


def site_of(request: Request) -> Site:
    """Return the site that a request is for."""
    found: Site = request.scope["sqlqueue.site"]
    return found


def here(request: Request) -> str:
    """Return the path and query of this page, below where the dashboard is mounted."""
    root = request.scope.get("root_path", "").rstrip("/")
    path = request.url.path.removeprefix(root) or "/"
    kept = urlencode([pair for pair in request.query_params.multi_items() if pair[0] != "done"])
    return f"{path}?{kept}" if kept else path


def span_name(request: Request) -> str:
    """Return the range of the charts that was chosen."""
    name = request.query_params.get("span", "1h")
    return name if name in SPANS else "1h"


def partial_link(request: Request) -> Callable[..., str]:
    """Return what makes links to this page with some choices changed; None takes one away."""

    def link(path: str | None = None, **changes: Any) -> str:
        kept = {} if path else dict(request.query_params)
        kept.pop("done", None)
        kept |= {name: str(value) for name, value in changes.items() if value is not None}
        kept = {n: v for n, v in kept.items() if not (n in changes and changes[n] is None)}
        root = request.scope.get("root_path", "").rstrip("/")
        place = f"{root}{path}" if path else request.url.path
        return f"{place}?{urlencode(kept)}" if kept else place

    return link


# How values are written


def span(value: Any) -> str:
    """Write a duration, given as one or in seconds."""
    if value is None:
        return ""
    seconds = value.total_seconds() if isinstance(value, timedelta) else float(value)
    return svg.brief(max(seconds, 0), "s") if seconds < 172800 else f"{seconds / 86400:.0f} d"


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
    written = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    return written if len(written) <= LARGE else f"{written[:LARGE]} … cut: download it"


def count_of(value: int) -> str:
    """Write a number of jobs; beyond what is counted it is `10,000+`."""
    return f"{value:,}" if value <= 10_000 else "10,000+"


def size_of(value: float) -> str:
    """Write a number of bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.3g} {unit}"
        value /= 1000
    return ""


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
                headers = MutableHeaders(scope=message)
                is_static = "/static/" in scope["path"]
                for name, value in HEADERS.items():
                    if not (is_static and name == "Cache-Control"):
                        headers.setdefault(name, value)
            await send(message)

        request = Request(scope, receive)
        try:
            access = self._authorize(request)
        except HTTPException:
            access = None
        if access is None:
            wants = getattr(self._authorize, "challenge", False)
            code = 401 if wants else 403
            refusal = Response("You may not enter.\n", code, media_type="text/plain")
            if wants:
                refusal.headers["WWW-Authenticate"] = 'Basic realm="sqlqueue"'
            await refusal(scope, receive, send_with_headers)
            return
        scope["sqlqueue.access"], scope["sqlqueue.site"] = access, self._site
        await self._app(scope, receive, send_with_headers)


async def form_of(request: Request) -> dict[str, list[str]]:
    """Read a form. Raises 413 for one that is too large."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > 4_000_000:
            raise HTTPException(413, "the form is too large")
    return parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=20_000)


def _failed(request: Request, error: Exception) -> Response:
    """Say what failed: never a traceback, never an argument."""
    code, says = 500, "Something failed; the log of the dashboard says what."
    if isinstance(error, HTTPException):
        code, says = error.status_code, error.detail
    elif isinstance(error, SearchError):
        code, says = 400, str(error)
    elif isinstance(error, DatabaseError):
        cause = getattr(error, "orig", error)
        state = getattr(cause, "sqlstate", None)
        if state == NARROW:
            code, says = 200, "That took too long: narrow the search."
        elif (state or "").startswith(("22", "23")):
            code, says = 400, "The database refused a value."
        elif isinstance(error, OperationalError) and state is None:
            code, says = 503, "The database cannot be reached."
        else:
            code, says = 503, f"The database refused that ({state})."
    site, access = site_of(request), access_of(request)
    page = site._templates.get_template("error.html").render(
        says=says, code=code, root=request.scope.get("root_path", "").rstrip("/"), access=access,
        theme=request.cookies.get("theme", ""),
    )  # fmt: skip
    return HTMLResponse(page, code)


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
