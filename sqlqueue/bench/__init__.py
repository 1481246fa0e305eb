"""The benchmark: each figure beside its ceiling, which bare psycopg reaches in the same run.

`sqlqueue bench` measures in a database that it creates and drops, by default on an embedded
server that is as durable as any. The pairs of ours and bare are measured in turn, in processes
of their own, and the figure is the pair with the median ratio: others may use the machine.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from sqlqueue.bench import measures
from sqlqueue.bench.crew import PLAIN, connect
from sqlqueue.bench.measures import FULL, QUICK, Figure, Scale
from sqlqueue.embedded import Server
from sqlqueue.testing import throwaway

Measure = Callable[[str, Scale], Iterator[Figure]]
SHORT: list[Measure] = [measures.enqueue, measures.bulk, measures.drain, measures.pickup]
LONG: list[Measure] = [measures.unheard, measures.ring, measures.memory]


def bench(url: str | None, *, quick: bool, as_json: bool, only: Sequence[Measure] = ()) -> int:
    """Measure, and print the figures on stdout, progress on stderr.

    Without a url it starts a durable embedded server. Quick takes less than a minute; otherwise
    the long measures are taken too. `only` names the measures to take.
    """
    scale, chosen = (QUICK, SHORT) if quick else (FULL, SHORT + LONG)
    with ExitStack() as stack:
        url = url or stack.enter_context(Server()).url
        figures = measure(url, scale, only or chosen)
    if as_json:
        print(json.dumps({figure.name: figure.as_json() for figure in figures}, indent=1))
    else:
        print(*(figure.as_line() for figure in figures), sep="\n")
    return 0


def measure(url: str, scale: Scale, chosen: Sequence[Measure]) -> list[Figure]:
    """Take measures in a new database on the server of `url`; return their figures."""
    figures = []
    with throwaway(url, f"sqlqueue_bench_{os.getpid()}") as new:
        with connect(new) as conn:
            conn.execute(PLAIN)
        for each in chosen:
            print(f"measuring {each.__name__} ...", file=sys.stderr, flush=True)
            for figure in each(new, scale):
                print(f"  {figure.as_line()}", file=sys.stderr, flush=True)
                figures.append(figure)
    return figures
