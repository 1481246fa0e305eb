"""Several databases served by one worker process: they share its slots and nothing else."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from sqlqueue import Job, Queue, Retry, WorkerOptions
from sqlqueue.cli.crew import FAILED, STUCK, Crew, Served, Signs
from sqlqueue.integrations.alembic import migrate
from tests.conftest import TABLES
from tests.faults.cluster import Cluster
from tests.faults.proxy import Proxy
from tests.harness import (
    POLLING,
    ROOT,
    application_table,
    effects,
    rows,
    value,
    wait_until,
    workers,
)

pytestmark = pytest.mark.alone


class Side:
    """An application with a database of its own, whose jobs say when they run.

    `hold` is a task that runs until it is let go; `quick` one that ends soon.
    """

    def __init__(self, url: str, hall: "Hall") -> None:
        queue = self.queue = Queue(url)
        self.gate = threading.Semaphore(0)

        @queue.task(name="hold")
        def hold() -> None:
            hall.enter(self)
            self.gate.acquire()
            hall.leave(self)

        @queue.task(name="quick")
        def quick() -> None:
            hall.enter(self)
            threading.Event().wait(0.002)
            hall.leave(self)

        self.hold, self.quick = hold, quick

    def enqueue(self, count: int) -> None:
        """Enqueue jobs that run until they are let go."""
        self.queue.enqueue_many(self.hold.s() for _ in range(count))

    def has_ended(self) -> bool:
        """Whether no job is left."""
        return value(self.queue.engine, "select count(*) from sqlqueue.live") == 0


class Hall:
    """Where the jobs of all sides meet: who runs beside whom."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: Counter[Side] = Counter()
        self.ran: Counter[Side] = Counter()
        self.most = 0  # that ran at a time, since it was last set to 0

    def enter(self, side: Side) -> None:
        """Begin to run."""
        with self._lock:
            self._inside[side] += 1
            self.most = max(self.most, self._inside.total())

    def leave(self, side: Side) -> None:
        """End."""
        with self._lock:
            self._inside[side] -= 1
            self.ran[side] += 1

    def inside(self, side: Side) -> int:
        """Return how many jobs of a side run."""
        return self._inside[side]

    def has_ended(self, within: float) -> bool:
        """Whether the crew ends within so many seconds."""
        self.thread.join(within)
        return not self.thread.is_alive()

    def has(self, **counts: int) -> Callable[[], bool]:
        """Return a condition: so many run on each side."""
        return lambda: [self._inside[side] for side in self.sides] == list(counts.values())

    sides: list[Side]
    thread: threading.Thread
    code: int | None = None  # what the crew has ended with


@pytest.fixture(scope="module")
def urls(create_database) -> list[str]:
    """The urls of two migrated databases of one server."""
    made = [create_database() for _ in range(2)]
    for url in made:
        migrate(create_engine(url))
    return made


@pytest.fixture
def empty(urls: list[str]) -> list[str]:
    """The same, with empty tables."""
    for url in urls:
        engine = create_engine(url)
        rows(engine, ";".join(f"delete from sqlqueue.{name}" for name in TABLES))
        application_table(engine)
        engine.dispose()
    return urls


@contextmanager
def crew(hall: Hall, *urls: str, **options: Any) -> Iterator[Crew]:
    """Run workers of several databases in this process."""
    hall.sides = [Side(url, hall) for url in urls]
    served = [Served(lambda side=side: side.queue, ["default"]) for side in hall.sides]
    made = Crew(served, WorkerOptions(**POLLING | options), [Signs() for _ in urls])
    thread = hall.thread = threading.Thread(target=lambda: setattr(hall, "code", made.run()))
    thread.start()
    try:
        yield made
    finally:
        for side in hall.sides:
            side.gate.release(1000)
        for _ in range(2):
            made.stop()
        thread.join(20)
        for side in hall.sides:
            side.queue.engine.dispose()
    assert not thread.is_alive()


