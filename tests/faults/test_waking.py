"""Bars R26 to R28: a worker that sleeps hears of a job in time, and ringing costs little."""

import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timedelta
from itertools import combinations
from typing import Any, NamedTuple, Self

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import NotSupportedError

from sqlqueue import Job, Queue, Task
from sqlqueue.bench import crew
from sqlqueue.bench import tasks as bench_tasks
from sqlqueue.bench.measures import in_turn
from sqlqueue.embedded import Server
from sqlqueue.integrations.alembic import migrate
from tests.faults.cluster import Cluster
from tests.faults.proxy import Proxy
from tests.harness import CLOCKS, SOON, TTL, program, rows, sleeps, value, wait_until

pytestmark = pytest.mark.alone
LATE = 0.3  # seconds that a start may come after a poll

# R26: every order of the steps of a worker that falls asleep and of who enqueues

POLL = timedelta(seconds=0.6)
PARALLEL = 4
ENQUEUES = {
    "short": ("enqueue and commit",),
    "long": ("enqueue", "commit"),
    "repeatable read": ("snapshot", "enqueue", "commit"),
}


class Order(NamedTuple):
    """One order of the steps of a worker and of a transaction that enqueues."""

    kind: str
    steps: tuple[str, ...]

    def is_heard(self) -> bool:
        """Say whether the look after hanging the bell finds the job, or its enqueuer the bell."""
        theirs = ENQUEUES[self.kind]
        sees = theirs[0] if self.kind != "long" else "enqueue"
        at = self.steps.index
        return at(theirs[-1]) < at("look") or at("arm") < at(sees)


def orders(*worker: str) -> list[Order]:
    """Return all orders in which these steps of a worker and those of a transaction may come."""
    found = []
    for kind, steps in ENQUEUES.items():
        size = len(worker) + len(steps)
        for places in combinations(range(size), len(steps)):
            theirs, ours = iter(steps), iter(worker)
            taken = (next(theirs if place in places else ours) for place in range(size))
            found.append(Order(kind, tuple(taken)))
    return found


class Stepped:
    """A worker of one queue that takes a turn when the test allows it; its sleeps are its own.

    pause  seconds that it means to sleep after its last turn
    """

    def __init__(self, queue: Queue, name: str) -> None:
        self.queue, self.name, self.pause = queue.using(queue=name), name, 0.0
        self.worker = queue.worker(name, poll=POLL)
        self._turn, self.worker._turn = self.worker._turn, self._gated  # type: ignore[method-assign]
        self._changed = threading.Condition()
        self._begun = self._ended = 0
        self._allowed = float("inf")

    def __enter__(self) -> Self:
        self.worker.start()
        wait_until(lambda: self.worker.listener.is_heard)
        return self

    def __exit__(self, *_: object) -> None:
        self.free()
        self.worker.stop()
        assert self.worker.join(10)

    def _gated(self) -> float:
        with self._changed:
            self._changed.wait_for(lambda: self._begun < self._allowed)
            self._begun += 1
        self.pause = self._turn()
        with self._changed:
            self._ended += 1
            self._changed.notify_all()
        return self.pause

    def hold(self) -> None:
        """Allow no further turn."""
        with self._changed:
            self._allowed = self._begun
            assert self._changed.wait_for(lambda: self._begun == self._ended, timeout=10)

    def turn(self) -> None:
        """Allow one more turn; return when it has been taken, after the sleep before it."""
        with self._changed:
            self._allowed = self._ended + 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._ended == self._allowed, timeout=10)

    def free(self) -> None:
        """Allow every turn from now on."""
        with self._changed:
            self._allowed = float("inf")
            self._changed.notify_all()

    def has_bell(self) -> bool:
        """Say whether a bell hangs at its queue."""
        sql = "select exists (select from sqlqueue.doorbell where queue = :name)"
        return bool(value(self.queue.engine, sql, name=self.name))

    def awake(self) -> None:
        """Have it do a job; return when it will hang its bell after a few looks, not before."""
        self.hold()
        job = self.queue.send("nothing")
        while not job.refresh().has_ended or self.has_bell():
            self.turn()

    def sleeps_long(self) -> bool:
        """Say whether its sleep may be as long as a poll."""
        return self.pause > 0.9 * POLL.total_seconds()


