"""Bars R1 to R9: processes that die."""

import os
import random
import signal

import pytest

from tests.faults.checker import assert_nothing_wrong, drained
from tests.faults.history import Enqueuers
from tests.faults.nemesis import Nemesis
from tests.harness import is_alive, tree, value, wait_until, workers

pytestmark = pytest.mark.alone

SEEDS = [
    pytest.param(20261123, 25, id="short"),
    *(pytest.param(seed, 60, id=f"long {seed}", marks=pytest.mark.nightly) for seed in range(10)),
]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("seed", "seconds"), SEEDS)
def test_r01_no_acknowledged_job_is_lost(
    queue, engine, migrated_url, tables, seed, seconds
) -> None:
    def kill(dice: random.Random) -> str | None:
        alive = sorted(pid for pid in workers(engine).values() if is_alive(pid))
        if not alive:
            return None
        os.kill(victim := dice.choice(alive), signal.SIGKILL)
        return f"worker process {victim}"

    with tree(migrated_url, 4, slots=4):
        wait_until(lambda: len(workers(engine)) == 4, within=20, what="four workers")
        with (
            Enqueuers(queue, seed=seed, rate=50, max_crashes=1000) as enqueuers,
            Nemesis(seed, {"kill": kill}) as nemesis,
        ):
            wait_until(lambda: nemesis.log and nemesis.log[-1][0] > seconds, within=seconds + 30)
        drained(engine)

    crashed = value(engine, "select count(*) from sqlqueue.run where outcome = 'crashed'")
    jobs = len(enqueuers.history.acknowledged)
    print(f"seed {seed}: {jobs} jobs, {nemesis.count('kill')} kills, {crashed} crashed runs")
    assert nemesis.count("kill") >= seconds / 3, f"inconclusive: few were killed\n{nemesis}"
    assert crashed, "inconclusive: nobody was killed at work"
    assert_nothing_wrong(engine, enqueuers.history)