def test_databases_with_work_share_the_slots_equally_within_one_job_of_each(empty) -> None:
    hall = Hall()
    with crew(hall, *empty, slots=4):
        left, right = hall.sides
        left.enqueue(30)
        wait_until(hall.has(left=4, right=0), what="the slots of an idle database used")
        right.enqueue(30)
        wait_until(hall.has(left=4, right=1), what="a first job beside those that run")
        left.gate.release()
        wait_until(hall.has(left=3, right=1))
        left.gate.release()
        wait_until(hall.has(left=2, right=2), what="its share, as jobs of the other end")

        hall.most = 0
        for number in range(5):
            for side in hall.sides:
                side.gate.release()
                wait_until(lambda n=number, s=side: hall.ran[s] >= n + 1)
                wait_until(hall.has(left=2, right=2))
        assert hall.most == 4

        right.gate.release(100)
        wait_until(right.has_ended)
        wait_until(hall.has(left=4, right=0), what="the slots given back")


def test_one_more_job_of_a_third_database_takes_nothing_for_long(empty) -> None:
    hall = Hall()
    with crew(hall, *empty, slots=4):
        left, right = hall.sides
        right.enqueue(1)
        wait_until(hall.has(left=0, right=1))
        left.enqueue(30)
        wait_until(hall.has(left=3, right=1), what="all that the other does not use")
        left.gate.release(20)
        wait_until(lambda: hall.ran[left] == 20)
        wait_until(hall.has(left=3, right=1))
        assert hall.most <= 5


def test_more_databases_than_slots_have_one_each(empty) -> None:
    hall = Hall()
    with crew(hall, *empty, slots=1):
        left, right = hall.sides
        left.enqueue(3)
        right.enqueue(3)
        wait_until(hall.has(left=1, right=1))
        for number in range(3):
            for side in hall.sides:
                side.gate.release()
                wait_until(lambda n=number, s=side: hall.ran[s] == n + 1)
        wait_until(lambda: left.has_ended() and right.has_ended())
        assert hall.most == 2


def test_quick_jobs_of_two_databases_all_run_once(empty) -> None:
    hall = Hall()
    with crew(hall, *empty, slots=4):
        for side in hall.sides:
            side.queue.pause("default")
            side.queue.enqueue_many(side.quick.s() for _ in range(600))
        for side in hall.sides:
            side.queue.resume("default")
        for side in hall.sides:
            wait_until(side.has_ended, within=20)
        assert [hall.ran[side] for side in hall.sides] == [600, 600]
        assert hall.most <= 5


def test_no_more_jobs_are_run_than_said_but_one_for_each_other_database(empty) -> None:
    hall = Hall()
    with crew(hall, *empty, slots=4, max_jobs=20):
        for side in hall.sides:
            side.queue.enqueue_many(side.quick.s() for _ in range(100))
        wait_until(lambda: hall.ran.total() >= 20)
        for side in hall.sides:
            wait_until(lambda s=side: not workers(s.queue.engine), what="the end of the workers")
        assert hall.ran.total() <= 21
    assert all(outcome == "succeeded" for url in empty for outcome in outcomes(url))


def share(hall: Hall, *counts: int) -> None:
    """Enqueue jobs on both sides; return when they have two slots each."""
    left, right = hall.sides
    right.enqueue(counts[1])
    wait_until(hall.has(left=0, right=4))
    left.enqueue(counts[0])
    wait_until(hall.has(left=1, right=4))
    right.gate.release(2)
    wait_until(hall.has(left=2, right=2))


def turns() -> set[threading.Thread]:
    """The threads of this process in which workers take turns."""
    return {thread for thread in threading.enumerate() if "Worker._turn" in thread.name}


def outcomes(url: str) -> list[str]:
    """Return how all the runs of a database ended."""
    engine = create_engine(url)
    found = [row[0] for row in rows(engine, "select outcome from sqlqueue.run")]
    engine.dispose()
    return found


# A database that is down


