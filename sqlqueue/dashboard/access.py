"""Who may see and do what, and that nobody gets round it: roles, tokens of forms, headers.

Closed by default: who is not known gets nothing, what is no same-origin POST changes nothing.
"""

import base64
import binascii
import hmac
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from secrets import token_bytes

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request

ROLES = ("view", "operate", "admin")
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}


@dataclass(frozen=True)
class Access:
    """What a visitor may do.

    actor      who it is; written down with all that is changed
    role       view, operate or admin
    sees_args  whether arguments, results and logs are shown
    """

    actor: str
    role: str = "view"
    sees_args: bool = True

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {self.role!r}")

    def may(self, role: str) -> bool:
        """Whether this is the role, or one above it."""
        return ROLES.index(self.role) >= ROLES.index(role)


Authorize = Callable[[HTTPConnection], Access | None]


def basic(users: str, *, asks: bool = False) -> Authorize:
    """Let users in by HTTP basic authentication: `USER:PASSWORD[:ROLE]`, several with commas.

    asks  whether browsers are told to ask for user and password

    Raises ValueError for what is no such text.
    """
    known: dict[str, tuple[str, str]] = {}
    for one in users.split(","):
        user, _, rest = one.partition(":")
        password, _, role = rest.rpartition(":") if rest.endswith(ROLES) else (rest, "", "view")
        if not user or not password:
            raise ValueError("who may enter is given as USER:PASSWORD[:ROLE]")
        known[user] = (password, role)

    def authorize(request: HTTPConnection) -> Access | None:
        scheme, _, code = request.headers.get("authorization", "").partition(" ")
        with suppress(binascii.Error, UnicodeDecodeError):
            user, _, password = base64.b64decode(code, validate=True).decode().partition(":")
            expected, role = known.get(user, (token_bytes(16).hex(), "view"))
            same = hmac.compare_digest(password.encode(), expected.encode())
            if same and scheme.lower() == "basic":
                return Access(user, role)
        if asks:
            raise HTTPException(401, headers={"WWW-Authenticate": 'Basic realm="sqlqueue"'})
        return None

    return authorize


def bearer(token: str, role: str = "view") -> Authorize:
    """Let whoever has a token in, such as a monitor: `Authorization: Bearer TOKEN`."""
    access = Access("bearer", role)

    def authorize(request: HTTPConnection) -> Access | None:
        given = request.headers.get("authorization", "").encode()
        return access if hmac.compare_digest(given, f"Bearer {token}".encode()) else None

    return authorize


def trusted_header(name: str, role: Callable[[str], str] | str = "view") -> Authorize:
    """Let in whom a proxy names in a header, which it must take away from what comes to it."""

    def authorize(request: HTTPConnection) -> Access | None:
        actor = request.headers.get(name)
        return Access(actor, role(actor) if callable(role) else role) if actor else None

    return authorize


def on_loopback(role: str, hosts: frozenset[str]) -> Authorize:
    """Let in whoever is on this machine, asks for it by its own name, and came by no proxy."""
    access = Access("local", role)

    def authorize(request: HTTPConnection) -> Access | None:
        host = request.headers.get("host", "").rsplit(":", 1)[0].strip("[]").lower()
        forwarded = any(
            name == "forwarded" or name.startswith("x-forwarded") or name in ("x-real-ip", "via")
            for name in request.headers
        )
        return access if host in hosts and not forwarded else None

    return authorize


class Forms:
    """The tokens of forms: HMAC of actor and day."""

    def __init__(self) -> None:
        given = os.environ.get("SQLQUEUE_DASHBOARD_SECRET")
        self._key = given.encode() if given else token_bytes(32)

    def token(self, access: Access, day: int | None = None) -> str:
        """Return what a form of this visitor carries."""
        day = datetime.now(UTC).toordinal() if day is None else day
        return hmac.new(self._key, f"{day} {access.actor}".encode(), sha256).hexdigest()

    def is_ours(self, request: Request, access: Access, token: str) -> bool:
        """Whether a POST comes from a page of ours, of today or yesterday."""
        site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin", "")
        if site is not None:
            is_same = site == "same-origin"
        else:
            is_same = origin.partition("://")[2] == request.headers.get("host")
        today = datetime.now(UTC).toordinal()
        known = [self.token(access, day) for day in (today, today - 1)]
        return is_same and any(hmac.compare_digest(token.encode(), one.encode()) for one in known)
