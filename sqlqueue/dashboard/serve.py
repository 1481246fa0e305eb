"""`sqlqueue dashboard`: serves it, on loopback without a password, elsewhere only with one."""

import logging
import socket
from ipaddress import ip_address
from typing import Any

import click
import uvicorn

from sqlqueue.dashboard.access import ROLES, Access, Authorize, basic, on_loopback
from sqlqueue.dashboard.app import Guard, dashboard
from sqlqueue.dashboard.hub import Hub
from sqlqueue.queue import Queue

log = logging.getLogger("sqlqueue.dashboard")
WAYS = """--host {host} is open to others: say who may enter
  --auth USER:PASSWORD:ROLE, or the variable SQLQUEUE_DASHBOARD_AUTH
  --insecure, to let anybody in
  or mount it in your application: app.mount("/sqlqueue", dashboard(queue, authorize=...))"""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def authorize_for(host: str, auth: str | None, role: str, insecure: bool) -> Authorize:
    """Return who may enter. Raises ValueError, with the ways to go on, if nobody says so."""
    if auth:
        return basic(auth, asks=True)
    if is_loopback(host):
        return on_loopback(role, frozenset({"localhost", "127.0.0.1", "::1", host.lower()}))
    if insecure:
        return lambda request: Access("anybody", role)
    raise ValueError(WAYS.format(host=host))


def application(queue: Queue, **given: Any) -> Guard:
    """Return the dashboard with the options of the command."""
    if given["role"] not in ROLES:
        raise ValueError(f"role must be one of {', '.join(ROLES)}")
    authorize = authorize_for(given["host"], given["auth"], given["role"], given["insecure"])
    is_open = given["insecure"] and not given["auth"] and not is_loopback(given["host"])
    return dashboard(queue, authorize=authorize, read_only=given["read_only"], insecure=is_open)


class Server(uvicorn.Server):
    """Serves an application; ends its streams when it stops."""

    def __init__(self, app: Any, hub: Hub | None = None) -> None:
        super().__init__(uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off", server_header=False,
            timeout_graceful_shutdown=2, proxy_headers=False,
        ))  # fmt: skip
        self._hub = hub

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop."""
        if self._hub:
            self._hub.close()
        await super().shutdown(sockets)


def bound(host: str, port: int) -> socket.socket:
    """Listen at an address. Raises OSError if that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def serve(queue: Queue, **given: Any) -> None:
    """Serve the dashboard until it is told to stop."""
    app = application(queue, **given)
    sock = bound(given["host"], given["port"])
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    click.echo(f"http://{shown}:{port}/", err=True)
    Server(app, app.hub).run([sock])
