"""What is measured, and how: each measure yields figures beside their ceilings, taken in turn.

Jobs are enqueued before the clock of a drain starts, by another process than the one that runs
them. History is kept: no measure removes anything.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import make_url

from sqlqueue.bench import tasks
from sqlqueue.bench.crew import client, connect, running, worker
from sqlqueue.job import Job
from sqlqueue.literal import array, new_id
from sqlqueue.task import Task
from sqlqueue.worker import WorkerOptions

Pair = tuple[float, float | None]
CLIENTS = 16
BULK_BATCH = 1000  # rows in a statement, as enqueue_many has them
WARM_UP = 20  # samples that are not counted, while the worker begins to listen
PICKUP_EVERY = 0.05  # seconds
UNHEARD, UNHEARD_EVERY = 20, 1.37  # samples, and seconds: out of step with the polling
BACKLOG = 40_000  # jobs that keep workers busy
PATIENCE = timedelta(minutes=5)  # with a last job

BULK_INSERT = """
with added as (
    insert into sqlqueue.job (id, timeout, priority, attempts, max_crashes, keep, task, queue, args)
    select id, %(timeout)s, %(priority)s, %(attempts)s, %(max_crashes)s, %(keep)s, %(task)s,
        %(queue)s, args
    from unnest(cast(%(ids)s as uuid[]), cast(%(args)s as jsonb[])) as given (id, args)
    returning id, priority, queue
)
insert into sqlqueue.ready (job_id, due_at, priority, queue)
select id, now(), priority, queue from added
"""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How much is done.

    pairs      of ours and bare, an odd number
    seconds    of each enqueue measure
    bulk, drained, in_processes, million  jobs
    samples    of latency, on each side
    """

    pairs: int
    seconds: float
    bulk: int
    drained: int
    in_processes: int
    samples: int
    million: int = 1_000_000


