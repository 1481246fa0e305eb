"""The processes of the benchmark: workers, bare or ours, and clients.

Each plays one role: a generator that is sent an order for each answer that it yields, the first
when it is ready. What is bare works by psycopg and the SQL of the product, nothing else of it.
"""

import json
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from threading import Event, Thread
from typing import Any, TypeAlias

import psycopg
from sqlalchemy import make_url

from sqlqueue.bench import tasks
from sqlqueue.cli.crew import SWITCH_EVERY
from sqlqueue.literal import array, new_id
from sqlqueue.options import Options
from sqlqueue.process import die_with_parent
from sqlqueue.queue import Queue
from sqlqueue.store import statement
from sqlqueue.worker import Worker

BATCH = 500  # jobs that a bare worker claims and finishes at a time
HOUR = timedelta(hours=1)  # longer than anybody measures
CONTEXT = get_context("forkserver")  # as clean as spawn; what it preloads, no child imports again
Role: TypeAlias = Generator[Any, Any, None]

PLAIN = "create table plain (like sqlqueue.job including all)"
PLAIN_INSERT = """
insert into plain (id, timeout, priority, attempts, max_crashes, keep, task, queue, args)
values (%(id)s, %(timeout)s, %(priority)s, %(attempts)s, %(max_crashes)s, %(keep)s, %(task)s,
    %(queue)s, '{"n":1}')
"""


@contextmanager
def running(
    role: Callable[..., Role], *args: Any, copies: int = 1, **options: Any
) -> Iterator[Callable[..., list[Any]]]:
    """Start processes that play a role; lend what orders all of them and returns their answers.

    Raises RuntimeError if one of them has died.
    """
    CONTEXT.set_forkserver_preload([__name__])
    pipes: list[Any] = []
    processes: list[Any] = []

    def ask(*order: Any) -> list[Any]:
        for pipe in pipes:
            pipe.send(order)
        return [pipe.recv() for pipe in pipes]

    try:
        for _ in range(copies):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_play, args=(theirs, role, args, options))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        for pipe in pipes:
            pipe.recv()
        yield ask
    except EOFError:
        raise RuntimeError("a process of the benchmark died; it said why above") from None
    finally:
        for process in processes:
            process.kill()
            process.join()


def _play(pipe: Any, role: Callable[..., Role], args: Any, options: dict[str, Any]) -> None:
    """Be a process, until killed."""
    die_with_parent()
    playing, order = role(*args, **options), None
    while True:
        pipe.send(playing.send(order))
        order = pipe.recv()


def connect(url: str) -> psycopg.Connection:
    """Return a bare connection, in autocommit."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(plain, autocommit=True)


def worker(url: str, name: str, *, is_bare: bool = False, **options: Any) -> Role:
    """Be a worker process, as the supervisor starts them, or what is possible at best.

    Answers, once it has begun and stopped, with its seconds of processor time, of all threads,
    and what its tasks noted, by the number of the job.
    """
    sys.setswitchinterval(SWITCH_EVERY)
    queue = tasks.at(url)
    ours: Worker | Bare = Bare(queue, url, name) if is_bare else queue.worker(name, **options)
    yield "ready"
    began = time.process_time()
    ours.start()
    yield "begun"
    ours.stop()
    ours.join()
    cpu = time.process_time() - began
    yield cpu, ours.starts() if isinstance(ours, Bare) else dict(tasks.stamps)


class Bare(Thread):
    """What a worker does in the database, by bare psycopg on one connection.

    It finishes jobs and claims others until there are none; then it listens.
    """

    def __init__(self, queue: Queue, url: str, name: str) -> None:
        super().__init__(daemon=True)
        self._turns: list[tuple[float, list[Any]]] = []
        self._told = Event()
        self._conn = connect(url)
        self._conn.execute("listen sqlqueue")
        with queue.engine.begin() as conn:
            worker = queue.store.register(conn, HOUR, 0, BATCH, "", "bare", "", [], [])
            queue.store.arm(conn, [name], worker, HOUR)
        self._lane = {"queue": name, "priority": 0, "is_suspect": False, "floor": 0}
        self._lane |= {"slots": BATCH, "worker": worker}

    def stop(self) -> None:
        """Have it end when it holds no jobs."""
        self._told.set()

    def starts(self) -> dict[int, float]:
        """Return when each job was claimed, by its number."""
        return {json.loads(row[4])["n"]: at for at, rows in self._turns for row in rows}

    def run(self) -> None:
        rows: list[Any] = []
        while rows or not self._told.is_set():
            if rows or self._hears():
                rows = self._turn(rows)
                self._turns.append((time.time(), rows))

    def _hears(self) -> bool:
        """Wait for a ring, not for long; say whether it is time to look for jobs."""
        heard = list(self._conn.notifies(timeout=0.1, stop_after=1))
        return not heard or heard[0].payload.endswith(f" {self._lane['queue']}")

    def _turn(self, ended: Sequence[Any]) -> list[Any]:
        """Finish some jobs and claim others, in one transaction."""
        # A client-side cursor sends two statements in one round trip.
        begin = "begin;" + statement("begin", "sqlqueue")
        psycopg.ClientCursor(self._conn).execute(begin, {"patience": "60000ms"})
        if ended:
            self._finish(ended)
        rows = self._conn.execute(statement("claim", "sqlqueue"), self._lane).fetchall()
        self._conn.commit()
        self._lane["floor"] = rows[-1][2] if rows else self._lane["floor"]
        return rows

    def _finish(self, ended: Sequence[Any]) -> None:
        params = dict.fromkeys(("waits", "results", "error_types", "errors", "tracebacks"), "{}")
        params |= {"job_ids": array(row[0] for row in ended)}
        params |= {"runs": array(row[1] for row in ended), "rans": array([0] * len(ended))}
        params |= {"outcomes": array(["succeeded"] * len(ended))}
        self._conn.execute(statement("finish", "sqlqueue"), {**params, "patience": None})


def client(url: str, name: str) -> Role:
    """Be a client. Ordered (way, seconds), do one thing for so long; answer how often a second.

    ours    enqueues one by one
    plain   the same with plain rows of the same size, in transactions of SQLAlchemy
    driver  the same by bare psycopg
    """
    queue, driver = tasks.at(url), connect(url)
    row = Options(queue=name).params | {"task": tasks.on_loop.name}

    def plain() -> None:
        with queue.engine.begin() as conn:
            conn.exec_driver_sql(PLAIN_INSERT, {**row, "id": new_id()})

    ways: dict[str, Callable[[], object]] = {
        "ours": partial(tasks.on_loop.using(queue=name).enqueue, 1),
        "plain": plain,
        "driver": lambda: driver.execute(PLAIN_INSERT, {**row, "id": new_id()}),
    }
    way, seconds = yield "ready"
    while True:
        one, began, times = ways[way], time.monotonic(), 0
        while (passed := time.monotonic() - began) < seconds:
            one()
            times += 1
        way, seconds = yield times / passed