class Enqueuer:
    """The steps of a transaction that enqueues."""

    def __init__(self, queue: Queue, kind: str) -> None:
        level = "REPEATABLE READ" if kind == "repeatable read" else "READ COMMITTED"
        self._queue = queue
        self._conn = queue.engine.connect().execution_options(isolation_level=level)
        self._job: Job[Any] | None = None
        self._committed: datetime | None = None

    def take(self, step: str) -> None:
        """Take a step, if it is one of those."""
        if step == "snapshot":
            self._conn.execute(text("select 1"))
        if step.startswith("enqueue"):
            self._job = self._queue.using(self._conn).send("nothing")
        if step.endswith("commit"):
            self._committed = value(self._queue.engine, "select clock_timestamp()")
            self._conn.commit()
            self._conn.close()

    def has_started(self) -> bool:
        """Say whether the job has been committed and claimed."""
        return bool(self._committed and self._job and self._job.refresh().started_at)

    def waited(self) -> float:
        """Return the seconds from the commit to the start of the job."""
        assert self._job
        self._job.wait(SOON)
        return float((self._job.started_at - self._committed).total_seconds())


@pytest.fixture
def try_all(queue: Queue) -> Callable[..., list[float]]:
    """A function that tries all of some orders, and returns the seconds that each job waited."""

    @queue.task(name="nothing")
    async def nothing() -> None: ...

    def tried(all_orders: Sequence[Order], one: Callable[[Stepped, Order], float]) -> list[float]:
        def some(first: int) -> list[float]:
            with Stepped(queue, f"sleepy{first}") as stepped:
                return [one(stepped, order) for order in all_orders[first::PARALLEL]]

        found = [0.0] * len(all_orders)
        with ThreadPoolExecutor(PARALLEL) as threads:
            for first, waits in enumerate(threads.map(some, range(PARALLEL))):
                found[first::PARALLEL] = waits
        return found

    return tried


def fall_asleep(stepped: Stepped, order: Order) -> float:
    """Take the steps of a worker that falls asleep, and of who enqueues."""
    stepped.awake()
    enqueuer = Enqueuer(stepped.queue, order.kind)
    for step in order.steps:
        enqueuer.take(step)
        if step == "arm":
            while not (stepped.has_bell() or enqueuer.has_started()):
                stepped.turn()
        elif step == "look":
            stepped.turn()
        elif step == "sleep":
            stepped.free()
            wait_until(lambda: stepped.sleeps_long() or enqueuer.has_started())
    return enqueuer.waited()


def test_r26_a_job_is_found_in_time_in_every_order_of_falling_asleep_and_enqueuing(try_all) -> None:
    tried = orders("arm", "look", "sleep")
    waits = dict(zip(tried, try_all(tried, fall_asleep), strict=True))

    heard = {order: wait for order, wait in waits.items() if order.is_heard()}
    polled = {order: wait for order, wait in waits.items() if not order.is_heard()}
    print(
        f"{len(waits)} orders: {len(heard)} heard, at most {max(heard.values()):.3f} s;"
        f" {len(polled)} polled, at most {max(polled.values()):.3f} s of {POLL.total_seconds()}"
    )
    assert max(polled.values()) > LATE, "inconclusive: no worker slept"
    assert {order: wait for order, wait in heard.items() if wait > LATE} == {}
    most = POLL.total_seconds() + LATE
    assert {order: wait for order, wait in polled.items() if wait > most} == {}


def die_armed(stepped: Stepped, order: Order) -> float:
    """Take the steps of a worker that dies with its bell hung; another one is left."""
    engine, store = stepped.queue.engine, stepped.queue.store
    names = [stepped.name]
    wait_until(stepped.sleeps_long)
    rows(engine, "delete from sqlqueue.doorbell where queue = :name", name=stepped.name)
    with engine.connect() as conn:
        dead = store.register(conn, TTL, 0, 1, "", "", "", names, [])
        conn.commit()
        enqueuer = Enqueuer(stepped.queue, order.kind)
        for step in order.steps:
            enqueuer.take(step)
            if step == "arm":
                assert store.arm(conn, names, dead, TTL)
            elif step == "look":
                store.lanes(conn, stepped.name, [], False)
            conn.commit()
    waited = enqueuer.waited()
    rows(engine, "delete from sqlqueue.doorbell where worker_id = :dead", dead=dead)
    return waited


def test_r26_a_worker_that_dies_with_its_bell_hung_costs_at_most_a_poll(try_all) -> None:
    tried = orders("arm", "look", "die")
    waits = dict(zip(tried, try_all(tried, die_armed), strict=True))

    print(f"{len(waits)} orders: at most {max(waits.values()):.3f} s of {POLL.total_seconds()}")
    assert max(waits.values()) > LATE, "inconclusive: somebody heard"
    assert {o: w for o, w in waits.items() if w > POLL.total_seconds() + LATE} == {}


# R27: notifications that do not come

SECOND = timedelta(seconds=1)
IN_TIME = 1.2  # seconds: a poll, and a fifth


@pytest.fixture
def task(queue: Queue) -> Task[..., Any]:
    @queue.task(name="nothing")
    async def nothing() -> None: ...

    return nothing


