"""A Postgres server whose end and beginning a test decides: crash it, start it again, promote it.

Durable (fsync on), on a port that stays the same. Unlike the embedded server of the package it has
no watchdog; Linux stops it when the thread that started it ends.
"""

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import psycopg
from sqlalchemy import URL, make_url

from sqlqueue.embedded import Binaries, _unprivileged, _within_reach, find_binaries
from tests.harness import wait_until

HOST = "127.0.0.1"
SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "fsync": "on",
    "synchronous_commit": "on",
    "max_connections": "150",
    "shared_buffers": "128MB",
    "max_wal_size": "2GB",
    "logging_collector": "off",
}
PR_SET_PDEATHSIG = 1


class Cluster:
    """A cluster in a folder of its own, in `place`, started on entry, stopped and deleted on exit.

    `stop("immediate")` is a crash of the server: no checkpoint, recovery at the next start.
    """

    def __init__(
        self, settings: Mapping[str, str] | None = None, place: Path | None = None
    ) -> None:
        self._identity = _unprivileged()
        self._programs = _within_reach(Binaries.read(find_binaries()[0]), self._identity).directory
        self._settings = SETTINGS | dict(settings or {})
        self._password = secrets.token_urlsafe(12)
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._within, self._place = place, Path()
        self._origin: URL | None = None

    def __enter__(self) -> Self:
        self._place = Path(tempfile.mkdtemp(prefix="sqlqueue-cluster-", dir=self._within))
        self.own(self._place)
        try:
            self._make()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop("immediate")
        shutil.rmtree(self._place, ignore_errors=True)

    @property
    def url(self) -> str:
        """The url of the database postgres, as SQLAlchemy takes it."""
        return f"postgresql+psycopg://postgres:{self._password}@{HOST}:{self._port}/postgres"

    @property
    def data(self) -> Path:
        """The folder of its data."""
        return self._place / "data"

    @property
    def pid(self) -> int:
        """The process id of the server."""
        assert self._process, "the cluster is not running"
        return self._process.pid

    @property
    def log(self) -> str:
        """What the server has said."""
        return (self._place / "log").read_text(errors="replace")

    def create_database(self, name: str) -> str:
        """Create an empty database and return its url."""
        self.run(f"create database {name}")
        return make_url(self.url).set(database=name).render_as_string(hide_password=False)

    def run(self, sql: str) -> list[tuple[Any, ...]]:
        """Run a statement as the superuser, in no transaction; return its rows."""
        url = self.url.replace("+psycopg", "")
        with psycopg.connect(url, autocommit=True, connect_timeout=5) as conn:
            cursor = conn.execute(sql)  # type: ignore[call-overload]
            return cursor.fetchall() if cursor.description else []

    def start(self) -> None:
        """Start the server; return when it accepts connections."""
        options = [f"-c{name}={value}" for name, value in self._settings.items()]
        with (self._place / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", f"-D{self.data}", f"-p{self._port}", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
                preexec_fn=_end_with_parent,
                **self._identity,
            )
        wait_until(self._accepts, within=60, what=f"the server\n{self.log[-2000:]}")

    def stop(self, how: str = "fast") -> None:
        """Stop the server, if it runs: "fast" rolls back and checkpoints, "immediate" crashes."""
        process, self._process = self._process, None
        if process and process.poll() is None:
            process.send_signal(signal.SIGQUIT if how == "immediate" else signal.SIGINT)
            process.wait(30)

    def ended(self) -> bool:
        """Say whether the server has ended by itself or by a signal."""
        return self._process is None or self._process.poll() is not None

    def standby(self, url: str | None = None) -> "Cluster":
        """Return a standby of this running server, not yet entered: a base backup that streams.

        `url` leads to this server in another way than its own, such as through a proxy. A standby
        waits for none of its own once it is promoted. `synchronous()` has this server wait for it.
        """
        standby = Cluster(self._settings | {"synchronous_standby_names": ""})
        standby._password, standby._origin = self._password, make_url(url or self.url)
        return standby

    def synchronous(self) -> None:
        """Have each commit wait for a standby, from now on; return when there is one."""
        self.run("alter system set synchronous_standby_names = 'standby'")
        self.run("select pg_reload_conf()")
        sql = "select 1 from pg_stat_replication where sync_state = 'sync'"
        wait_until(lambda: self.run(sql), what="a synchronous standby")

    def promote(self) -> None:
        """Make a standby a server of its own; return when it accepts writes."""
        self.run("select pg_promote(true, 60)")

    def dump(self) -> None:
        """Have pg_dump read everything, as a backup does."""
        url = self.url.replace("+psycopg", "")
        self._call("pg_dump", "--dbname", url, "--file", "/dev/null")

    def _make(self) -> None:
        if self._origin:
            host, port = self._origin.host, self._origin.port
            who = f"user=postgres password={self._password} application_name=standby"
            words = ["-D", self.data, "-R", "-X", "stream", "-c", "fast"]
            self._call("pg_basebackup", *words, "-d", f"host={host} port={port} {who}")
            return
        secret = self._place / "password"
        secret.write_text(self._password)
        self.own(secret)
        words = ["-D", self.data, "-U", "postgres", f"--pwfile={secret}", "--no-sync"]
        words += ["--wal-segsize=1"] if self._within else []  # its log grows in small steps
        words += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8"]
        self._call("initdb", *words)

    def _call(self, program: str, *words: Any) -> None:
        made = subprocess.run(
            [self._programs / program, *words],
            cwd="/",
            capture_output=True,
            text=True,
            **self._identity,
        )
        assert made.returncode == 0, f"{program}: {made.stdout}{made.stderr}"

    def own(self, path: Path) -> None:
        """Have a path belong to who runs the server."""
        if self._identity:
            os.chown(path, self._identity["user"], self._identity["group"])

    def _accepts(self) -> bool:
        assert not self.ended(), f"the server ended\n{self.log[-2000:]}"
        try:
            self.run("select 1")
        except psycopg.OperationalError:
            return False
        return True


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        port: int = free.getsockname()[1]
        return port


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGQUIT)
