"""One job that meets one fault at one point, and what becomes of it.

A worker, or an enqueuer, is led to the failpoint; after the fault the server is started again, a
healthy worker takes over, and what was stopped goes on once it has been stopped for long enough.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from time import monotonic
from uuid import UUID, uuid4

from sqlalchemy import Connection, create_engine, text

from sqlqueue import Queue, Retry, Schedule
from sqlqueue.literal import new_id
from sqlqueue.store import Lane, Store
from tests.conftest import TABLES
from tests.faults.cluster import Cluster
from tests.faults.history import REQUEST, History
from tests.faults.processes import Forks
from tests.harness import (
    CLOCKS,
    is_alive,
    is_stopped,
    outcomes,
    rows,
    value,
    wait_until,
    workers,
)

TTL = timedelta(seconds=2)
WORK = f"app.work(('default',), {CLOCKS | {'ttl': TTL, 'grace': timedelta(0)}!r})"
AT_ONCE = Retry(attempts=100, waits=[timedelta(0)])
IS_OPEN = "select count(*) from pg_stat_activity where state = 'idle in transaction'"
IN_TASK = f"{IS_OPEN} and query like 'insert into effect%'"
# Seconds until the job is due, and seconds that it takes.
DELAYS = {"in_promote_before_commit": 0.5, "in_drop_after_lock": 2.0}
TAKES = {"in_beat": 1.0, "in_hand_back": 2.0}


class Case:
    """A fault at a point: `strike`, then `heal`.

    job_id  of the job that meets it, and the key of its effect
    task    "write", which is transactional, or "linger"
    """

    def __init__(
        self, cluster: Cluster, forks: Forks, point: str, action: str, task: str, folder: Path
    ) -> None:
        self.engine = create_engine(cluster.url, pool_pre_ping=True)
        self.job_id = UUID(new_id())
        self._cluster, self._forks = cluster, forks
        self._point, self._action, self._task = point, action, task
        self._struck = folder / "armed" / "struck"
        self._pids: list[int] = []

    @contextmanager
    def empty(self) -> Iterator[None]:
        """Begin with empty tables; end without processes."""
        with self.engine.begin() as conn:
            for table in (*(f"sqlqueue.{name}" for name in TABLES), "effect", "request"):
                conn.execute(text(f"delete from {table}"))
        try:
            yield
        finally:
            for pid in filter(is_alive, self._pids):
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not any(map(is_alive, self._pids)))
            self.engine.dispose()

    @property
    def history(self) -> History:
        """What its enqueuer knows of the job; one that was killed had been told nothing."""
        is_known = "enqueue" not in self._point or self._action != "kill"
        return History(**{"acknowledged" if is_known else "unknown": {self.job_id}})

    @property
    def outcomes(self) -> list[str]:
        """The outcomes of the job's runs; empty if there is no job."""
        return outcomes(self.engine, self.job_id)

    def strike(self) -> None:
        """Lead a process to the point; return when the fault has struck."""
        is_late = self._point in TAKES  # strikes only in the middle of the task
        if not is_late:
            self._struck.parent.mkdir()
        if "enqueue" in self._point:
            self._start(f"app.enqueue_until_told({str(self.job_id)!r})", is_victim=True)
        else:
            self._enqueue()
            self._start(WORK, is_victim=True)
        if is_late:
            wait_until(lambda: value(self.engine, IN_TASK), what="the middle of the task")
            self._struck.parent.mkdir()
        if self._point == "in_hand_back":
            os.kill(self._pids[0], signal.SIGINT)
        wait_until(self._struck.exists, what="inconclusive: the fault did not strike")
        self._struck_at = monotonic()

    def heal(self) -> None:
        """Have it all go on; return when nothing is left to do, and nobody is in a transaction."""
        victim = self._pids[0]
        if self._action == "crash":
            wait_until(self._cluster.ended, what="inconclusive: Postgres did not crash")
            self._cluster.start()
        if self._action == "kill":
            wait_until(lambda: not is_alive(victim), what="inconclusive: nobody was killed")
        self._start(WORK)
        if self._action == "stop":
            wait_until(lambda: is_stopped(victim), what="inconclusive: nothing was stopped")
            wait_until(lambda: victim not in workers(self.engine).values(), what="its burial")
            wait_until(lambda: monotonic() > self._struck_at + TTL.total_seconds())
            os.kill(victim, signal.SIGCONT)
        if "enqueue" in self._point:
            wait_until(lambda: not is_alive(victim), what="the end of the enqueuer")
        wait_until(self._is_over, within=20, what="the end of the job")
        if self._point == "in_fire_before_commit":
            self._adopt()
        if self._point == "in_drop_after_lock":  # once it has ended, the job is dropped as well
            wait_until(self._is_dropped, what="the drop")
            rows(self.engine, "delete from request")

    def _is_over(self) -> bool:
        """Whether the job has ended, and the victim has too or goes on."""
        left = value(self.engine, "select count(*) from sqlqueue.live")
        ended = value(self.engine, "select count(*) from sqlqueue.run where is_final")
        registered = workers(self.engine).values()
        return (
            not left
            and ended >= len(self.history.acknowledged)
            and all(pid in registered or not is_alive(pid) for pid in self._pids)
            and not value(self.engine, IS_OPEN)
        )

    def _is_dropped(self) -> bool:
        """Tidy up rather than wait for a worker to do so; say whether the job is gone."""
        rows(self.engine, "select sqlqueue.tidy()")
        return not value(self.engine, "select count(*) from sqlqueue.job")

    def _adopt(self) -> None:
        """Take the job that was fired, whose id nobody knew, for the one that was asked for."""
        (fired,) = rows(self.engine, "select job_id as id from sqlqueue.tick")
        self.job_id = fired.id
        rows(self.engine, "update effect set key = cast(:id as text)", id=str(fired.id))
        rows(self.engine, "insert into request values (:id)", id=fired.id)

    def _start(self, code: str, is_victim: bool = False) -> None:
        server = self.engine.url.port, self._cluster.pid
        given = (self._point, self._action, str(self._struck), *server)
        if is_victim:
            code = f"app.be_struck(failpoints.Failpoint{given}); {code}"
        self._pids.append(self._forks.run(code))

    def _enqueue(self) -> None:
        """Add the job, as its point wants it: late, old, of a schedule, held by the dead."""
        queue, point = Queue(self.engine, retry=AT_ONCE), self._point
        if point == "in_fire_before_commit":
            write = queue.task(name="write")(lambda key: None)
            queue.set_schedule("hourly", write.s(str(self.job_id)), HOURLY)
            rows(self.engine, "update sqlqueue.schedule set next_at = date_trunc('hour', now())")
            return
        with self.engine.begin() as conn:
            if point == "in_drop_after_lock":
                self.job_id = old_id(conn)
            conn.execute(REQUEST, {"id": self.job_id})
            delay = timedelta(seconds=DELAYS.get(point, 0))
            bound = queue.using(conn, id=self.job_id, delay=delay)
            bound.send(self._task, str(self.job_id), TAKES.get(point, 0))
            conn.execute(text("update sqlqueue.setting set retention = default"))
            if point == "in_rescue_before_commit":
                _leave_to_the_dead(conn)


HOURLY = Schedule(every=timedelta(hours=1))


def old_id(conn: Connection) -> UUID:
    """Return an id of a week that the usual retention drops, and make its partition."""
    conn.execute(text("update sqlqueue.setting set retention = interval '1 year'"))
    sql = """
        select sqlqueue.keep_partition(
            'job', 'job_' || to_char(week, 'YYYYMMDD'),
            sqlqueue.uuid_at(week)::text, sqlqueue.uuid_at(week + interval '1 week')::text
        ), cast(sqlqueue.uuid_at(week + interval '1 day') as text) as low
        from date_trunc('week', now() - interval '60 days', 'UTC') as week
    """
    low: str = conn.execute(text(sql)).one().low
    return UUID(low[:-12] + uuid4().hex[-12:])


def _leave_to_the_dead(conn: Connection) -> None:
    """Have a worker claim the job that has been silent for an hour."""
    store = Store()
    worker = store.register(conn, TTL, 0, 1, "host", "name", "version", ["default"], ["write"])
    assert store.claim(conn, Lane("default", 0), 0, 1, worker)
    sql = "update sqlqueue.worker set heartbeat_at = now() - interval '1 hour' where id = :id"
    conn.execute(text(sql), {"id": worker})