def cut_listener(engine: Engine) -> None:
    """Cut the connection that listens."""
    found = "select pg_terminate_backend(pid) from pg_stat_activity where query = 'listen sqlqueue'"
    assert rows(engine, found), "inconclusive: nobody listens"


@pytest.mark.parametrize("why", ["deaf", "silent", "old snapshot", "dead", "black hole"])
def test_r27_a_missed_ring_costs_at_most_one_poll(engine, queue, task, migrated_url, why) -> None:
    """The worker does not listen, or in vain; nobody rings; or the fresh bell is not seen."""
    took = []
    with (
        Proxy(migrated_url) as proxy,
        engine.connect() as conn,
        closing_engine(Queue(proxy.url)) as behind,
    ):
        behind.tasks = queue.tasks
        with behind.worker(
            "default", **CLOCKS | {"poll": SECOND, "listen": why != "deaf"}
        ) as worker:
            for lane, pause in enumerate((0, 0.7)):  # in a lane that it has not seen yet
                turns = worker.progress
                if why == "old snapshot":
                    rows(engine, "delete from sqlqueue.doorbell")
                    conn.execution_options(isolation_level="REPEATABLE READ")
                    conn.execute(text("select 1"))
                wait_until(lambda until=turns + pause: worker.progress > until)
                if why != "deaf":
                    sleeps(engine)
                if why == "silent":
                    conn.execute(text("set local sqlqueue.ring = 'off'"))
                if why == "dead":
                    cut_listener(engine)
                if why == "black hole":
                    proxy.black_hole(lambda sent: b"listen sqlqueue" in sent)
                job = task.using(conn, priority=lane).enqueue()
                committed = value(engine, "select clock_timestamp()")
                conn.commit()
                job.wait(SOON)
                took.append((job.started_at - committed).total_seconds())
            proxy.heal()

    print(f"{why}: started after {[f'{one:.2f} s' for one in took]}")
    assert max(took) > 0.05, "inconclusive: it was heard"
    assert max(took) < IN_TIME


@contextmanager
def closing_engine(queue: Queue) -> Iterator[Queue]:
    """Give a queue, and close its connections at the end."""
    yield queue
    queue.engine.dispose()


def fill_notifications(url: str) -> None:
    """Notify until there is no room for more, because a listener has not read them."""
    with psycopg.connect(url, autocommit=True) as conn, suppress(psycopg.OperationalError):
        for n in range(100_000):
            conn.execute("select pg_notify('noise', %s)", (f"{n}{'x' * 7900}",))


def test_r27_a_full_notification_queue_fails_nobody(caplog) -> None:
    """Somebody listens, and idles in a transaction: all later notifications are kept for him."""
    with (
        Cluster({"max_notify_queue_pages": "64"}) as cluster,
        closing_engine(Queue(cluster.url)) as queue,
    ):
        plain = cluster.url.replace("+psycopg", "")
        migrate(queue.engine)
        running, may_end = threading.Event(), threading.Event()

        @queue.task(name="nothing")
        async def nothing() -> None: ...

        @queue.task(name="hold")
        def hold() -> None:
            running.set()
            assert may_end.wait(20)

        with (
            queue.worker("default", **CLOCKS | {"poll": SECOND, "slots": 1}) as worker,
            closing(psycopg.connect(plain, autocommit=True)) as idler,
        ):
            idler.execute("listen noise")
            idler.execute("begin")
            idler.execute("select 1")
            fill_notifications(plain)
            took = []
            for _ in range(3):
                sleeps(queue.engine)
                job = nothing.enqueue()
                job.wait(SOON)
                took.append((job.started_at - job.created_at).total_seconds())
            sleeps(queue.engine)
            held = hold.enqueue()
            assert running.wait(10)
            assert held.cancel()
            may_end.set()
            (usage,) = idler.execute("select pg_notification_queue_usage()").fetchone()
            worker.stop()
            assert worker.join(10)
            died = value(queue.engine, "select died_at from sqlqueue.worker")

    print(f"usage {usage:.2f}: started after {[f'{one:.2f} s' for one in took]}")
    assert usage > 0.9, "inconclusive: the queue was not full"
    assert max(took) < IN_TIME
    assert "_turn" not in caplog.text, "a turn was in vain"
    assert died, "the worker that stopped did not say so"