@contextmanager
def black_hole() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        taken: list[socket.socket] = []

        def accept() -> None:
            with suppress(OSError):
                while True:
                    taken.append(listener.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/nothing?connect_timeout=60"
            assert taken, "nobody tried to connect"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for one in taken:
                one.close()


def run_beside(hall: Hall, side: Side, jobs: int, slots: int) -> None:
    """Have jobs run on a side, which has all slots meanwhile, and whose worker is never fenced."""
    side.enqueue(jobs)
    places = [slots if one is side else 0 for one in hall.sides]
    wait_until(hall.has(left=places[0], right=places[1]), what="all slots used")
    side.gate.release(jobs)
    wait_until(side.has_ended)
    assert value(side.queue.engine, "select count(*) from sqlqueue.worker") == 1


def test_a_database_that_never_answers_slows_no_other(empty) -> None:
    hall = Hall()
    with black_hole() as hole, crew(hall, hole, empty[0], slots=4) as it:
        run_beside(hall, hall.sides[1], 100, 4)
        it.stop()
        assert hall.has_ended(within=5)
    assert hall.ran[hall.sides[1]] == 100
    assert hall.code == 0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A server of its own, with a migrated database."""
    with Cluster() as cluster:
        engine = create_engine(cluster.url)
        migrate(engine)
        engine.dispose()
        yield cluster


def test_a_database_that_is_down_at_first_is_served_when_it_is_up(empty, cluster) -> None:
    hall = Hall()
    cluster.stop("immediate")
    with crew(hall, empty[0], cluster.url, slots=4):
        left, right = hall.sides
        run_beside(hall, left, 100, 4)

        cluster.start()
        right.enqueue(1)
        wait_until(lambda: hall.inside(right) == 1, what="a job of the database that came back")


def test_a_database_that_crashes_slows_no_other_and_is_served_again(empty, cluster) -> None:
    hall = Hall()
    with crew(hall, empty[0], cluster.url, slots=4):
        left, right = hall.sides
        share(hall, 100, 100)

        cluster.stop("immediate")
        right.gate.release(2)  # ended, but nobody can be told
        wait_until(hall.has(left=4, right=0), what="the slots of the database that is down")
        left.gate.release(200)
        wait_until(left.has_ended)

        cluster.start()
        right.gate.release(200)
        wait_until(right.has_ended)
        assert value(left.queue.engine, "select count(*) from sqlqueue.worker") == 1
    assert hall.ran[left] == 100


def test_a_database_that_falls_silent_slows_no_other_and_is_served_again(empty, caplog) -> None:
    hall = Hall()
    with Proxy(empty[1]) as proxy, crew(hall, empty[0], proxy.url, slots=4):
        left, right = hall.sides
        share(hall, 100, 4)

        proxy.black_hole()
        right.gate.release(2)
        wait_until(hall.has(left=4, right=0), what="the slots of the database that is silent")
        left.gate.release(200)
        wait_until(left.has_ended)
        wait_until(lambda: "could not beat" in caplog.text, what="that it is given up")

        proxy.heal()
        right.gate.release(100)
        right.enqueue(1)
        wait_until(right.has_ended)
        assert value(left.queue.engine, "select count(*) from sqlqueue.worker") == 1
    assert hall.ran[left] == 100


def test_a_database_whose_turns_are_stuck_slows_no_other_and_is_served_again(empty, caplog) -> None:
    hall = Hall()
    with crew(hall, *empty, slots=4), create_engine(empty[1]).connect() as other:
        left, right = hall.sides
        before = wait_until(lambda: len(turns()) == 2 and turns(), what="two workers")
        with other.begin():
            other.execute(text("lock table sqlqueue.ready in access exclusive mode"))
            run_beside(hall, left, 100, 4)
            wait_until(lambda: ": stops working" in caplog.text, what="that it is given up")
            wait_until(lambda: len(turns() & before) == 1, what="the end of the thread that hung")
            run_beside(hall, left, 100, 4)
        right.enqueue(1)
        wait_until(hall.has(left=0, right=1), what="a job of the database that is back")


def test_drain_waits_for_a_database_that_has_not_looked_since_the_last_job(empty) -> None:
    hall = Hall()
    direct = [Queue(url) for url in empty]
    direct[1].send("hold")
    clocks = {"ttl": timedelta(seconds=10)}
    with Proxy(empty[0]) as proxy, crew(hall, proxy.url, empty[1], drain=True, **clocks) as it:
        wait_until(hall.has(left=0, right=1))
        wait_until(lambda: it._members[0].worker.idle_at, what="a look that found nothing")
        proxy.black_hole()
        direct[0].send("quick")
        hall.sides[1].gate.release()
        assert not hall.has_ended(within=1.5)

        proxy.heal()
        assert hall.has_ended(within=10)
    assert [outcomes(url) for url in empty] == [["succeeded"], ["succeeded"]]


def test_a_second_stop_waits_for_no_database_that_is_silent(empty) -> None:
    hall = Hall()
    clocks = {"ttl": timedelta(seconds=10), "grace": timedelta(seconds=60)}
    with Proxy(empty[1]) as proxy, crew(hall, empty[0], proxy.url, **clocks) as it:
        for side in hall.sides:
            side.enqueue(1)
        wait_until(hall.has(left=1, right=1))
        proxy.black_hole()
        it.stop()
        assert not hall.has_ended(within=0.5)
        it.stop()
        assert hall.has_ended(within=5)
        assert outcomes(empty[0]) == ["returned"]
        assert hall.code == FAILED  # so the parent hands back the rest


def test_a_job_that_does_not_end_has_the_whole_process_replaced(empty) -> None:
    hall = Hall()
    with crew(hall, *empty, grace=timedelta(seconds=0.5)):
        left, right = hall.sides
        left.enqueue(1)
        wait_until(hall.has(left=1, right=0))
        right.hold.using(timeout=timedelta(seconds=0.2)).enqueue()
        assert hall.has_ended(within=10)
        assert hall.code == STUCK
    assert [outcomes(url) for url in empty] == [["returned"], ["timed_out"]]


# Processes


class Pair:
    """The two applications of tests/pair.py, and the command that serves both."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls
        self.left, self.right = (Queue(url) for url in urls)

    @contextmanager
    def command(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        """Run `sqlqueue worker` in a session of its own."""
        apps = "tests.pair:left tests.pair:right"
        process = subprocess.Popen(
            [sys.executable, "-m", "sqlqueue", "worker", "--no-listen", *words],
            cwd=ROOT,
            env=os.environ
            | {"SQLQUEUE_TEST_PAIR": " ".join(self.urls), "SQLQUEUE_WORKER_APP": apps},
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def linger(self, key: str, seconds: float) -> None:
        """Enqueue a job on each side."""
        for queue in (self.left, self.right):
            queue.send("linger", key, seconds)

    def ran(self, key: str) -> list[list[int]]:
        """The numbers of the runs that have begun, on each side."""
        return [effects(queue.engine, key) for queue in (self.left, self.right)]


@pytest.fixture
def pair(empty) -> Iterator[Pair]:
    """The two applications, on empty databases."""
    pair = Pair(empty)
    yield pair
    for queue in (pair.left, pair.right):
        queue.engine.dispose()


CLOCK_WORDS = ("--ttl", "3s", "--poll", "250ms")
APPS = ("-A", "tests.pair:left", "-A", "tests.pair:right")


def test_sigterm_hands_back_the_jobs_of_each_database(pair) -> None:
    with pair.command(*APPS, *CLOCK_WORDS, "--grace", "500ms") as process:
        pair.linger("long", 60)
        wait_until(lambda: pair.ran("long") == [[1], [1]], within=20)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0

    assert [outcomes(url) for url in pair.urls] == [["returned"], ["returned"]]
    assert [workers(queue.engine) for queue in (pair.left, pair.right)] == [{}, {}]


def test_a_worker_process_that_dies_has_the_jobs_of_each_database_handed_back_at_once(pair) -> None:
    with pair.command("--ttl", "60s", "--poll", "250ms") as process:
        pair.linger("long", 60)
        wait_until(lambda: pair.ran("long") == [[1], [1]], within=20)
        (left,), (right,) = (workers(one.engine).values() for one in (pair.left, pair.right))
        assert left == right != process.pid
        os.kill(left, signal.SIGKILL)
        wait_until(lambda: pair.ran("long") == [[1, 2], [1, 2]], within=20)
    assert [outcomes(url) for url in pair.urls] == [["crashed"], ["crashed"]]


def test_a_job_forwarded_twice_with_its_id_runs_once(pair) -> None:
    right = pair.right.using(retry=Retry(waits=[timedelta(0)]))
    job = right.send("forward", "forwarded", 1, fails=1)
    with pair.command(*CLOCK_WORDS, "--drain") as process:
        assert process.wait(30) == 0
    assert Job.get(pair.right, job.id).run == 2
    assert Job.get(pair.left, job.id).run == 1
    assert pair.ran("forwarded") == [[1], []]


def test_several_applications_have_no_url_in_common(pair) -> None:
    with pair.command(*APPS, "--url", pair.urls[0]) as process:
        assert process.wait(20) == 2
