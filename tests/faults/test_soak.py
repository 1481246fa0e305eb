"""Bar R37: a soak at half load, of half an hour, or as long as SQLQUEUE_SOAK_SECONDS says."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import Engine, text

from sqlqueue import Policy, Queue
from tests.faults.load import MIXED, Load, migrated, percentile, wait, working
from tests.harness import rows, value, wait_until, workers

pytestmark = pytest.mark.alone
SIZES = """
select relname, pg_relation_size(oid)
from pg_class
where relkind in ('r', 'i', 't') and relpersistence = 'p'
"""
DONE = """
select cast(coalesce(sum(n_tup_ins), 0) as bigint)
from pg_stat_user_tables
where relname like 'run_%'
"""
WAITED = """
select extract(epoch from started_at - due_at)
from sqlqueue.run
where job_id = any (cast(:ids as uuid[])) and run = 1
"""
# What grows with history until the retention drops it, a partition at a time.
HISTORY = ("job_", "run_", "log_", "tick", "unique_claim")


@dataclass(frozen=True)
class Sample:
    """What was seen at one time of the soak.

    sizes   bytes of each relation
    memory  bytes of each worker process, by its id
    p99     seconds that plain jobs waited since the last sample
    ping    seconds that a trivial statement took: how busy the machine is with other things
    done    runs so far
    """

    at: float
    sizes: dict[str, int]
    memory: dict[int, int]
    p99: float
    ping: float
    done: int


def resident(pid: int) -> int:
    """Return the bytes of memory that a process alone has."""
    found = Path(f"/proc/{pid}/smaps_rollup").read_text()
    private = [line.split()[1] for line in found.splitlines() if line.startswith("Private")]
    return 1024 * sum(map(int, private))


def sample(engine: Engine, load: Load, began: float, seconds: float) -> Sample:
    """Look at everything once, after some seconds."""
    pings = []
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            wait(0.02)
            at = time.monotonic()
            conn.execute(text("select 1"))
            pings.append(time.monotonic() - at)
    ids: list[UUID] = load.plain()[-1000:]
    return Sample(
        at=time.monotonic() - began,
        sizes={row[0]: row[1] for row in rows(engine, SIZES)},
        memory={pid: resident(pid) for pid in sorted(workers(engine).values())},
        p99=percentile([float(row[0]) for row in rows(engine, WAITED, ids=ids)], 99),
        ping=percentile(pings, 99),
        done=value(engine, DONE),
    )


def capacity(engine: Engine, queue: Queue, seconds: float) -> float:
    """Return how many runs a second the workers end when there is always something to do."""
    with Load(queue, rate=10_000, kinds=MIXED, batch=20, depth=200):
        settle = time.monotonic() + seconds / 2
        wait_until(lambda: time.monotonic() > settle, within=seconds)
        before, began = value(engine, DONE), time.monotonic()
        wait_until(lambda: time.monotonic() > began + seconds, within=2 * seconds)
        rate = (value(engine, DONE) - before) / (time.monotonic() - began)
    wait_until(lambda: value(engine, "select count(*) from sqlqueue.live") < 10, within=60)
    return rate


@pytest.mark.nightly
@pytest.mark.timeout(0)
def test_r37_a_soak_at_half_load_grows_nothing_for_ever() -> None:
    seconds = float(os.environ.get("SQLQUEUE_SOAK_SECONDS", "1800"))
    samples: list[Sample] = []
    with migrated({}) as cluster, working(cluster.url) as queue:
        engine = queue.engine
        queue.set_policy(Policy(concurrency=8), queue="limited")
        most = capacity(engine, queue, min(20, seconds / 4))
        with Load(queue, rate=most / 2, kinds=MIXED) as load:
            began = time.monotonic()
            while not samples or samples[-1].at < seconds:
                samples.append(sample(engine, load, began, min(10, seconds / 20)))
                write_down(samples[-1])
        offered = load.sent / samples[-1].at

    judge(samples, offered, most)


def write_down(one: Sample) -> None:
    """Add a sample to the file that SQLQUEUE_SOAK_FILE names, if it does."""
    if file := os.environ.get("SQLQUEUE_SOAK_FILE"):
        with Path(file).open("a") as lines:
            lines.write(f"{one!r}\n")


def judge(samples: list[Sample], offered: float, most: float) -> None:
    """Fail if a relation, the memory of a process or the latency grew."""
    first, second = samples[: len(samples) // 4], samples[len(samples) // 2 :]
    third, last = second[: len(second) // 2], second[len(second) // 2 :]

    def drift(of: Callable[[Sample], float], quantile: int) -> float:
        """Return the second half in terms of the first quarter; the first quartile, or the second.

        The first is that of the quieter moments: what others do on this machine comes and goes.
        """
        then, now = (statistics.quantiles(map(of, some))[quantile - 1] for some in (first, second))
        return now / then

    memory = [drift(lambda one, pid=pid: one.memory[pid], 2) for pid in first[0].memory]
    latency, ping = drift(lambda one: one.p99, 1), drift(lambda one: one.ping, 1)
    growing = {
        name: (before, size)
        for name, size in last[-1].sizes.items()
        if not name.startswith(HISTORY)
        and size > max(1.1 * (before := max(one.sizes.get(name, 0) for one in third)), 1 << 20)
    }
    print(
        f"{samples[-1].at:.0f} s at {offered:.0f} jobs/s, {offered / most:.0%} of what was"
        f" possible; {samples[-1].done} runs; growing: {growing or 'nothing'};"
        f" memory {', '.join(f'{one - 1:+.1%}' for one in memory)};"
        f" p99 {latency - 1:+.1%}, that of a trivial statement {ping - 1:+.1%}"
    )
    assert offered >= 0.4 * most, "inconclusive: the load was not offered"
    assert not growing
    assert max(memory) <= 1.05
    assert ping <= 1.2 or latency <= 1.2, "inconclusive: the machine became slower"
    assert latency <= 1.2
