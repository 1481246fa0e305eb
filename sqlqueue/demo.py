"""`sqlqueue demo`: the main job on real input, a crash in its middle, and a check at the end.

First comes an application as anybody would write it: tables of its own, a queue and tasks. The
rest runs it on a throwaway Postgres with a tree of workers, kills one of them, and reports. What
it reports it reads by SQL, and shows the SQL. Whatever happens, nothing is left behind.
"""

import asyncio
import os
import re
import signal
import sysconfig
import threading
import time
import webbrowser
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import partial
from multiprocessing.context import SpawnProcess
from multiprocessing.resource_tracker import ensure_running
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sqlalchemy import Connection, text
from sqlalchemy.orm import Session

from sqlqueue import Queue, Retry, WorkerOptions, current_run
from sqlqueue.cli.supervisor import Processes, Supervisor
from sqlqueue.embedded import Server
from sqlqueue.integrations.alembic import migrate
from sqlqueue.process import SPAWN, die_with_parent
from sqlqueue.reports.control import autocommit

# The application: a library that counts the words of its documents.

# times_counted, the sums of library.shelf and the lack of unique keys are there to betray a job
# that has its effect twice; `run` tells by which run of its job a document was counted. The shelf
# has sixteen rows of totals, so that those who add seldom wait for each other.
LIBRARY = """
create schema library;
create table library.document (
    id integer primary key, path text not null, job_id uuid not null,
    words bigint, lines bigint, run integer, times_counted integer not null default 0
);
create table library.word (document_id integer not null, word text not null, uses bigint not null);
create table library.shelf as
    select id, 0 as documents, 0 as words, 0 as lines from generate_series(0, 15) as id;
"""
ADD = text("insert into library.document (id, path, job_id) values (:id, :path, :job_id)")
COUNTED = text("""
with word as (
    insert into library.word select :id, word, uses
    from unnest(cast(:keys as text[]), cast(:values as bigint[])) as counted (word, uses)
), shelf as (
    update library.shelf set documents = documents + 1, words = words + :words,
        lines = lines + :lines where id = :id % 16
)
update library.document set words = :words, lines = :lines, run = :run,
    times_counted = times_counted + 1 where id = :id
""")
WORD = re.compile(r"[^\W\d_]{2,}")

queue = Queue("postgresql+psycopg://")  # `load` says where
patient = Retry(attempts=3, waits=[timedelta(seconds=1)])


@queue.task(name="library.count", transactional=True, retry=patient)
def count(session: Session, document_id: int, path: str) -> None:
    """Count a document's words and lines: the counts and the end of the job are one commit."""
    uses, lines = counted(Path(path))
    found = {"keys": list(uses), "values": list(uses.values()), "words": uses.total()}
    found |= {"id": document_id, "lines": lines, "run": current_run().number}
    session.execute(COUNTED, found)


@queue.task(name="library.ask", priority=-10)
async def ask() -> None:
    """Wait for half a second, as for the answer of a slow service; no thread waits with it."""
    await asyncio.sleep(0.5)


@queue.task(name="library.recount", executor="process", retry=patient, priority=-10)
def recount(document_id: int, path: str) -> int:
    """Count the words in a child process, where hard work is in nobody's way."""
    return counted(Path(path))[0].total()


@queue.task(name="library.close", priority=-20)
def close() -> None:
    """Close the library: enqueued at once, to be run at its time."""


def counted(path: Path) -> tuple[Counter[str], int]:
    """Count the words and the lines of a text. Raises UnicodeDecodeError if it is not UTF-8."""
    content = path.read_text("utf-8")
    return Counter(WORD.findall(content.lower())), content.count("\n")


def load(url: str) -> Queue:
    """Return the queue, on the database at `url`: called in every process."""
    queue.engine = Queue(url).engine
    return queue


# The show.

WORKER = WorkerOptions(slots=10, ttl=timedelta(seconds=3), grace=timedelta(seconds=2))
QUESTIONS = 16  # more than one worker has slots for, not as many as both have
PATIENCE = 60.0  # seconds in which no job ends, after which the demo gives up
# Added to the files, so that something fails for real.
BROKEN = {"latin-1.txt": "déjà vu\n".encode("latin-1"), "koi8-r.txt": "привет\n".encode("koi8-r")}


