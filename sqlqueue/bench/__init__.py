"""The benchmark: each figure beside its ceiling, which bare psycopg reaches in the same run.

`sqlqueue bench` measures in a database that it creates and drops, by default on an embedded
server that is as durable as any. The pairs of ours and bare are measured in turn, in processes
of their own, and the figure is the pair with the median ratio: others may use the machine.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from psycopg import sql
from sqlalchemy import create_engine, make_url

from sqlqueue.bench import measures
from sqlqueue.bench.crew import PLAIN, connect
from sqlqueue.bench.figure import Figure
from sqlqueue.bench.measures import FULL, QUICK, Scale
from sqlqueue.embedded import Server
from sqlqueue.integrations.alembic import migrate

Measure = Callable[[str, Scale], Iterator[Figure]]
MEASURES: dict[str, Measure] = {
    "enqueue": measures.enqueue,
    "bulk": measures.bulk,
    "drain": measures.drain,
    "pickup": measures.pickup,
    "steady": measures.steady,
    "pinned": measures.pinned,
}
LONG: dict[str, Measure] = {
    "unheard": measures.unheard,
    "ring": measures.ring,
    "memory": measures.memory,
}


def bench(url: str | None, *, quick: bool, as_json: bool, only: str | None = None) -> int:
    """Measure, and print the figures on stdout, progress on stderr.

    Without a url it starts a durable embedded server. Quick takes less than a minute; otherwise
    the long measures are taken too. `only` names one measure.
    """
    chosen = MEASURES if quick else MEASURES | LONG
    if only is not None:
        chosen = {only: (MEASURES | LONG)[only]}
    if url is None:
        with Server() as server:
            figures = measure(server.url, QUICK if quick else FULL, chosen)
    else:
        figures = measure(url, QUICK if quick else FULL, chosen)
    if as_json:
        print(json.dumps({figure.name: figure.as_json() for figure in figures}, indent=1))
    else:
        for figure in figures:
            print(figure.as_line())
    return 0


def measure(url: str, scale: Scale, chosen: dict[str, Measure] = MEASURES) -> list[Figure]:
    """Take measures in a new database on the server of `url`; return their figures."""
    figures = []
    with _database(url) as new:
        for name, each in chosen.items():
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            for figure in each(new, scale):
                print(f"  {figure.as_line()}", file=sys.stderr, flush=True)
                figures.append(figure)
    return figures


@contextmanager
def _database(url: str) -> Iterator[str]:
    """Create a migrated database, lend its url, and drop it."""
    name = f"sqlqueue_bench_{os.getpid()}"
    target = make_url(url).set(drivername="postgresql+psycopg", database=name)
    new = target.render_as_string(hide_password=False)
    with connect(url) as admin:
        admin.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        try:
            engine = create_engine(new)
            migrate(engine)
            engine.dispose()
            with connect(new) as conn:
                conn.execute(PLAIN)
            yield new
        finally:
            admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))
