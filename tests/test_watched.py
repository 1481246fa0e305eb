"""What watching costs: the workers' rate beside a dashboard that somebody looks at."""

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from httpx import Client
from sqlalchemy import create_engine

from sqlqueue import Queue
from sqlqueue.integrations.alembic import migrate
from tests.harness import serving

pytestmark = [pytest.mark.nightly, pytest.mark.alone, pytest.mark.timeout(1800)]
PAIRS, JOBS = 7, 100_000


@pytest.fixture
def url(create_database: Callable[[], str]) -> str:
    url = create_database()
    migrate(create_engine(url))
    return url


@pytest.fixture
def served(url: str) -> Iterator[str]:
    """A dashboard of the database, in a process of its own."""
    with serving(url) as place:
        yield place


def drain(url: str) -> float:
    """Drain JOBS jobs; return how many a second."""
    queue = Queue(url)

    @queue.task(name="nothing")
    async def nothing() -> None:
        pass

    queue.enqueue_many(nothing.s() for _ in range(JOBS))
    began = time.monotonic()
    queue.worker("default", drain=True, slots=50, poll=timedelta(seconds=0.25)).run()
    took = time.monotonic() - began
    queue.engine.dispose()
    return JOBS / took


def test_watching_slows_workers_by_five_percent_at_most(url, served) -> None:
    drain(url)
    ratios = []
    for _ in range(PAIRS):
        alone = drain(url)
        stop = threading.Event()

        def watch(stop: threading.Event = stop) -> None:
            with Client(base_url=served) as site, site.stream("GET", "/events") as events:
                for line in events.iter_lines():
                    if stop.is_set():
                        return
                    if line.startswith("event"):
                        site.get("/")

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        ratios.append(drain(url) / alone)
        stop.set()
    print(f"watched / alone: median {statistics.median(ratios):.2f}, {sorted(ratios)}")
    assert statistics.median(ratios) >= 0.95
