"""What is measured, and how: each measure yields figures, ours and bare taken in turn.

Jobs are enqueued before the clock of a drain starts, by another process than the one that runs
them. History is kept: no measure removes anything.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import psycopg
from sqlalchemy import make_url

from sqlqueue.bench import tasks
from sqlqueue.bench.crew import (
    BULK_INSERT,
    SLOW_BATCH,
    Crew,
    bare_listener,
    bare_loop,
    client,
    connect,
    running,
    worker,
)
from sqlqueue.bench.figure import Figure, in_turn, percentile
from sqlqueue.literal import array, new_id
from sqlqueue.task import Task
from sqlqueue.worker import WorkerOptions

CLIENTS = 16
BULK_BATCH = 1000  # rows in a statement, as enqueue_many has them
WARM_UP = 20  # samples that are not counted, while the worker begins to listen
PICKUP_EVERY = 0.05  # seconds
STEADY_EVERY = 0.002
UNHEARD, UNHEARD_EVERY = 20, 1.37  # samples, and seconds: out of step with the polling
BACKLOG = 40_000  # jobs that keep workers busy
PATIENCE = 300.0  # seconds that a measure waits for its last job

SINCE = """
select sum(jobs)::int, (array_agg(jobs order by ended_at))[1]::int,
    extract(epoch from max(ended_at) - min(ended_at))::float,
    pg_wal_lsn_diff(pg_current_wal_insert_lsn(), %(lsn)s)::float