def demo(folder: Path | None, port: int = 8787, *, browses: bool = True) -> int:
    """Run the demo on the text files of `folder`, or on Python's own; return the exit code.

    On a terminal the dashboard is served at `port`, or any that is free, until Ctrl-C.

    0 if all checks hold, 1 if one does not, 130 after Ctrl-C before the report. Raises ValueError
    if there are no text files, EmbeddedUnavailable if there is no Postgres.
    """

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would disturb the cleaning up
        raise KeyboardInterrupt

    console = Console(highlight=False)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # until there is somebody to clean up
    holds = None
    try:
        with TemporaryDirectory(prefix="sqlqueue-demo-") as place, suppress(KeyboardInterrupt):
            signal.signal(signal.SIGINT, interrupt)
            console.print("Starting a Postgres of our own: a throwaway folder, fsync on")
            documents = _documents(folder, Path(place))
            with _perform(console, documents, Path(place, "log"), port, browses) as holds:
                while console.is_terminal:  # keep the charts moving until Ctrl-C
                    queue.enqueue_many(ask.s() for _ in range(3 + int(time.time()) % 40 // 4))
                    time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, before)
    console.print("The server, the workers and their folder are gone.")
    return 130 if holds is None else int(not holds)


def _documents(folder: Path | None, spare: Path) -> dict[str, Path]:
    """Find text files, by a short name, and add some that do not decode."""
    root = folder or Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in sorted(root.rglob("*" if folder else "*.py")):
        name = path.relative_to(root)
        is_foreign = any(part[0] == "." or part.endswith("-packages") for part in name.parts)
        if is_foreign or not path.is_file() or not os.access(path, os.R_OK):
            continue
        if b"\0" not in path.read_bytes() and str(name).isprintable():
            found[str(name)] = path.absolute()
    if not found:
        raise ValueError(f"{root} holds no text files")
    for title, content in BROKEN.items():
        found[title] = spare / title
        found[title].write_bytes(content)
    return found


@contextmanager
def _perform(
    console: Console, documents: Mapping[str, Path], log: Path, port: int, browses: bool
) -> Iterator[bool]:
    """Do it all; say whether all checks hold, while the workers and the dashboard are there."""
    with Server() as server:
        migrate(load(server.url).engine)
        with queue.engine.begin() as conn:
            conn.execute(text(LIBRARY))
        console.print(f"Postgres {server.version} runs; starting two worker processes")
        with _tree(server.url, log) as tree, ExitStack() as stack, autocommit(queue.engine) as conn:
            _serve(console, port, browses, stack)
            console.print(f"Enqueuing {len(documents):,} documents: a transaction for each")
            _watch(console, conn, *_enqueue(console, conn, documents), tree)
            holds = _report(console, conn, documents)
            if not holds:
                console.print(*log.read_text().splitlines()[-20:], sep="\n", markup=False)
            if console.is_terminal:
                console.print("\nThe dashboard goes on; Ctrl-C ends it")
            yield holds


def _serve(console: Console, port: int, browses: bool, stack: ExitStack) -> None:
    """Serve the dashboard until the stack ends, if somebody is at a terminal to look at it."""
    try:
        from sqlqueue.dashboard.serve import Server, application, bound
    except ImportError:
        console.print('For the dashboard: pip install "sqlqueue[dashboard]"', markup=False)
        return
    if not console.is_terminal:
        return
    given = {"auth": None, "insecure": False, "read_only": False, "role": "operate"}
    app = application(queue, host="127.0.0.1", **given)
    try:
        sock = bound("127.0.0.1", port)
    except OSError:
        sock = bound("127.0.0.1", 0)  # somebody is there: any will do
    server = Server(app, app.hub)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    stack.callback(thread.join, 5)
    stack.callback(setattr, server, "should_exit", True)
    place = f"http://127.0.0.1:{sock.getsockname()[1]}/"
    console.print(f"[bold]The dashboard is at {place}[/]")
    if browses and os.environ.get("DISPLAY"):
        webbrowser.open(place)


@contextmanager
def _tree(url: str, log: Path) -> Iterator[SpawnProcess]:
    """Keep a supervisor and its workers running; what they say goes to a file."""
    tree = SPAWN.Process(target=_supervise, args=(url, log))
    ensure_running()  # else `start` does it, and lets the signal through
    # It waits until there is something to clean up, and for ever in the child: no Ctrl-C there.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    tree.start()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        yield tree
    finally:
        tree.terminate()
        tree.join(10)
        tree.kill()  # the workers die with it
        tree.join()


def _supervise(url: str, log: Path) -> None:
    """Be the parent of the workers, in a process group that dies with the demo."""
    os.setsid()
    die_with_parent()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)  # stderr
    Supervisor(partial(load, url), ["default"], WORKER, Processes(2)).run()


