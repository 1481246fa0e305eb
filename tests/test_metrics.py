"""Metrics, probes, and what autoscalers and Grafana ask."""

import json
import re
import urllib.error
import urllib.request
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy import create_engine, text

from sqlqueue import Queue, Retry
from sqlqueue.cli import main
from sqlqueue.integrations.alembic import migrate
from sqlqueue.metrics import Probes, page
from sqlqueue.reports import Reports
from tests.faults.cluster import Cluster
from tests.harness import POLLING, rows, wait_until, work

ROOT = Path(__file__).parent.parent
SAMPLE = re.compile(r'^([a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\]|\\.)*",?)*)\})? (-?[0-9.e+-]+|\+Inf)$')


def samples(told: str) -> dict[str, float]:
    """The samples of a page, each of which must be well-formed."""
    found = {}
    for line in told.splitlines():
        if not line.startswith("#"):
            match = SAMPLE.match(line)
            assert match, line
            found[f"{match[1]}{{{match[2] or ''}}}"] = float(match[3])
    return found


def metrics(queue: Queue) -> dict[str, float]:
    with queue.engine.connect() as conn:
        return samples(page(Reports(conn, queue.store.schema)))


def test_the_page_says_what_there_is_and_what_there_was(queue) -> None:
    @queue.task(name="odd.task", retry=Retry(attempts=1))
    def odd(fails: bool) -> None:
        if fails:
            raise ValueError

    for fails in (False, False, True):
        odd.enqueue(fails)
    work(queue)
    odd.using(queue="other").enqueue(False)
    told = metrics(queue)

    assert told['sqlqueue_jobs{queue="other",state="ready"}'] == 1
    assert told['sqlqueue_jobs{queue="default",state="failed"}'] == 1
    of = 'queue="default",task="odd.task"'
    assert told[f'sqlqueue_ended_total{{{of},outcome="succeeded"}}'] == 2
    assert told[f'sqlqueue_ended_total{{{of},outcome="failed"}}'] == 1
    assert told[f"sqlqueue_run_seconds_count{{{of}}}"] == 3
    assert told[f'sqlqueue_run_seconds_bucket{{{of},le="+Inf"}}'] == 3
    buckets = [v for k, v in told.items() if k.startswith(f"sqlqueue_wait_seconds_bucket{{{of}")]
    assert buckets == sorted(buckets)
    assert told['sqlqueue_health{check="version"}'] == 1


def test_m25_counters_never_fall(queue, engine) -> None:
    @queue.task(name="does")
    def does() -> None:
        pass

    before: dict[str, float] = {}
    for step in (
        "select 1",
        "select sqlqueue.fold(now() + interval '2 minutes')",
        "select sqlqueue.fold(now() + interval '3 days')",
        "delete from sqlqueue.run",
        "update sqlqueue.flow set at = at - interval '1 year'; select sqlqueue.fold(now())",
    ):
        does.enqueue()
        work(queue)
        rows(engine, step)
        told = {k: v for k, v in metrics(queue).items() if "_total" in k or "_bucket" in k}
        assert {k: v for k, v in before.items() if told.get(k, 0) < v} == {}
        before = told
    assert before['sqlqueue_ended_total{queue="default",task="does",outcome="succeeded"}'] == 5


def test_large_counters_are_exact_and_tasks_beyond_200_are_one(queue, engine) -> None:
    rows(engine, "insert into sqlqueue.total (queue, task, enqueued)"
         " select 'q', 't' || n, 12345000 + n from generate_series(1, 202) n")  # fmt: skip
    told = metrics(queue)
    assert told['sqlqueue_enqueued_total{queue="q",task="t202"}'] == 12345202
    assert told['sqlqueue_enqueued_total{queue="q",task="other"}'] == 12345001 + 12345002
    assert 'sqlqueue_enqueued_total{queue="q",task="t2"}' not in told


def test_the_command_writes_the_page(migrated_url) -> None:
    told = CliRunner().invoke(main, ["--url", migrated_url, "stats", "--prometheus"])
    assert told.exit_code == 0
    assert "sqlqueue_slots{}" in samples(told.stdout)


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.alone
def test_m25_without_postgres_a_worker_lives_and_is_not_ready() -> None:
    with Cluster() as cluster:
        migrate(create_engine(cluster.url))
        queue = Queue(cluster.url)
        worker = queue.worker("default", **POLLING | {"ttl": timedelta(seconds=3)})
        with worker:
            probes = Probes(0, lambda: [worker])
            wait_until(lambda: get(probes.port, "/ready")[0] == 200)
            assert get(probes.port, "/live")[0] == get(probes.port, "/started")[0] == 200
            assert "sqlqueue_worker_slots" in get(probes.port, "/metrics")[1]
            assert get(probes.port, "/nothing")[0] == 404
            cluster.stop()
            wait_until(lambda: get(probes.port, "/ready")[0] == 503)
            assert get(probes.port, "/live")[0] == 200
            cluster.start()
            wait_until(lambda: get(probes.port, "/ready")[0] == 200, within=20)
        assert get(probes.port, "/ready")[0] == 503


def queries(document: object) -> list[str]:
    """The statements of a Grafana dashboard."""
    if isinstance(document, dict):
        own = [document["rawSql"]] if "rawSql" in document else []
        return own + [one for value in document.values() for one in queries(value)]
    listed = document if isinstance(document, list) else []
    return [one for value in listed for one in queries(value)]


def test_m25_the_queries_of_grafana_run(engine) -> None:
    document = json.loads((ROOT / "docs/grafana/postgres.json").read_text())
    found = queries(document)
    assert len(found) >= 5
    with engine.connect() as conn:
        for query in found:
            sql = re.sub(r"\$__timeFilter\((\w+)\)", r"\1 > now() - interval '1 h'", query)
            conn.execute(text(sql.replace(":", "\\:")))


def test_m25_the_metrics_that_grafana_asks_prometheus_for_exist(queue) -> None:
    does = queue.task(name="does")(lambda: None)
    does.enqueue()
    work(queue)
    does.enqueue()
    with queue.engine.connect() as conn:
        known = set(re.findall(r"^# TYPE (\w+)", page(Reports(conn, "sqlqueue")), re.MULTILINE))
    for name in ("prometheus.json", "alerts.yml"):
        asked = set(re.findall(r"sqlqueue_\w+", (ROOT / "docs/grafana" / name).read_text()))
        assert asked
        assert {re.sub("_(bucket|sum|count)$", "", one) for one in asked} <= known