from (
    select ended_at, count(*) as jobs
    from sqlqueue.run
    where started_at >= %(began)s and is_final
    group by ended_at
) as turn
"""
HAS_JOBS = """
select exists (select from sqlqueue.ready where queue = any (%(names)s))
    or exists (select from sqlqueue.lease where queue = any (%(names)s))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How much is done.

    pairs      of ours and bare, an odd number
    seconds    of each enqueue measure
    bulk, drained, in_processes, pinned, million  jobs
    samples    of latency, on each side
    """

    pairs: int
    seconds: float
    bulk: int
    drained: int
    in_processes: int
    samples: int
    pinned: int
    million: int = 1_000_000


QUICK = Scale(
    pairs=3, seconds=0.4, bulk=20_000, drained=15_000, in_processes=2000, samples=80, pinned=4000
)
FULL = Scale(
    pairs=7, seconds=2, bulk=100_000, drained=60_000, in_processes=10_000, samples=600,
    pinned=200_000,
)  # fmt: skip


def enqueue(url: str, scale: Scale) -> Iterator[Figure]:
    """Enqueue one by one, each in a transaction of its own.

    The ceiling is plain rows of the same size, inserted by an application through the same
    SQLAlchemy engine; and, far above, by bare psycopg on a connection that it keeps.
    """
    for clients in (1, CLIENTS):
        with running(client, url, "enqueue", copies=clients) as crew:
            for name, way in ((f"enqueue_{clients}", "plain"), (f"driver_{clients}", "driver")):
                pairs = in_turn(scale.pairs, *(_rate(crew, one, scale) for one in ("ours", way)))
                yield Figure(name=name, unit="jobs/s", pairs=pairs)


def _rate(crew: Crew, way: str, scale: Scale) -> Callable[[], float]:
    return lambda: sum(crew.ask((way, scale.seconds)))


def bulk(url: str, scale: Scale) -> Iterator[Figure]:
    """Enqueue many at once; the ceiling is a bare `insert ... select from unnest` of the same rows.

    Those are the rows of `job` and of `ready`.
    """
    queue, numbers = tasks.at(url), range(scale.bulk)
    task = tasks.on_loop.using(queue="bulk")
    row = task.options.params | {"task": task.name}

    def ours() -> float:
        began = time.monotonic()
        queue.enqueue_many(task.s(n) for n in numbers)
        return scale.bulk / (time.monotonic() - began)

    def bare() -> float:
        ids, args = [new_id() for _ in numbers], [f'{{"n":{n}}}' for n in numbers]
        with connect(url) as conn, conn.transaction():
            began = time.monotonic()
            for start in range(0, scale.bulk, BULK_BATCH):
                some = slice(start, start + BULK_BATCH)
                arrays = {"ids": "{" + ",".join(ids[some]) + "}", "args": array(args[some])}
                conn.execute(BULK_INSERT, row | arrays)
        return scale.bulk / (time.monotonic() - began)

    yield Figure(name="bulk", unit="jobs/s", pairs=in_turn(scale.pairs, ours, bare))


class Drained(NamedTuple):
    """How a drain went: jobs a second, µs of Python and bytes of WAL for each."""

    rate: float
    cpu: float
    wal: float


def drain(url: str, scale: Scale) -> Iterator[Figure]:
    """Run jobs that do nothing; the ceiling is a loop of the same statements on one connection."""
    few, many = scale.in_processes, scale.drained
    bare, on_loop, in_thread, in_process = [], [], [], []
    for _ in range(scale.pairs):
        bare.append(_drain(url, tasks.on_loop, many, bare_loop))
        on_loop.append(_drain(url, tasks.on_loop, many, worker))
        in_thread.append(_drain(url, tasks.in_thread, many, worker))
        in_process.append(_drain(url, tasks.in_process, few, worker, slots=2))
    each = {"drain_async": on_loop, "drain_thread": in_thread, "drain_process": in_process}
    for name, ours in each.items():
        pairs = [(a.rate, b.rate) for a, b in zip(ours, bare, strict=True)]
        yield Figure(name=name, unit="jobs/s", pairs=pairs)
    yield Figure(
        name="drain_async_2",
        unit="jobs/s",
        pairs=in_turn(
            scale.pairs,
            lambda: _drain(url, tasks.on_loop, 2 * many, worker, 2).rate,
            lambda: _drain(url, tasks.on_loop, 2 * many, bare_loop, 2).rate,
        ),
    )
    pairs = [(a.cpu, b.cpu) for a, b in zip(on_loop, bare, strict=True)]
    yield Figure(name="cpu_per_job", unit="us", pairs=pairs)
    yield Figure(name="wal_per_job", unit="bytes", pairs=[(a.wal, None) for a in on_loop])


def _drain(
    url: str, task: Task[Any, Any], jobs: int, role: Any, copies: int = 1, **options: Any
) -> Drained:
    """Enqueue jobs, then have a crew run them all."""
    with connect(url) as conn:
        before = _mark(conn)
        bound = task.using(queue="drain")
        tasks.at(url).enqueue_many(bound.s(n) for n in range(jobs))
        with running(role, url, "drain", options, copies=copies) as crew:
            crew.ask("begin")
            _await_end(url, ["drain"])
            cpu = sum(report.cpu for report in crew.ask("stop"))
        return _since(conn, before, jobs)._replace(cpu=cpu / jobs * 1e6)


def _mark(conn: psycopg.Connection) -> tuple[Any, ...]:
    return _one(conn, "select now(), pg_current_wal_insert_lsn()")


def _since(conn: psycopg.Connection, before: tuple[Any, ...], jobs: int) -> Drained:
    """Say how jobs went that were enqueued and run since. Raises RuntimeError if any is missing.

    The clock runs in the database, from the first turn that ended jobs to the last: what it
    takes to start a process is not counted. WAL is that of the jobs' whole life.
    """
    began, lsn = before
    ended, first, seconds, wal = _one(conn, SINCE, {"began": began, "lsn": lsn})
    if ended != jobs:
        raise RuntimeError(f"{jobs} jobs were enqueued and {ended} ended")
    return Drained((jobs - first) / seconds, 0.0, wal / jobs)


def _one(conn: psycopg.Connection, query: str, params: Any = None) -> tuple[Any, ...]:
    row = conn.execute(query, params).fetchone()
    assert row is not None
    return row


def pickup(url: str, scale: Scale) -> Iterator[Figure]:
    """Enqueue a job now and then; time from its commit to its start, on an idle worker."""
    late = _latency(url, ["pickup", "pickup-bare"] * (WARM_UP + scale.samples), PICKUP_EVERY / 2)
    ours, bare = late[2 * WARM_UP :: 2], late[2 * WARM_UP + 1 :: 2]
    note = f"p95 {percentile(ours, 95):.2f} of {percentile(bare, 95):.2f}"
    for percent in (50, 99):
        pairs = [(percentile(ours, percent), percentile(bare, percent))]
        yield Figure(name=f"pickup_p{percent}", unit="ms", pairs=pairs, note=note)


def steady(url: str, scale: Scale) -> Iterator[Figure]:
    """Enqueue jobs at a steady rate; time from commit to start."""
    each = 5 * scale.samples
    turns = ["steady"] * each + ["steady-bare"] * each
    late = _latency(url, ["steady"] * WARM_UP + turns * scale.pairs, STEADY_EVERY)[WARM_UP:]
    p99 = [percentile(late[start : start + each], 99) for start in range(0, len(late), each)]
    pairs = list(zip(p99[::2], p99[1::2], strict=True))
    yield Figure(name="steady_p99", unit="ms", pairs=pairs, note=f"at {1 / STEADY_EVERY:.0f}/s")


def unheard(url: str, scale: Scale) -> Iterator[Figure]:
    """Do what `pickup` does with LISTEN off: the longest wait, beside the poll interval."""
    late = _latency(url, ["unheard"] * UNHEARD, UNHEARD_EVERY, listen=False)
    limit = WorkerOptions().poll.total_seconds() * 1000
    yield Figure(name="unheard_max", unit="ms", pairs=[(max(late), limit)])


def _latency(url: str, names: Sequence[str], every: float, **options: Any) -> list[float]:
    """Enqueue one job in each queue named, at a pace; return ms from commit to start, in order.

    The first queue is that of a worker, with `-bare` after its name it is that of a bare listener.
    """
    tasks.at(url)
    bound = {name: tasks.stamp.using(queue=name) for name in set(names)}
    sent: list[float] = []
    with (
        running(worker, url, names[0], options) as ours,
        running(bare_listener, url, f"{names[0]}-bare") as bare,
    ):
        ours.ask("begin")
        bare.ask("begin")
        due = time.monotonic()
        for n, name in enumerate(names):
            due += every
            time.sleep(max(0.0, due - time.monotonic()))
            bound[name].enqueue(n)
            sent.append(time.time())
        _await_end(url, list(bound))
        starts = ours.ask("stop")[0].stamps | bare.ask("stop")[0].stamps
    return [(starts[n] - at) * 1000 for n, at in enumerate(sent)]


def _await_end(url: str, names: list[str]) -> None:
    """Return when no job of these queues is ready or running. Raises RuntimeError if it lasts."""
    deadline = time.monotonic() + PATIENCE
    with connect(url) as conn:
        conn.execute("set enable_seqscan = off")
        while _one(conn, HAS_JOBS, {"names": names})[0]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"jobs of {names} did not end within {PATIENCE:.0f} s")
            time.sleep(0.05)


def pinned(url: str, scale: Scale) -> Iterator[Figure]:
    """Time claims while a snapshot is held open and many jobs are done; the ceiling is before."""
    many = scale.pinned // (CLIENTS * SLOW_BATCH)
    few = max(many // 10, 20)
    with (
        running(worker, url, "pinned", {}) as crew,
        running(client, url, "pinned", copies=CLIENTS) as clients,
        connect(url) as holder,
    ):
        crew.ask("begin")
        clients.ask(("slow", few))  # while caches warm up
        began = time.time()
        clients.ask(("slow", few))
        clean_until = time.time()
        holder.execute("begin isolation level repeatable read")
        holder.execute("select from sqlqueue.job limit 1")
        sent = clients.ask(("slow", many))
        pinned_from = time.time()
        sent += clients.ask(("slow", few))
        _await_end(url, ["pinned"])
        report = crew.ask("stop")[0]
    clean = [1000 * took for at, took in report.claims if began <= at < clean_until]
    held = [1000 * took for at, took in report.claims if at >= pinned_from]
    late = max(report.stamps[n] - at for part in sent for n, at in part.items())
    pairs = [(percentile(held, 50), percentile(clean, 50))]
    note = f"after {scale.pinned:,} jobs; none started later than {late:.3f} s after its commit"
    yield Figure(name="pinned_claim", unit="ms", pairs=pairs, note=note)


def ring(url: str, scale: Scale) -> Iterator[Figure]:
    """Enqueue from many clients while workers are busy, or just keep up; the ceiling is silence."""
    silent = make_url(url).update_query_dict({"options": "-csqlqueue.ring=off"})
    silent_url = silent.render_as_string(hide_password=False)
    naps = tasks.nap.using(queue="ring_busy")
    tasks.at(url).enqueue_many(naps.s(n) for n in range(BACKLOG))
    for name, workers in (("ring_busy", 2), ("ring_keep_up", 4)):
        with (
            running(worker, url, name, {}, copies=workers) as crew,
            running(client, url, name, copies=CLIENTS) as clients,
            running(client, silent_url, name, copies=CLIENTS) as silent_clients,
        ):
            crew.ask("begin")
            both = [_rate(some, "ours", scale) for some in (clients, silent_clients)]
            pairs = in_turn(scale.pairs, *both)
            crew.ask("stop")
        yield Figure(name=name, unit="jobs/s", pairs=pairs, note=f"{workers} workers")


def memory(url: str, scale: Scale) -> Iterator[Figure]:
    """Run a million jobs in one worker: the most memory it took, beside that after 100,000."""
    jobs = tasks.weigh.using(queue="memory")
    with connect(url) as conn:
        before = _mark(conn)
        tasks.at(url).enqueue_many(jobs.s(n) for n in range(scale.million))
        with running(worker, url, "memory", {}) as crew:
            crew.ask("begin")
            _await_end(url, ["memory"])
            weights = crew.ask("stop")[0].stamps
        drained = _since(conn, before, scale.million)
    pairs = [(weights[scale.million] / 1e6, weights[tasks.WEIGH_EVERY] / 1e6)]
    note = f"{scale.million:,} jobs at {drained.rate:,.0f} jobs/s"
    yield Figure(name="memory", unit="MB", pairs=pairs, note=note)
