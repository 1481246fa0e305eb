"""A pgbouncer in transaction mode, between a test and a server.

It shares five connections to the server among all clients of a database, and knows no prepared
statements: Debian's is 1.18, and so is what many have. It keeps no state of a session.
"""

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Self

import psycopg
from psycopg.rows import dict_row
from sqlalchemy import make_url

from sqlqueue.embedded import _unprivileged
from tests.faults.cluster import HOST, _free_port
from tests.harness import wait_until

SERVER_CONNECTIONS = 5
SETTINGS = """\
[databases]
* = host={host} port={port}

[pgbouncer]
listen_addr = {listen}
listen_port = {own_port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {place}/users
admin_users = {user}
pool_mode = transaction
default_pool_size = {size}
query_wait_timeout = {patience}
max_client_conn = 400
ignore_startup_parameters = options
logfile = {place}/log
"""


class Pooler:
    """A pooler in front of the server of a url; started on entry, gone on exit.

    patience  seconds that a client waits for a connection before it gets an error
    """

    def __init__(self, url: str, *, patience: int = 120) -> None:
        self._server = make_url(url)
        self._patience = patience
        self._place = Path()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
        assert program, "pgbouncer is missing. On Debian: apt-get install pgbouncer"
        self._place = Path(tempfile.mkdtemp(prefix="sqlqueue-pooler-"))
        self._url = self._server.set(host=HOST, port=_free_port())
        (self._place / "settings").write_text(
            SETTINGS.format(
                host=self._server.host, port=self._server.port, listen=HOST,
                own_port=self._url.port, place=self._place, user=self._server.username,
                size=SERVER_CONNECTIONS, patience=self._patience,
            )
        )  # fmt: skip
        users = self._place / "users"
        users.write_text(f'"{self._server.username}" "{self._server.password}"\n')
        identity = _unprivileged()
        for path in (self._place, *self._place.iterdir()) if identity else ():
            os.chown(path, identity["user"], identity["group"])
        self._process = subprocess.Popen(
            [program, "-q", str(self._place / "settings")], cwd="/", **identity
        )
        wait_until(self._answers, what="the first answer of pgbouncer")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)  # at once, whoever is connected
        self._process.wait(10)
        shutil.rmtree(self._place)

    def url(self, database: str | None = None) -> str:
        """The url of a database of the server, through the pooler."""
        url = self._url.set(database=database or self._server.database)
        return url.render_as_string(hide_password=False)

    def show(self, what: str) -> list[dict[str, Any]]:
        """Ask the pooler itself: the rows of `show pools`, `show servers` and so on."""
        url = self.url("pgbouncer").replace("+psycopg", "")
        with psycopg.connect(url, autocommit=True, row_factory=dict_row) as conn:
            return conn.execute(f"show {what}").fetchall()  # type: ignore[call-overload,no-any-return]

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._place / "log").read_text()
        try:
            return bool(self.show("version"))
        except psycopg.OperationalError:
            return False