LIVE = "select coalesce(reason, state), count(*) from sqlqueue.live group by 1 order by 1"
ALIVE = "select pid from sqlqueue.worker where died_at is null order by pid"
BUSIEST = """
select worker.id, worker.pid, clock_timestamp() as seen_at
from sqlqueue.worker join sqlqueue.lease on lease.worker_id = worker.id
group by worker.id having count(*) >= 5 order by count(*) desc limit 1
"""
HANDED_BACK = """
select count(*) as crashed, max(ended_at) - :seen_at as later
from sqlqueue.runs where worker_id = :id and outcome = 'crashed'
having not exists (select from sqlqueue.lease where worker_id = :id)
"""


def _watch(
    console: Console, conn: Connection, total: int, has_killed: bool, tree: SpawnProcess
) -> None:
    """Show how far the jobs are until all have ended; kill a worker, if none was."""
    left, ended_at = total, time.monotonic()
    with console.status("") as status:
        while left and tree.is_alive() and time.monotonic() < ended_at + PATIENCE:
            has_killed = has_killed or _kill(console, conn)
            states = conn.execute(text(LIVE)).all()
            before, left = left, sum(number for _, number in states)
            ended_at = time.monotonic() if left != before else ended_at
            told = [f"{total - left:,}/{total:,} jobs", *(f"{state} {n:,}" for state, n in states)]
            status.update("  ".join([*told, "workers", *map(str, conn.scalars(text(ALIVE)))]))
            time.sleep(0.05)


def _kill(console: Console, conn: Connection) -> bool:
    """Kill the worker process that holds the most jobs, and say what becomes of them."""
    busiest = conn.execute(text(BUSIEST)).first()
    if busiest is None:
        return False
    os.kill(busiest.pid, signal.SIGKILL)
    console.print(f"[red]kill -9 {busiest.pid}[/]: a worker dies in the middle of its jobs")
    while not (back := conn.execute(text(HANDED_BACK), busiest._asdict()).first()):
        time.sleep(0.005)
    later = _shown(back.later)
    console.print(f"{later} later, {back.crashed} unfinished jobs are ready for others")
    return bool(back.crashed)


def _enqueue(console: Console, conn: Connection, documents: Mapping[str, Path]) -> tuple[int, bool]:
    """Add each document and its job in one transaction; then jobs of other kinds.

    Kills a worker in the middle. Returns the number of jobs, and whether it has killed one.
    """
    has_killed = False
    close.using(delay=timedelta(seconds=5)).enqueue()
    for number, (name, path) in enumerate(documents.items()):
        with queue.engine.begin() as own:
            _add(own, number, name, path)
        has_killed = has_killed or (number > len(documents) / 3 and _kill(console, conn))
    with queue.engine.connect() as own:  # and one that is not committed: neither will exist
        _add(own, len(documents), "rolled back", Path("rolled back"))
    queue.enqueue_many(ask.s() for _ in range(QUESTIONS))
    largest = sorted(enumerate(documents.values()), key=lambda one: one[1].stat().st_size)[-4:]
    recounts = queue.enqueue_many(recount.s(n, str(path)) for n, path in largest)
    return 1 + len(documents) + QUESTIONS + recounts, has_killed


def _add(conn: Connection, number: int, name: str, path: Path) -> None:
    job = count.using(conn).enqueue(number, str(path))
    conn.execute(ADD, {"id": number, "path": name, "job_id": job.id})


