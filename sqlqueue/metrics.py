"""Metrics in the text format of Prometheus: of the database, and of one worker; and its probes.

Counters are sums that the database keeps, so no restart and no pruning lowers them.
Source: Prometheus exposition formats, version 0.0.4.
"""

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic
from typing import Any

from sqlqueue.process import resident_bytes
from sqlqueue.reports import Reports

TYPE = "text/plain; version=0.0.4; charset=utf-8"
TASKS = 200  # labels; the others are one, `other`
OUTCOMES = ("succeeded", "failed", "retried", "cancelled")
Labels = Mapping[str, object]


class Page:
    """Collects the samples of a page."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._lines: list[str] = []

    def add(self, name: str, kind: str, says: str, samples: Iterable[tuple[Labels, float]]) -> None:
        """Add a metric with its samples."""
        name = f"{self._prefix}_{name}"
        self._lines += [f"# HELP {name} {says}", f"# TYPE {name} {kind}"]
        self._lines += [f"{name}{_labels(labels)} {number:g}" for labels, number in samples]

    def histogram(self, name: str, says: str, hists: Iterable[tuple[Labels, Any]]) -> None:
        """Add a histogram of seconds from arrays whose bucket i ends at 2^(i/2) ms."""
        name = f"{self._prefix}_{name}"
        self._lines += [f"# HELP {name} {says}", f"# TYPE {name} histogram"]
        for labels, hist in hists:
            total, middle = 0, 0.0
            for place in range(48):
                number = int(hist[place]) if place < len(hist or ()) else 0
                total += number
                middle += number * 2 ** ((place - 0.5) / 2) / 1000
                if place % 2 == 0:
                    ends = {**labels, "le": f"{2 ** (place / 2) / 1000:g}"}
                    self._lines.append(f"{name}_bucket{_labels(ends)} {total}")
            self._lines.append(f"{name}_bucket{_labels({**labels, 'le': '+Inf'})} {total}")
            self._lines.append(f"{name}_sum{_labels(labels)} {middle:g}")
            self._lines.append(f"{name}_count{_labels(labels)} {total}")

    def __str__(self) -> str:
        return "".join(f"{line}\n" for line in self._lines)


def _labels(labels: Labels) -> str:
    def escaped(value: object) -> str:
        return str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    inner = ",".join(f'{name}="{escaped(value)}"' for name, value in labels.items())
    return f"{{{inner}}}" if inner else ""


def page(reports: Reports) -> str:
    """Return the metrics of the database."""
    made, queues, workers = Page("sqlqueue"), reports.queues(), reports.workers()
    states = ("ready", "waiting", "scheduled", "running", "failed")
    made.add("jobs", "gauge", "jobs in a state; 10001 stands for more", (
        ({"queue": row["queue"], "state": state}, row[state]) for row in queues for state in states
    ))  # fmt: skip
    made.add("oldest_ready_seconds", "gauge", "wait of the job at the head of a queue", (
        ({"queue": row["queue"]}, _seconds(row["oldest_wait"])) for row in queues
    ))  # fmt: skip
    made.add("paused", "gauge", "whether a queue is paused", (
        ({"queue": row["queue"]}, row["paused_at"] is not None) for row in queues
    ))  # fmt: skip
    lives = ("alive", "draining", "late", "dead")
    made.add("workers", "gauge", "worker processes", (
        ({"liveness": one}, sum(row["liveness"] == one for row in workers)) for one in lives
    ))  # fmt: skip
    alive = [row for row in workers if row["liveness"] != "dead"]
    made.add("slots", "gauge", "jobs that run at a time", [({}, sum(r["slots"] for r in alive))])
    made.add("slots_busy", "gauge", "slots in use", [({}, sum(r["busy"] for r in alive))])
    counters = list(_counters(reports))
    made.add("enqueued_total", "counter", "jobs enqueued", (
        (labels, row["enqueued"]) for labels, row in counters
    ))  # fmt: skip
    made.add("ended_total", "counter", "runs that ended so", (
        ({**labels, "outcome": one}, row[one]) for labels, row in counters for one in OUTCOMES
    ))  # fmt: skip
    for name, column in (("wait_seconds", "waited_hist"), ("run_seconds", "ran_hist")):
        says = "how long runs had waited" if column == "waited_hist" else "how long runs took"
        made.histogram(name, says, ((labels, row[column]) for labels, row in counters))
    now = reports.now()
    made.add("schedule_late_seconds", "gauge", "how late a schedule is", (
        ({"schedule": row["name"]}, max((now - row["next_at"]).total_seconds(), 0))
        for row in reports.rows(
            "select name, next_at from sqlqueue.schedules"
            " where is_enabled and next_at is not null order by name"
        )
    ))  # fmt: skip
    made.add("health", "gauge", "whether a check is well", (
        ({"check": row["name"]}, row["level"] == "ok") for row in reports.health()
    ))  # fmt: skip
    return str(made)


def _seconds(span: Any) -> float:
    return float(span.total_seconds()) if span else 0.0


def _counters(reports: Reports) -> Iterator[tuple[Labels, Mapping[str, Any]]]:
    """Yield the sums by queue and task; tasks beyond the largest TASKS are one, by queue."""
    rows = sorted(reports.counters(), key=lambda row: -row["enqueued"])
    yield from (({"queue": row["queue"], "task": row["task"]}, row) for row in rows[:TASKS])
    others: dict[str, dict[str, Any]] = {}
    for row in rows[TASKS:]:
        sums = others.setdefault(row["queue"], {})
        for name in ("enqueued", *OUTCOMES):
            sums[name] = sums.get(name, 0) + row[name]
        for name in ("waited_hist", "ran_hist"):
            both = (sums.get(name) or [], row[name] or [])
            most = max(map(len, both))
            sums[name] = [sum(h[i] if i < len(h) else 0 for h in both) for i in range(most)]
    yield from (({"queue": queue, "task": "other"}, row) for queue, row in sorted(others.items()))


# A worker's own port


class Probes:
    """Answers /live, /ready, /started and /metrics for the workers of a process.

    live     their turns go on, or wait for the database: 200 while that is down
    ready    they have a connection and claim; 503 while they stop
    """

    def __init__(self, port: int, workers: Any) -> None:
        self._workers = workers
        probes = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                code, kind, text = probes.answer(self.path.partition("?")[0])
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                """Say nothing: a probe comes every few seconds."""

        self._server = _bind(port, Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="probes", daemon=True).start()

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Return status, type and text for a path."""
        workers = self._workers()
        if path == "/metrics":
            return 200, TYPE, _of(workers).encode()
        checks = {
            "/live": [_is_live(one) for one in workers],
            "/ready": [one.link.conn is not None and not _is_leaving(one) for one in workers],
            "/started": [one.id > 0 for one in workers],
        }
        if path not in checks:
            return 404, "text/plain", b"/live /ready /started /metrics\n"
        is_ok = all(checks[path])
        return 200 if is_ok else 503, "application/json", json.dumps({"ok": is_ok}).encode()


