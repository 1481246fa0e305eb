"""The processes of the benchmark: workers, bare loops and clients.

Each runs one function, that of its role, which says when it is ready and then answers orders
that come through a pipe. What is bare uses psycopg and the SQL of the product, nothing else of it.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import count, islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeAlias, cast

import psycopg
from sqlalchemy import make_url

from sqlqueue.bench import tasks
from sqlqueue.cli.crew import SWITCH_EVERY
from sqlqueue.literal import new_id
from sqlqueue.options import Options
from sqlqueue.process import die_with_parent
from sqlqueue.queue import Queue
from sqlqueue.store import Store, statement

Pipe: TypeAlias = "Connection[Any, Any]"
BATCH = 500  # jobs that a bare loop claims and finishes at a time
SLOW_BATCH = 5  # jobs in each transaction of a slow client
HELD_OPEN = 0.02  # seconds that it takes at most to commit
CONTEXT = get_context("forkserver")  # as clean as spawn; what it preloads, no child imports again

PLAIN = "create table plain (like sqlqueue.job including all)"
PLAIN_INSERT = """
insert into plain (id, timeout, priority, attempts, max_crashes, keep, task, queue, args)
values (%(id)s, %(timeout)s, %(priority)s, %(attempts)s, %(max_crashes)s, %(keep)s, %(task)s,
    %(queue)s, %(args)s)
"""
BULK_INSERT = """
with added as (
    insert into sqlqueue.job (
        id, timeout, priority, attempts, max_crashes, keep, task, queue, args
    )
    select id, cast(%(timeout)s as interval), cast(%(priority)s as smallint),
        cast(%(attempts)s as smallint), cast(%(max_crashes)s as smallint),
        cast(%(keep)s as boolean), cast(%(task)s as text), cast(%(queue)s as text), given.args
    from unnest(cast(%(ids)s as uuid[]), cast(%(args)s as jsonb[])) as given (id, args)
    returning id
)
insert into sqlqueue.ready (job_id, due_at, priority, queue)
select id, now(), cast(%(priority)s as smallint), cast(%(queue)s as text) from added
"""


class Report(NamedTuple):
    """What a process that ran jobs says of them.

    cpu     seconds of processor time, of all threads
    stamps  what tasks noted, by the number of the job
    claims  (when, seconds) of each claim, if they were timed
    """

    cpu: float
    stamps: dict[int, float]
    claims: list[tuple[float, float]]


class Crew:
    """Some processes of one role."""

    def __init__(self, pipes: Sequence[Pipe]) -> None:
        self._pipes = pipes

    def ask(self, order: Any) -> list[Any]:
        """Give all of them an order; return their answers when all have answered."""
        for pipe in self._pipes:
            pipe.send(order)
        return self.answers()

    def answers(self) -> list[Any]:
        """Wait for an answer from each. Raises RuntimeError if one has died."""
        try:
            return [pipe.recv() for pipe in self._pipes]
        except EOFError:
            raise RuntimeError("a process of the benchmark died; it said why above") from None


@contextmanager
def running(role: Callable[..., None], *args: Any, copies: int = 1) -> Iterator[Crew]:
    """Start processes that run `role(pipe, *args)`; lend them once they are ready; end them."""
    CONTEXT.set_forkserver_preload([__name__])
    pipes, processes = [], []
    for _ in range(copies):
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=role, args=(theirs, *args), name=f"bench {role.__name__}")
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        crew = Crew(pipes)
        crew.answers()
        yield crew
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(timeout=5)
            process.kill()
            process.join()


def connect(url: str) -> psycopg.Connection:
    """Return a bare connection, in autocommit."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(plain, autocommit=True)


def worker(pipe: Pipe, url: str, name: str, options: dict[str, Any]) -> None:
    """Be a worker process, as the supervisor starts them. Orders: begin, and stop."""
    die_with_parent()
    sys.setswitchinterval(SWITCH_EVERY)
    queue = tasks.at(url)
    timed = Timed(queue.store)
    queue.store = cast(Store, timed)
    ours = queue.worker(name, **options)
    pipe.send("ready")
    pipe.recv()
    cpu = time.process_time()
    ours.start()
    pipe.send("started")
    pipe.recv()
    ours.stop()
    ours.join()
    pipe.send(Report(time.process_time() - cpu, dict(tasks.stamps), timed.claims))