def test_r27_an_enqueue_that_does_not_ring_can_be_prepared_for_two_phase_commit() -> None:
    with (
        Server(durable=False, settings={"max_prepared_transactions": "2"}) as server,
        closing_engine(Queue(create_engine(server.create_database("prepared")))) as queue,
    ):
        engine = queue.engine
        migrate(engine)

        @queue.task(name="nothing")
        def nothing() -> None: ...

        with queue.worker("default", **CLOCKS | {"poll": SECOND}):
            sleeps(engine)
            with engine.connect() as conn:
                nothing.using(conn).enqueue()
                with pytest.raises(NotSupportedError, match="PREPARE a transaction that"):
                    conn.exec_driver_sql("prepare transaction 'loud'")
            with engine.connect() as conn:
                conn.execute(text("set local sqlqueue.ring = 'off'"))
                job = nothing.using(conn).enqueue()
                conn.exec_driver_sql("prepare transaction 'quiet'")
            with queue.autocommit() as conn:
                committed = value(engine, "select clock_timestamp()")
                conn.exec_driver_sql("commit prepared 'quiet'")
            job.wait(SOON)
            took = (job.started_at - committed).total_seconds()

    print(f"prepared: started {took:.2f} s after its commit")
    assert took < IN_TIME


# R28: what ringing costs


@contextmanager
def listening(engine: Engine) -> Iterator[Callable[[], list[str]]]:
    """Give a function that returns the notifications since it was last called."""
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("listen sqlqueue")
        end = "0 echo end of the test's notifications"

        def heard() -> list[str]:
            conn.execute("select pg_notify('sqlqueue', %s)", (end,))
            found: list[str] = []
            for one in conn.notifies(timeout=10):
                if one.payload == end:
                    break
                found.append(one.payload)
            return [payload for payload in found if " echo " not in payload]

        yield heard


def test_r28_nobody_rings_unless_a_worker_sleeps(engine, queue, task) -> None:
    may_end = threading.Event()

    @queue.task(name="hold")
    def hold() -> None:
        assert may_end.wait(20)

    with listening(engine) as heard, queue.worker("default", **CLOCKS, slots=1):
        hold.enqueue()
        wait_until(lambda: value(engine, "select count(*) from sqlqueue.lease"))
        heard()
        for _ in range(20):
            task.enqueue()
        while_busy = heard()

        may_end.set()
        wait_until(lambda: value(engine, "select count(*) from sqlqueue.live") == 0)
        sleeps(engine)
        task.enqueue()
        while_asleep = heard()

    print(f"busy: {len(while_busy)} of 20 rang; asleep: {len(while_asleep)} of 1")
    assert while_busy == []
    assert len(while_asleep) == 1


def test_r28_the_bell_of_a_dead_worker_rings_no_more(engine, queue, task) -> None:
    with listening(engine) as heard:
        bell = "insert into sqlqueue.doorbell values ('default', now() + :lasts, 7)"
        rows(engine, bell, lasts=timedelta(milliseconds=-1))
        task.enqueue()
        assert heard() == []
        rows(engine, bell, lasts=SECOND)
        task.enqueue()
        assert len(heard()) == 1


PAIRS = 7
CLIENTS = 16
BACKLOG = 60_000  # jobs that keep two workers busy


@contextmanager
def working(url: str, situation: str) -> Iterator[None]:
    """Have worker processes in this situation; return when it has lasted for 5 seconds."""
    engine = create_engine(url)
    if situation == "killed":
        with program(url, "app.work(('rings',), {})"):
            sleeps(engine)
    copies = {"busy": 2, "half idle": 4}.get(situation, 0)
    if situation == "busy":
        naps = bench_tasks.nap.using(queue="rings")
        bench_tasks.at(url).enqueue_many(naps.s(n) for n in range(BACKLOG))
    with crew.running(crew.worker, url, "rings", copies=copies) as ask:
        ask("begin")
        threading.Event().wait(5)
        yield
        ask("stop")
    engine.dispose()


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("situation", ["busy", "killed", "half idle"])
def test_r28_ringing_costs_enqueuers_little(create_database, situation) -> None:
    url = create_database()
    engine = create_engine(url)
    migrate(engine)
    silent = make_url(url).update_query_dict({"options": "-csqlqueue.ring=off"})
    silent_url = silent.render_as_string(hide_password=False)

    with (
        working(url, situation),
        listening(engine) as heard,
        crew.running(crew.client, url, "rings", copies=CLIENTS) as ringing,
        crew.running(crew.client, silent_url, "rings", copies=CLIENTS) as quiet,
    ):
        heard()
        pairs = in_turn(
            PAIRS, *(lambda some=some: sum(some("ours", 2)) for some in (ringing, quiet))
        )
        rung = len(heard())
    engine.dispose()

    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    said = ", ".join(f"{ours:.0f}/{theirs:.0f}" for ours, theirs in pairs)
    print(f"{situation}: {rung} rings, {ratio:.2f} of the rate without ringing ({said} jobs/s)")
    assert ratio >= 0.9
    if situation == "half idle":
        assert rung, "inconclusive: nobody slept"
    else:
        assert rung == 0
