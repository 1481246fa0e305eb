"""Metrics in the text format of Prometheus: of the database, and of one worker; and its probes.

Counters are sums that the database keeps, so no restart and no pruning lowers them.
Source: Prometheus exposition formats, version 0.0.4.
"""

import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from operator import itemgetter
from time import monotonic
from typing import Any

from sqlqueue.process import resident_bytes
from sqlqueue.reports import Reports

TYPE = "text/plain; version=0.0.4; charset=utf-8"


def page(reports: Reports) -> str:
    """Return the metrics of the database."""
    return written("sqlqueue", reports.rows("select * from sqlqueue.metrics"))


def written(prefix: str, samples: Iterable[Mapping[str, Any]]) -> str:
    """Write samples, those of a family together, as the view metrics has them."""
    lines: list[str] = []
    for family, members in groupby(samples, key=itemgetter("family", "kind", "says")):
        name, kind, says = family
        lines += [f"# HELP {prefix}_{name} {says}", f"# TYPE {prefix}_{name} {kind}"]
        for one in members:
            labels = ",".join(f'{label}="{_escaped(of)}"' for label, of in one["labels"].items())
            lines.append(f"{prefix}_{one['name']}{{{labels}}} {one['value']:.17g}")
    return "".join(f"{line}\n" for line in lines)


def _escaped(value: object) -> str:
    return str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


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
    told: list[tuple[str, str, str, Callable[[Any], float]]] = [
        ("claims_total", "counter", "jobs claimed", lambda one: one.taken),
        ("running", "gauge", "jobs that run", lambda one: one.running),
        ("slots", "gauge", "jobs it runs at a time", lambda one: one.slots),
        ("upkeep_rounds_total", "counter", "rounds of upkeep", lambda one: one.upkeep.passes),
        ("turn_age_seconds", "gauge", "since its last turn", lambda o: monotonic() - o.progress),
        ("resident_bytes", "gauge", "memory of its process", lambda _: resident_bytes(os.getpid())),
    ]
    return written("sqlqueue_worker", (
        {"family": name, "kind": kind, "says": says, "name": name, "labels": {"worker": one.id},
         "value": read(one)}
        for name, kind, says, read in told for one in workers
    ))  # fmt: skip
