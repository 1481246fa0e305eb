"""The benchmark: what it says and that it cleans up; never how fast anything is."""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace

import pytest
from sqlalchemy import create_engine, text

from sqlqueue.bench import SHORT, measure, measures
from sqlqueue.bench.measures import QUICK, Figure, in_turn, percentile

pytestmark = pytest.mark.alone

TINY = replace(QUICK, pairs=1, seconds=0.05, bulk=2000, drained=1500, in_processes=30, samples=5)
UNITS = {
    "enqueue_1": "jobs/s", "driver_1": "jobs/s",
    "enqueue_16": "jobs/s", "driver_16": "jobs/s", "bulk": "jobs/s", "drain_async": "jobs/s",
    "drain_thread": "jobs/s", "drain_process": "jobs/s", "drain_async_2": "jobs/s",
    "pickup_p50": "ms", "pickup_p99": "ms", "cpu_per_job": "us",
    "wal_per_job": "bytes",
}  # fmt: skip


def exists(url: str, database: str) -> bool:
    engine = create_engine(url)
    with engine.connect() as conn:
        found = conn.execute(text("select from pg_database where datname = :n"), {"n": database})
    engine.dispose()
    return found.rowcount == 1


def test_every_figure_stands_beside_the_ceiling_of_its_run(server_url):
    figures = measure(server_url, TINY, SHORT)

    said = {figure.name: json.loads(json.dumps(figure.as_json())) for figure in figures}
    assert {name: one["unit"] for name, one in said.items()} == UNITS
    for name, one in said.items():
        assert one.keys() == {"value", "unit", "ceiling", "ratio", "pairs"}
        assert one["value"] > 0, name
        assert [one["value"], one["ceiling"]] in one["pairs"]
        if name == "wal_per_job":
            assert one["ceiling"] is one["ratio"] is None
        else:
            assert one["ratio"] == pytest.approx(one["value"] / one["ceiling"])
    assert not exists(server_url, f"sqlqueue_bench_{os.getpid()}")


def test_ringing_is_measured_beside_silence(server_url):
    figures = measure(server_url, TINY, [measures.ring])

    assert [figure.name for figure in figures] == ["ring_busy", "ring_keep_up"]
    assert all(ours > 0 and silent > 0 for figure in figures for ours, silent in figure.pairs)


def test_the_ratio_is_the_median_of_the_pairs():
    pairs = [(3.0, 4.0), (9.0, 10.0), (1.0, 2.0)]
    figure = Figure(name="x", unit="ms", pairs=pairs)

    assert figure.ratio == statistics.median(ours / bare for ours, bare in pairs)
    assert figure.middle == (3.0, 4.0)
    assert all(f"{ours / bare:.2f}" in figure.as_line() for ours, bare in pairs)


def test_ours_and_bare_take_turns():
    order: list[str] = []

    in_turn(3, lambda: order.append("ours") or 1.0, lambda: order.append("bare") or 1.0)

    assert order == ["ours", "bare", "bare", "ours", "ours", "bare"]


@pytest.mark.parametrize(("percent", "value"), [(1, 1), (50, 5), (51, 6), (99, 10), (100, 10)])
def test_a_percentile_is_one_of_the_values(percent, value):
    assert percentile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], percent) == value


def test_standard_output_is_one_object_and_nothing_else(server_url):
    program = "import sys; from sqlqueue.bench import bench, measures; "
    program += "bench(sys.argv[1], quick=True, as_json=True, only=[measures.bulk])"

    done = subprocess.run(
        [sys.executable, "-c", program, server_url], capture_output=True, check=True
    )

    assert json.loads(done.stdout).keys() == {"bulk"}
    assert b"measuring bulk" in done.stderr
