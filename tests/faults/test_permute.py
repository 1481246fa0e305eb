"""Bar R21: every order of the verbs in two or three sessions, on jobs in every state."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import product
from time import monotonic
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Connection, Engine, text

from sqlqueue import Job, Policy
from sqlqueue.store import Ended, Executes, Lane, Store
from sqlqueue.transaction import Driver
from tests.conftest import TABLES
from tests.faults.checks import violations
from tests.faults.permute import Look, Session, Stage, Trail, Wait
from tests.test_store import add, claim, hire, silence

TTL = timedelta(seconds=30)
AT_ONCE = timedelta(0)
LANE = Lane("default", 0)
STORE = Store()
UNENDED = "select exists (select from sqlqueue.ready)" + "".join(
    f" or exists (select from sqlqueue.{place})" for place in ("waiting", "scheduled", "lease")
)


class Told(NamedTuple):
    """What a session was told of a job, once it was committed.

    said     what the verb returned
    first    what was committed when its first statement began
    at       what was committed when the statement that matters began
    until    number of its last step
    """

    job: str
    said: Any
    first: Look
    at: Look
    until: int


@dataclass
class World:
    """Jobs and workers as an order finds them, and what sessions were told in it.

    job     the one in the state to be tested; `other` is beside it
    holder  the worker that held the job, or holds it; `worker` lives
    ran     the jobs whose run began after the order
    """

    conn: Connection
    job: str = ""
    other: str = ""
    worker: int = 0
    holder: int = 0
    run: int = 1
    is_gated: bool = False
    is_missing: bool = False
    claims: list[Told] = field(default_factory=list)
    cancels: list[Told] = field(default_factory=list)
    retries: list[Told] = field(default_factory=list)
    ends: dict[tuple[str, int], str] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)


# The states in which an order finds the job


def leased(world: World) -> None:
    (found,) = claim(world.conn, STORE, world.holder, slots=1)
    assert found.job_id == world.job


def ready(world: World) -> None:
    """It has not run yet."""


def running(world: World) -> None:
    """Its worker lives."""
    leased(world)


def silent(world: World) -> None:
    """Its worker has been silent for longer than its ttl, and nobody has noticed yet."""
    world.holder = hire(world.conn, STORE)
    leased(world)
    silence(world.conn, world.holder, 2 * TTL)


def missing(world: World) -> None:
    """The row of its worker was removed."""
    world.is_missing = True
    world.holder = hire(world.conn, STORE)
    leased(world)
    world.conn.execute(text("delete from sqlqueue.worker where id = :id"), {"id": world.holder})


def due(world: World) -> None:
    """Its retry is due."""
    leased(world)
    STORE.finish(world.conn, [Ended(world.job, 1, "failed", AT_ONCE)])


def returned(world: World) -> None:
    """It has been handed back."""
    leased(world)
    STORE.finish(world.conn, [Ended(world.job, 1, "returned", AT_ONCE)])


def failed(world: World) -> None:
    """It has ended."""
    leased(world)
    STORE.finish(world.conn, [Ended(world.job, 1, "failed")])


def limited(world: World, **policy: Any) -> None:
    world.is_gated = True
    STORE.set_policy(world.conn, "queue", "default", Policy(**policy).to_json())


def waiting(world: World) -> None:
    """It waits under a limit of one, as the other does."""
    limited(world, concurrency=1)


def admitted(world: World) -> None:
    """It runs under a limit of one, and the other waits for it."""
    limited(world, concurrency=1)
    STORE.admit(world.conn, "default", 1)
    leased(world)


def kept(world: World) -> None:
    """Its retry is due, and the other waits behind it."""
    limited(world, keeps_order=True)
    STORE.admit(world.conn, "default", 1)
    due(world)


STATES = (
    ready, running, silent, missing, due, returned, failed, waiting, admitted, kept
)  # fmt: skip


# What the sessions do


def driver(conn: Connection) -> Executes:
    return Driver(conn.connection.driver_connection)


def note(world: World, ended: Sequence[Ended]) -> None:
    """Take note of runs that a session was told it has ended."""
    for one in ended:
        if (one.job_id, one.run) in world.ends:
            world.wrong.append(f"{one} had been ended by another session")
        world.ends[one.job_id, one.run] = one.outcome


def turn(session: Session, world: World, worker: int, *ended: Ended, claims: bool = True) -> None:
    """Take a turn of a worker: finish, admit, claim."""
    rows: list[Any] = []
    with session.link.begin(TTL) as conn:
        done = session.store.finish(conn, ended)
        if claims and world.is_gated:
            session.store.admit(conn, LANE.queue, 10)
        if claims:
            rows = list(session.store.claim(conn, LANE, 0, 10, worker))
        look = session.looks[-1]
    until = session.looks[-1].tick
    note(world, [one for one in ended if one.job_id in done])
    world.claims += [Told(row.job_id, row, session.looks[0], look, until) for row in rows]
    if rows and worker not in look.alive:
        world.wrong.append(f"worker {worker} claimed, and was dead")


def end(session: Session, world: World, job: str, outcome: str, wait: timedelta | None) -> None:
    turn(session, world, world.holder, Ended(job, world.run, outcome, wait), claims=False)


def beat(session: Session, world: World, job: str) -> None:
    with session.link.begin(TTL) as conn:
        is_alive = session.store.beat(conn, world.holder, None)
        look = session.looks[-1]
    if is_alive and world.holder not in look.alive:
        world.wrong.append(f"worker {world.holder} beat, and was dead")


def rescue(session: Session, world: World, seen_dead: int | None) -> None:
    with session.link.begin(TTL) as conn:
        found = session.store.rescue(conn, 10, seen_dead)
    note(world, found)


def promote(session: Session, world: World, job: str) -> None:
    with session.link.begin(TTL) as conn:
        session.store.promote(conn, None, 10)


def tell(told: list[Told], session: Session, job: str, said: bool) -> None:
    looks = session.looks
    told.append(Told(job, said, looks[0], looks[-1], looks[-1].tick))


def cancel(session: Session, world: World, job: str) -> None:
    said = Job[Any](session.queue, job).cancel()
    tell(world.cancels, session, job, said)


def replace(session: Session, world: World, job: str) -> None:
    with session.queue.engine.begin() as conn:
        said = session.store.cancel(driver(conn), job, "replaced")
    tell(world.cancels, session, job, said)


def retry(session: Session, world: World, job: str) -> None:
    with session.queue.engine.begin() as conn:
        said = session.store.retry(driver(conn), job)
    tell(world.retries, session, job, said)


def pause(session: Session, world: World, scope: str, name: str) -> None:
    with session.queue.engine.begin() as conn:
        session.store.pause(driver(conn), scope, name, True, "", None, None)


def limit(session: Session, world: World, job: str) -> None:
    with session.queue.engine.begin() as conn:
        session.store.set_policy(driver(conn), "queue", LANE.queue, Policy(concurrency=1).to_json())


def enqueue(session: Session, world: World, job: str) -> None:
    with session.queue.engine.begin() as conn:
        add(conn, session.store)


Verb = Callable[[Session, World, str], None]
VERBS: dict[str, Verb] = {
    "claim": lambda session, world, job: turn(session, world, world.worker),
    "claim by its worker": lambda session, world, job: turn(session, world, world.holder),
    "finish and claim": lambda session, world, job: turn(
        session, world, world.holder, Ended(job, world.run, "failed", AT_ONCE)
    ),
    "finish": lambda session, world, job: end(session, world, job, "succeeded", None),
    "fail": lambda session, world, job: end(session, world, job, "failed", AT_ONCE),
    "fail for good": lambda session, world, job: end(session, world, job, "failed", None),
    "snooze": lambda session, world, job: end(session, world, job, "snoozed", AT_ONCE),
    "hand back": lambda session, world, job: end(session, world, job, "returned", AT_ONCE),
    "beat": beat,
    "rescue": lambda session, world, job: rescue(session, world, None),
    "rescue of the seen": lambda session, world, job: rescue(session, world, world.holder),
    "promote": promote,
    "cancel": cancel,
    "replace": replace,
    "retry": retry,
    "pause the queue": lambda session, world, job: pause(session, world, "queue", LANE.queue),
    "pause the task": lambda session, world, job: pause(session, world, "task", "greet"),
    "limit": limit,
    "enqueue": enqueue,
}
# Those of one job; the others touch any. A beat touches its worker alone, and so does a rescue.
OF_ONE = {"finish", "fail", "fail for good", "snooze", "hand back", "cancel", "replace", "retry"}
MAY_WAIT = {"beat", "cancel", "replace", "retry", "pause the queue", "pause the task", "limit"}


class Act(NamedTuple):
    """A verb, and whether it is aimed at the other job."""

    verb: str
    is_other: bool = False

    def touches(self, act: "Act") -> bool:
        """Say whether two acts touch the same job, or the same worker."""
        if "beat" in (self.verb, act.verb):
            return {self.verb, act.verb} <= {"beat", "rescue", "rescue of the seen"}
        if "enqueue" in (self.verb, act.verb):
            return False
        return not {self.verb, act.verb} <= OF_ONE or self.is_other == act.is_other


# One order


def prepare(conn: Connection, state: Callable[[World], None]) -> World:
    """Commit two jobs of which one is in the state, and nothing else."""
    conn.exec_driver_sql(";".join(f"delete from sqlqueue.{name}" for name in TABLES))
    world = World(conn)
    world.worker = world.holder = hire(conn, STORE)
    world.job, world.other = add(conn, STORE, 2, key="k")
    state(world)
    conn.commit()
    return world


def drain(world: World) -> None:
    """Do what workers do until all jobs have ended; no task fails."""
    conn = world.conn
    conn.execute(text("update sqlqueue.queue set paused_at = null"))
    conn.execute(text("update sqlqueue.policy set paused_at = null"))
    worker = hire(conn, STORE)
    if world.is_missing:
        STORE.tidy(conn)
    for _ in range(10):
        STORE.rescue(conn, 10)
        STORE.promote(conn, None, 10)
        STORE.admit(conn, LANE.queue, 10)
        claim(conn, STORE, worker)
        for one in (worker, world.worker):
            for key, is_cancelled in STORE.leases(conn, one, None).items():
                if not is_cancelled:
                    world.ran.add(key[0])
                STORE.finish(conn, [Ended(*key, "cancelled" if is_cancelled else "succeeded")])
        if not conn.scalar(text(UNENDED)):
            return
    world.wrong.append("jobs are left that no worker ends")


def judge(world: World) -> list[str]:
    """Say what went wrong in an order that has been played."""
    conn, wrong = world.conn, world.wrong
    wrong += [f"after the order: {one}" for one in violations(conn)]
    drain(world)
    wrong += [f"at the end: {one}" for one in violations(conn)]
    runs = conn.execute(text("select job_id, run, outcome, is_final from sqlqueue.run")).all()
    recorded = {(str(job), run): outcome for job, run, outcome, _ in runs}
    finals = {str(job): (run, outcome) for job, run, outcome, is_final in runs if is_final}
    for key, outcome in world.ends.items():
        if recorded.get(key) not in (outcome, "cancelled"):
            wrong.append(f"a session was told that run {key} {outcome}; recorded: {recorded}")
    for one in world.cancels:
        wrong += judge_cancel(world, one, *finals.get(one.job, (0, None)))
    conn.commit()  # a rollback would make the driver forget what it prepared
    return wrong


def judge_cancel(world: World, told: Told, run: int, outcome: str | None) -> Iterator[str]:
    """Say how a cancel was lost: the job ran, or ended otherwise, though nobody retried it."""
    before = told.first.ended.get(told.job)
    if before and not told.said:
        return
    retries = [one for one in world.retries if one.job == told.job and one.said]
    for one in retries:
        # One that was over before the cancel had begun is past. Beside it, either may be first;
        # but of a job that had failed, only one that was first lets the cancel say true.
        if one.until > told.until or (one.until > told.first.tick and before != "failed"):
            return
    if told.job in world.ran:
        yield f"{told.job} ran after a cancel that said {told.said}"
    elif outcome != "cancelled" and (told.job, run) not in world.ends:
        yield f"{told.job} was cancelled and is {outcome}"
    for claimed in world.claims:
        is_later = claimed.job == told.job and claimed.at.tick > told.until
        if is_later and not claimed.said.is_cancelled:
            yield f"{told.job} was claimed after a cancel that said {told.said}"


def play(
    stage: Stage,
    conn: Connection,
    state: Callable[[World], None],
    acts: Sequence[Act],
    choose: Callable[[int], int],
) -> list[Wait]:
    """Play one order; fail if a guarantee is broken in it."""
    world = prepare(conn, state)
    scripts = [
        partial(VERBS[act.verb], world=world, job=world.other if act.is_other else world.job)
        for act in acts
    ]
    waits, order = stage.play(scripts, choose)
    wrong = judge(world)
    for wait in waits:
        act, others = acts[wait.session], [acts[number] for number in wait.others]
        if act.verb not in MAY_WAIT or not all(map(act.touches, others)):
            wrong.append(f"{act} waited for {others} in step {wait.tick}")
    assert wrong == [], f"{state.__name__}: {acts} in the order {order}"
    return waits


# The bar


@pytest.fixture
def stage(engine: Engine, migrated_url: str) -> Iterator[Stage]:
    stage = Stage(migrated_url, 3)
    yield stage
    stage.close()


PAIRS = [
    (Act(one), Act(other, is_other))
    for one, other, is_other in product(VERBS, VERBS, (False, True))
    if ({one, other} <= OF_ONE if is_other else one <= other)
]
ORDERS = [
    pytest.param(20261123, 500, 2, id="short"),
    pytest.param(20261123, 2000, 3, id="triples", marks=pytest.mark.nightly),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("seed", "orders", "sessions"), ORDERS)
def test_r21_an_order_keeps_every_guarantee(stage, engine, seed, orders, sessions) -> None:
    dice = random.Random(seed)
    began, waits = monotonic(), 0
    with engine.connect() as conn:
        for _ in range(orders):
            acts = dice.choice(PAIRS)
            if sessions == 3:
                acts += (Act(dice.choice(list(VERBS)), dice.random() < 0.5),)
            waits += len(play(stage, conn, dice.choice(STATES), acts, dice.randrange))

    took = monotonic() - began
    print(f"seed {seed}: {orders} orders of {sessions} sessions, {waits} waits, {took:.1f} s")
    assert waits >= orders / 100, "inconclusive: hardly anybody ever waited"


def play_all(
    stage: Stage, engine: Engine, state: Callable[[World], None], pairs: Sequence[tuple[Act, Act]]
) -> int:
    """Play every order of some pairs; return how many there are."""
    orders = 0
    with engine.connect() as conn:
        for acts in pairs:
            trail = Trail()
            for _ in trail.plays():
                play(stage, conn, state, acts, trail.choose)
                orders += 1
    return orders


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("state", STATES)
def test_r21_every_order_of_every_pair_keeps_every_guarantee(stage, engine, state) -> None:
    orders = play_all(stage, engine, state, PAIRS)

    print(f"{state.__name__}: {orders} orders of {len(PAIRS)} pairs")


@pytest.mark.parametrize(
    ("state", "one", "other"),
    [
        (ready, "claim", "claim"),
        (waiting, "claim", "claim"),  # one that admits waited for the turn of another
        (ready, "cancel", "claim"),
        (due, "cancel", "promote"),
        (running, "cancel", "fail"),
        (running, "cancel", "hand back"),
        (failed, "cancel", "retry"),  # a cancel said yes of a job that had failed and was retried
        (failed, "retry", "retry"),
        (silent, "finish", "rescue"),
        (silent, "beat", "rescue"),
        (silent, "claim by its worker", "rescue"),
        (silent, "rescue", "rescue"),
    ],
)
def test_r21_in_every_order_of_what_goes_wrong_easily(stage, engine, state, one, other) -> None:
    assert play_all(stage, engine, state, [(Act(one), Act(other))]) >= 4