class Timed:
    """A Store that notes how long each claim takes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.claims: list[tuple[float, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def claim(self, *args: Any) -> Any:
        """Claim, and note for how long."""
        began = time.perf_counter()
        rows = self._store.claim(*args)
        self.claims.append((time.time(), time.perf_counter() - began))
        return rows


class Bare:
    """What a worker does in the database, by bare psycopg on one connection."""

    def __init__(self, url: str, name: str) -> None:
        self.conn = connect(url)
        self._queue = name
        self._floor = 0
        me = {"ttl": timedelta(hours=1), "pid": 0, "slots": BATCH, "host": "", "name": "bare"}
        lists = {"version": "", "queues": "{}", "tasks": "{}"}
        self._worker = self._rows("register", {**me, **lists})[0][0]

    def _rows(self, name: str, params: dict[str, Any]) -> list[Any]:
        return self.conn.execute(statement(name, "sqlqueue"), params).fetchall()

    def arm(self) -> None:
        """Hang a bell that rings for as long as anybody measures."""
        params = {"queues": [self._queue], "worker": self._worker, "patience": timedelta(hours=1)}
        self.conn.execute(statement("arm", "sqlqueue"), params)

    def turn(self, ended: Sequence[Any]) -> list[Any]:
        """Finish some jobs and claim others, in one transaction."""
        # A client-side cursor sends two statements in one round trip.
        begin = "begin;" + statement("begin", "sqlqueue")
        psycopg.ClientCursor(self.conn).execute(begin, {"patience": "60000ms"})
        if ended:
            self._finish(ended)
        lane = {"queue": self._queue, "priority": 0, "is_suspect": False}
        own = {"floor": self._floor, "slots": BATCH, "worker": self._worker}
        rows = self._rows("claim", {**lane, **own})
        self.conn.commit()
        self._floor = rows[-1][2] if rows else self._floor
        return rows

    def _finish(self, ended: Sequence[Any]) -> None:
        empty = dict.fromkeys(("waits", "results", "error_types", "errors", "tracebacks"), "{}")
        params = {
            "job_ids": "{" + ",".join([row[0] for row in ended]) + "}",
            "runs": "{" + ",".join([str(row[1]) for row in ended]) + "}",
            "outcomes": "{" + ",".join(["succeeded"] * len(ended)) + "}",
            "rans": "{" + ",".join(["0"] * len(ended)) + "}",
            "patience": None,
        }
        self._rows("finish", {**params, **empty})


def bare_loop(pipe: Pipe, url: str, name: str, *_: Any) -> None:
    """Be the ceiling of a drain: claim and finish until there is nothing. Orders as `worker`."""
    die_with_parent()
    bare = Bare(url, name)
    pipe.send("ready")
    pipe.recv()
    cpu = time.process_time()
    pipe.send("started")
    rows = bare.turn(())
    while rows:
        rows = bare.turn(rows)
    pipe.recv()
    pipe.send(Report(time.process_time() - cpu, {}, []))


def bare_listener(pipe: Pipe, url: str, name: str) -> None:
    """Be the ceiling of latency: listen, and claim when it rings. Orders as `worker`."""
    die_with_parent()
    bare = Bare(url, name)
    stamps: dict[int, float] = {}
    pipe.send("ready")
    pipe.recv()
    bare.conn.execute("listen sqlqueue")
    bare.arm()
    pipe.send("started")
    rows = bare.turn(())
    while rows or not pipe.poll():
        now = time.time()
        stamps |= {json.loads(row[4])["n"]: now for row in rows}
        rows = bare.turn(rows)
        while not rows and not pipe.poll():
            heard = list(bare.conn.notifies(timeout=0.1, stop_after=1))
            if not heard or heard[0].payload.endswith(f" {name}"):
                rows = bare.turn(())
    pipe.recv()
    pipe.send(Report(0.0, stamps, []))


def client(pipe: Pipe, url: str, name: str) -> None:
    """Be a client. Orders: (way, how much).

    ours    enqueues one by one for some seconds; answers how many in a second
    plain   the same with plain rows of the same size, in transactions of SQLAlchemy
    driver  the same by bare psycopg
    slow   commits a number of transactions slowly; answers when each job was committed
    """
    die_with_parent()
    queue = tasks.at(url)
    ways: dict[str, Callable[[Any], object]] = {
        "ours": partial(_rate, partial(tasks.on_loop.using(queue=name).enqueue, 1)),
        "plain": partial(_rate, _commits(queue, name)),
        "driver": partial(_rate, _inserts(url, name)),
        "slow": partial(_enqueue_slowly, queue, name, count(os.getpid() * 10_000_000)),
    }
    pipe.send("ready")
    with suppress(EOFError):
        while True:
            way, amount = pipe.recv()
            pipe.send(ways[way](amount))


def _rate(one: Callable[[], object], seconds: float) -> float:
    """Do it again and again for some time; return how often in a second."""
    began, times = time.monotonic(), 0
    while (passed := time.monotonic() - began) < seconds:
        one()
        times += 1
    return times / passed


def _plain_row(name: str) -> dict[str, Any]:
    return Options(queue=name).params | {"task": tasks.on_loop.name, "args": '{"n":1}'}


def _inserts(url: str, name: str) -> Callable[[], object]:
    """Return what inserts one plain row of the size of a job, by bare psycopg."""
    conn, row = connect(url), _plain_row(name)
    return lambda: conn.execute(PLAIN_INSERT, {**row, "id": new_id()})


def _commits(queue: Queue, name: str) -> Callable[[], object]:
    """Return what inserts such a row as an application does, in a transaction of SQLAlchemy."""
    row = _plain_row(name)

    def one() -> None:
        with queue.engine.begin() as conn:
            conn.exec_driver_sql(PLAIN_INSERT, {**row, "id": new_id()})

    return one


def _enqueue_slowly(
    queue: Queue, name: str, numbers: Iterator[int], transactions: int
) -> dict[int, float]:
    """Enqueue a few jobs in each transaction, held open for a while; return when it committed."""
    task = tasks.stamp.using(queue=name)
    sent: dict[int, float] = {}
    for _ in range(transactions):
        some = list(islice(numbers, SLOW_BATCH))
        with queue.engine.begin() as conn:
            queue.using(conn).enqueue_many(task.s(n) for n in some)
            time.sleep(random.uniform(0, HELD_OPEN))
        sent |= dict.fromkeys(some, time.time())
    return sent