def _bind(port: int, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    """Listen at a port, or at the next free one: each process of a tree has its own."""
    for one in range(port, port + 100) if port else [0]:
        with suppress(OSError):
            return ThreadingHTTPServer(("", one), handler)
    raise OSError(f"no port is free from {port} on")


def _is_live(worker: Any) -> bool:
    # Without a connection, the turn waits for the database.
    return worker.link.conn is None or monotonic() - worker.progress < _ttl(worker)


def _ttl(worker: Any) -> float:
    return float(worker.options.ttl.total_seconds())


def _is_leaving(worker: Any) -> bool:
    return worker._stop_by is not None or worker.stopped.is_set()


def _of(workers: Iterable[Any]) -> str:
    made, each = Page("sqlqueue_worker"), [({"worker": one.id}, one) for one in workers]
    told: list[tuple[str, str, str, Callable[[Any], float]]] = [
        ("claims_total", "counter", "jobs claimed", lambda one: one.taken),
        ("running", "gauge", "jobs that run", lambda one: one.running),
        ("slots", "gauge", "jobs it runs at a time", lambda one: one.slots),
        ("upkeep_rounds_total", "counter", "rounds of upkeep", lambda one: one.upkeep.passes),
        ("turn_age_seconds", "gauge", "since its last turn", lambda o: monotonic() - o.progress),
    ]
    for name, kind, says, read in told:
        made.add(name, kind, says, [(labels, read(one)) for labels, one in each])
    size = resident_bytes(os.getpid())
    made.add("resident_bytes", "gauge", "memory of its process", [({}, size)])
    return str(made)
