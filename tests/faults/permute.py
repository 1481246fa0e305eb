"""Sessions x steps: real sessions of Postgres that go on one statement at a time, in any order.

A session runs its script, which is code of the package, in a thread of its own. Before each
statement, commit and rollback it stops until the schedule lets it go on. If its statement does not
return because another session holds what it needs (pg_blocking_pids), the session waits: the
schedule goes on with the others, all of which stand still meanwhile, so a wait that is seen at all
would last until one of them commits.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import psycopg
from sqlalchemy import create_engine, make_url

from sqlqueue import Queue
from sqlqueue.link import Link
from tests.harness import wait_until

STEPS = ("_execute_gen", "_commit_gen", "_rollback_gen")
LOOK = """
select
    array(select id from sqlqueue.worker where died_at is null and heartbeat_at > now() - ttl),
    coalesce((select json_object_agg(job_id, outcome) from sqlqueue.run where is_final), '{}')
"""
PATIENCE = 10.0  # seconds


class Look(NamedTuple):
    """What was committed when a step began.

    tick   number of the step
    alive  the workers that are neither dead nor silent
    ended  the outcomes of the jobs that have ended
    """

    tick: int
    alive: set[int]
    ended: dict[str, str]


class Wait(NamedTuple):
    """A session that waited for others, by their numbers, in a step."""

    session: int
    others: set[int]
    tick: int


class Gated(psycopg.Connection[Any]):
    """A connection that stops before each step of the session it belongs to."""

    session: "Session | None" = None

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        name = getattr(gen, "__name__", "")
        does_something = name == STEPS[0] or self.pgconn.transaction_status
        if self.session and name in STEPS and does_something:
            self.session.stop(self)
        return super().wait(gen, *args, **kwargs)


class Session:
    """One session, used for one script after another.

    queue   for code that takes its connections from a pool, which holds one here
    link    for code of workers
    looks   of this script, one for each step that has begun
    """

    def __init__(self, url: str) -> None:
        self._url = make_url(url).set(drivername="postgresql")
        engine = create_engine(url, creator=self._connect, pool_size=1, max_overflow=0)
        self.queue = Queue(engine)
        self.store = self.queue.store
        self.link = Link(engine, self.store)
        self.looks: list[Look] = []
        self.pid = 0
        self.error: BaseException | None = None
        self._is_playing = False
        self._may_go = threading.Semaphore(0)
        self._arrived = threading.Event()
        self._thread = threading.Thread()
        with self.link.begin(timedelta(minutes=1)), engine.connect():
            pass  # opens both connections

    def _connect(self) -> Gated:
        conn = Gated.connect(self._url.render_as_string(hide_password=False))
        conn.session = self
        return conn

    def close(self) -> None:
        """Close the connections."""
        self.link.close()
        self.queue.engine.dispose()

    def stop(self, conn: psycopg.Connection[Any]) -> None:
        """Stand still until the schedule lets it go on; called in the thread of the script."""
        if self._is_playing:
            self.pid = conn.info.backend_pid
            self._arrived.set()
            assert self._may_go.acquire(timeout=PATIENCE)

    def start(self, script: Callable[["Session"], None]) -> None:
        """Begin a script, and stop before its first step."""
        self.looks, self.error, self._is_playing = [], None, True
        self._arrived.clear()
        self._thread = threading.Thread(target=self._run, args=(script,))
        self._thread.start()

    def _run(self, script: Callable[["Session"], None]) -> None:
        try:
            script(self)
        except BaseException as error:
            self.error = error
        finally:
            self._is_playing = False
            self._arrived.set()

    def go(self, look: Look) -> None:
        """Begin the next step."""
        self.looks.append(look)
        self._arrived.clear()
        self._may_go.release()

    def has_arrived(self, within: float = 0) -> bool:
        """Say whether it stands before its next step, or has ended."""
        return self._arrived.wait(within)

    @property
    def has_ended(self) -> bool:
        """Whether its script is over."""
        return self._arrived.is_set() and not self._is_playing


class Stage:
    """Sessions, and what looks at them from outside."""

    def __init__(self, url: str, sessions: int) -> None:
        plain = make_url(url).set(drivername="postgresql")
        self.sessions = [Session(url) for _ in range(sessions)]
        self._outside = psycopg.connect(
            plain.render_as_string(hide_password=False), autocommit=True
        )

    def close(self) -> None:
        """Close all connections."""
        self._outside.close()
        for session in self.sessions:
            session.close()

    def play(
        self, scripts: Sequence[Callable[[Session], None]], choose: Callable[[int], int]
    ) -> tuple[list[Wait], str]:
        """Run scripts beside each other; return who waited, and the order of steps.

        `choose` draws one of so many sessions, for each step. Raises what a script raised.
        """
        playing = self.sessions[: len(scripts)]
        waits: dict[tuple[int, int], Wait] = {}
        order = ""
        for session, script in zip(playing, scripts, strict=True):
            session.start(script)
        self._settle(playing, waits)
        while not all(session.has_ended for session in playing):
            free = [one for one in playing if one.has_arrived() and not one.has_ended]
            if free:
                session = free[choose(len(free))]
                order += str(playing.index(session))
                session.go(Look(len(order), *self._look()))
            else:  # they wait for one another, until Postgres ends one of them
                wait_until(lambda: any(one.has_arrived() for one in playing if not one.has_ended))
            self._settle(playing, waits)
        for session in playing:
            if session.error:
                raise session.error
        return list(waits.values()), order

    def _look(self) -> tuple[set[int], dict[str, str]]:
        alive, ended = self._outside.execute(LOOK).fetchone() or ((), {})
        return set(alive), ended

    def _settle(self, playing: Sequence[Session], waits: dict[tuple[int, int], Wait]) -> None:
        """Return when each session stands before a step, has ended, or waits for another."""
        deadline = time.monotonic() + PATIENCE
        goes_on = True
        while goes_on:
            goes_on = False
            for number, session in enumerate(playing):
                if session.has_arrived():
                    continue
                while not session.has_arrived(0.002):
                    if others := self._blocking(playing, session):
                        tick = session.looks[-1].tick
                        waits.setdefault((number, tick), Wait(number, others, tick))
                        break
                    assert time.monotonic() < deadline, "a step neither returns nor waits"
                else:
                    goes_on = True  # others may have waited for what it held

    def _blocking(self, playing: Sequence[Session], session: Session) -> set[int]:
        row = self._outside.execute("select pg_blocking_pids(%s)", [session.pid]).fetchone()
        pids = row[0] if row else []
        return {number for number, other in enumerate(playing) if other.pid in pids}


class Trail:
    """Chooses so that, one play after another, every order is played once."""

    def __init__(self) -> None:
        self._path: list[tuple[int, int]] = []  # chosen, of so many
        self._at = 0

    def choose(self, options: int) -> int:
        """Return what is chosen here in this play."""
        if self._at == len(self._path):
            self._path.append((0, options))
        chosen, before = self._path[self._at]
        assert options == before, "the same order came out otherwise"
        self._at += 1
        return chosen

    def plays(self) -> Iterator[None]:
        """Yield once for each play, until there is no other order."""
        while True:
            self._at = 0
            yield
            while self._path and self._path[-1][0] + 1 == self._path[-1][1]:
                self._path.pop()
            if not self._path:
                return
            chosen, options = self._path.pop()
            self._path.append((chosen + 1, options))