QUICK = Scale(pairs=3, seconds=0.4, bulk=20_000, drained=15_000, in_processes=2000, samples=80)
FULL = Scale(pairs=7, seconds=2, bulk=100_000, drained=60_000, in_processes=10_000, samples=600)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure, measured once or more, each time together with its ceiling.

    pairs  (ours, ceiling), in the order measured; the ceiling is None where there is none
    note   for people
    """

    name: str
    unit: str
    pairs: Sequence[Pair]
    note: str = ""

    @property
    def middle(self) -> Pair:
        """The pair with the median ratio: the pairs are odd in number, so it is one of them."""
        ranked = sorted(self.pairs, key=lambda pair: pair[0] / (pair[1] or 1))
        return ranked[len(ranked) // 2]

    @property
    def ratio(self) -> float | None:
        """Ours as a part of the ceiling, median of the pairs."""
        ours, ceiling = self.middle
        return ours / ceiling if ceiling else None

    def as_json(self) -> dict[str, Any]:
        """Return what --json says of it."""
        value, ceiling = self.middle
        parts = {"value": value, "unit": self.unit, "ceiling": ceiling, "ratio": self.ratio}
        return parts | {"pairs": self.pairs}

    def as_line(self) -> str:
        """Return what people read of it."""
        value, ceiling = self.middle
        line = f"{self.name:<16}{value:>12,.2f} {self.unit:<7}"
        if ceiling is not None:
            line += f" of {ceiling:>12,.2f}   x {self.ratio:<5.2f}"
        if len(self.pairs) > 1 and ceiling is not None:
            line += " of " + " ".join(f"{a / b:.2f}" for a, b in self.pairs if b)
        return f"{line}  {self.note}".rstrip()


def in_turn(times: int, ours: Callable[[], float], bare: Callable[[], float]) -> list[Pair]:
    """Measure both `times` times, in turn; which goes first changes each time."""
    pairs: list[Pair] = []
    for number in range(times):
        early = bare() if number % 2 else None
        pairs.append((ours(), bare() if early is None else early))
    return pairs


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest of the values that `percent` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def enqueue(url: str, scale: Scale) -> Iterator[Figure]:
    """Enqueue one by one, each in a transaction of its own.

    The ceiling is plain rows of the same size, inserted by an application through the same
    SQLAlchemy engine; and, far above, by bare psycopg on a connection that it keeps.
    """
    for clients in (1, CLIENTS):
        with running(client, url, "enqueue", copies=clients) as ask:
            for name, way in (("enqueue", "plain"), ("driver", "driver")):
                pairs = in_turn(scale.pairs, *(_rate(ask, one, scale) for one in ("ours", way)))
                yield Figure(name=f"{name}_{clients}", unit="jobs/s", pairs=pairs)


def _rate(ask: Callable[..., list[Any]], way: str, scale: Scale) -> Callable[[], float]:
    return lambda: sum(ask(way, scale.seconds))


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
                conn.execute(
                    BULK_INSERT, row | {"ids": array(ids[some]), "args": array(args[some])}
                )
        return scale.bulk / (time.monotonic() - began)

    yield Figure(name="bulk", unit="jobs/s", pairs=in_turn(scale.pairs, ours, bare))


class Drained(NamedTuple):
    """How a drain went: jobs a second, µs of Python and bytes of WAL for each; what tasks noted."""

    rate: float
    cpu: float
    wal: float
    notes: dict[int, float]


def drain(url: str, scale: Scale) -> Iterator[Figure]:
    """Run jobs that do nothing; the ceiling is a loop of the same statements on one connection."""
    few, many = scale.in_processes, scale.drained
    ways = {
        "bare": partial(_drain, url, tasks.on_loop, many, is_bare=True),
        "drain_async": partial(_drain, url, tasks.on_loop, many),
        "drain_thread": partial(_drain, url, tasks.in_thread, many),
        "drain_process": partial(_drain, url, tasks.in_process, few, slots=2),
        "drain_async_2": partial(_drain, url, tasks.on_loop, 2 * many, copies=2),
        "bare_2": partial(_drain, url, tasks.on_loop, 2 * many, copies=2, is_bare=True),
    }
    rounds = [{name: take() for name, take in ways.items()} for _ in range(scale.pairs)]
    for name in ("drain_async", "drain_thread", "drain_process", "drain_async_2"):
        bare = "bare_2" if name.endswith("_2") else "bare"
        pairs = [(one[name].rate, one[bare].rate) for one in rounds]
        yield Figure(name=name, unit="jobs/s", pairs=pairs)
    pairs = [(one["drain_async"].cpu, one["bare"].cpu) for one in rounds]
    yield Figure(name="cpu_per_job", unit="us", pairs=pairs)
    alone = [(one["drain_async"].wal, None) for one in rounds]
    yield Figure(name="wal_per_job", unit="bytes", pairs=alone)


def _drain(url: str, task: Task[Any, Any], jobs: int, **options: Any) -> Drained:
    """Enqueue jobs, then have workers run them all. Raises RuntimeError if one was not run.

    The clock runs in the database, from the first turn that ended jobs to the last: what it
    takes to start a process is not counted. WAL is that of the jobs' whole life.
    """
    with connect(url) as conn:
        [(began, lsn)] = conn.execute("select now(), pg_current_wal_insert_lsn()").fetchall()
        bound = task.using(queue="drain")
        tasks.at(url).enqueue_many(bound.s(n) for n in range(jobs - 1))
        last = bound.enqueue(jobs - 1)
        with running(worker, url, "drain", **options) as ask:
            ask("begin")
            last.wait(PATIENCE)
            said = ask("stop")  # once the jobs that are held have ended
        [(ended, first, seconds, wal)] = conn.execute(
            SINCE, {"began": began, "lsn": lsn}
        ).fetchall()
    if ended != jobs:
        raise RuntimeError(f"{jobs} jobs were enqueued and {ended} ended")
    cpu = sum(cpu for cpu, _ in said) / jobs * 1e6
    return Drained((jobs - first) / seconds, cpu, wal / jobs, said[0][1])


def pickup(url: str, scale: Scale) -> Iterator[Figure]:
    """Enqueue a job now and then; time from its commit to its start, on an idle worker."""
    late = _latency(url, ["pickup", "pickup-bare"] * (WARM_UP + scale.samples), PICKUP_EVERY / 2)
    ours, bare = late[2 * WARM_UP :: 2], late[2 * WARM_UP + 1 :: 2]
    note = f"p95 {percentile(ours, 95):.2f} of {percentile(bare, 95):.2f}"
    for percent in (50, 99):
        pairs = [(percentile(ours, percent), percentile(bare, percent))]
        yield Figure(name=f"pickup_p{percent}", unit="ms", pairs=pairs, note=note)


def unheard(url: str, scale: Scale) -> Iterator[Figure]:
    """Do what `pickup` does with LISTEN off: the longest wait, beside the poll interval."""
    late = _latency(url, ["unheard"] * UNHEARD, UNHEARD_EVERY, listen=False)
    limit = WorkerOptions().poll.total_seconds() * 1000
    yield Figure(name="unheard_max", unit="ms", pairs=[(max(late), limit)])


def _latency(url: str, names: Sequence[str], every: float, **options: Any) -> list[float]:
    """Enqueue one job in each queue named, at a pace; return ms from commit to start, in order.

    The first queue is that of a worker, with `-bare` after its name it is that of a bare one.
    """
    tasks.at(url)
    bound = {name: tasks.stamp.using(queue=name) for name in set(names)}
    sent: list[tuple[Job[Any], float]] = []
    with (
        running(worker, url, names[0], **options) as ours,
        running(worker, url, f"{names[0]}-bare", is_bare=True) as bare,
    ):
        ours("begin")
        bare("begin")
        for n, name in enumerate(names):
            time.sleep(every)
            sent.append((bound[name].enqueue(n), time.time()))
        for job, _ in sent:
            job.wait(PATIENCE)
        starts = ours("stop")[0][1] | bare("stop")[0][1]
    return [(starts[n] - at) * 1000 for n, (_, at) in enumerate(sent)]


def ring(url: str, scale: Scale) -> Iterator[Figure]:
    """Enqueue from many clients while workers are busy, or just keep up; the ceiling is silence."""
    silent = make_url(url).update_query_dict({"options": "-csqlqueue.ring=off"})
    silent_url = silent.render_as_string(hide_password=False)
    naps = tasks.nap.using(queue="ring_busy")
    tasks.at(url).enqueue_many(naps.s(n) for n in range(BACKLOG))
    for name, workers in (("ring_busy", 2), ("ring_keep_up", 4)):
        with (
            running(worker, url, name, copies=workers) as ask,
            running(client, url, name, copies=CLIENTS) as ringing,
            running(client, silent_url, name, copies=CLIENTS) as quiet,
        ):
            ask("begin")
            pairs = in_turn(scale.pairs, *(_rate(some, "ours", scale) for some in (ringing, quiet)))
            ask("stop")
        yield Figure(name=name, unit="jobs/s", pairs=pairs, note=f"{workers} workers")


def memory(url: str, scale: Scale) -> Iterator[Figure]:
    """Run a million jobs in one worker: the most memory it took, beside that after 100,000."""
    drained = _drain(url, tasks.weigh, scale.million)
    pairs = [(drained.notes[scale.million] / 1e6, drained.notes[tasks.WEIGH_EVERY] / 1e6)]
    note = f"{scale.million:,} jobs at {drained.rate:,.0f} jobs/s"
    yield Figure(name="memory", unit="MB", pairs=pairs, note=note)