REPORT = {
    "How long jobs waited (library.close was delayed by 5 s)": """
select task, state, count(*) as jobs, max(waited) as waited_max,
    percentile_cont(0.5) within group (order by waited) as waited_p50,
    percentile_cont(0.95) within group (order by waited) as waited_p95
from sqlqueue.jobs group by task, state order by task, state desc""",
    "How runs ended": """
select outcome, count(*) as runs, count(*) filter (where final) as final
from sqlqueue.runs group by outcome""",
    "The jobs whose worker was killed, and how much later they had ended": """
select jobs.task, path, crash.run, crash.worker_id as worker, jobs.run as next,
    jobs.worker_id as by, state, jobs.ended_at - crash.ended_at as later
from sqlqueue.runs as crash join sqlqueue.jobs on jobs.id = crash.job_id
left join library.document on document.job_id = jobs.id
where outcome = 'crashed' order by later limit 10""",
    "Failures": r"""
select path, attempt, substring(traceback from '[^\n]+\n*$') as traceback
from sqlqueue.runs join library.document on document.job_id = runs.job_id
where final and outcome = 'failed' order by path limit 10""",
    "Top words": """
select word, cast(sum(uses) as bigint) as uses, count(*) as documents
from library.word group by word order by uses desc limit 10""",
}

# Each looks for exceptions to what it says: there must be none.
CHECKS = {
    "every job has ended": "select 1 from sqlqueue.live",
    "each job has exactly one final run": """
        select 1 from sqlqueue.job left join sqlqueue.runs on job_id = job.id and final
        group by job.id having count(job_id) <> 1""",
    "each document has its job and each job its document, also after a rollback": """
        select 1 from library.document full join sqlqueue.jobs on jobs.id = job_id
        where (task = 'library.count') is distinct from (document.id is not null)""",
    "each document was counted once, by the run that ended its job, or failed": """
        select 1 from library.document join sqlqueue.jobs on jobs.id = job_id
        where (state, jobs.run, 1) is distinct from ('succeeded', document.run, times_counted)
        and (state, times_counted) is distinct from ('failed', 0)""",
    "what failed did so three times, each with its traceback": """
        select 1 from sqlqueue.runs
        where outcome = 'failed' and (traceback is null or final <> (attempt = 3))""",
    "the kill cut runs short": """
        select 1 from sqlqueue.runs having bool_or(outcome = 'crashed') is not true""",
    "child processes found the same": """
        select 1 from sqlqueue.jobs, library.document where task = 'library.recount'
        and document.id = cast(args ->> 'document_id' as integer) and result <> to_jsonb(words)""",
    "nothing ran before its time": "select 1 from sqlqueue.jobs where ended_at < due_at",
}
TOTALS = text("select sum(documents), sum(words), sum(lines) from library.shelf")
USES = text("select word, sum(uses) from library.word group by word")
FAILED = text("select args ->> 'path' from sqlqueue.jobs where state = 'failed'")


def _report(console: Console, conn: Connection, documents: Mapping[str, Path]) -> bool:
    """Print what the tables tell, then the checks; return whether all hold."""
    for title, statement in REPORT.items():
        console.print(f"\n[bold]{title}[/]\n[cyan]{escape(statement.strip())}[/]")
        rows = conn.execute(text(statement))
        table = Table(*rows.keys(), box=None, header_style="dim")
        for row in rows:
            table.add_row(*map(_shown, row))
        console.print(table)
    console.print("\n[bold]Checks[/]")
    checks = {claim: not conn.execute(text(sql)).all() for claim, sql in CHECKS.items()}
    checks |= _compared(conn, list(documents.values()))
    for claim, holds in checks.items():
        console.print(f"[green]✓[/] {claim}" if holds else f"[bold red]✗ NOT TRUE:[/] {claim}")
    return all(checks.values())


def _compared(conn: Connection, paths: Sequence[Path]) -> dict[str, bool]:
    """Count everything here, without a queue, and compare it with what the jobs left."""
    words: Counter[str] = Counter()
    lines, broken = 0, set()
    for path in paths:
        try:
            uses, more = counted(path)
        except UnicodeDecodeError:
            broken.add(str(path))
            continue
        words.update(uses)
        lines += more
    totals = (len(paths) - len(broken), words.total(), lines)
    told = "{:,} documents, {:,} words, {:,} lines".format(*totals)
    each = {row.word: row.sum for row in conn.execute(USES)}
    failed = set(conn.scalars(FAILED))
    return {
        f"counted without a queue it is the same: {told}": conn.execute(TOTALS).one() == totals,
        f"so is each of the {len(words):,} different words": each == dict(words),
        f"the {len(broken)} that do not decode failed, no others": failed == broken != set(),
    }


def _shown(value: object) -> str:
    if isinstance(value, timedelta):
        return f"{value.total_seconds():.3f} s"
    return f"{value:,}" if isinstance(value, int) else escape(str(value or "-").strip())
