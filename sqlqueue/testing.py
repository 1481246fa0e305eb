"""For the tests of applications: run what is due, look at what was enqueued, move time.

Everything happens in a real database; nothing is replaced.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from sqlalchemy import create_engine, make_url, text

from sqlqueue.integrations.alembic import migrate
from sqlqueue.queue import Queue
from sqlqueue.task import Task

AT_ONCE = timedelta(0)
POLL = timedelta(seconds=0.02)
TABLES = (
    "job", "ready", "waiting", "scheduled", "lease", "run", "cancel_request", "admitted",
    "unique_claim", "schedule", "tick", "log", "verdict", "action",
)  # fmt: skip


def drain(queue: Queue, *names: str, ahead: timedelta = AT_ONCE) -> int:
    """Run all that is due, and what that enqueues, in this process; return the number of runs.

    names  queues; without, those of the tasks registered
    ahead  jobs that are due within this time run too, retries included, as if it had passed

    What fails is recorded as ever: ask the jobs. Jobs under a rate are waited for.
    """
    first = before = _count(queue)
    while True:
        move_time(queue, ahead)
        queue.worker(*names, drain=True, poll=POLL, listen=False).run()
        now = _count(queue)
        if now == before or not ahead:
            return now - first
        before = now


def move_time(queue: Queue, ahead: timedelta) -> None:
    """Make jobs and schedules that are due within this time due now."""
    for table, at in (("scheduled", "due_at"), ("schedule", "next_at")) if ahead else ():
        sql = f"update {{0}}.{table} set {at} = now() where {at} <= now() + :ahead"
        _execute(queue, sql, ahead=ahead)


def clean(queue: Queue) -> None:
    """Remove all jobs, ended or not, and all schedules; policies stay."""
    for table in TABLES:
        _execute(queue, f"delete from {{0}}.{table}")


def enqueued(queue: Queue, task: Task[..., Any] | str) -> list[dict[str, Any]]:
    """Return the arguments of all jobs of a task, in the order of their ids."""
    name = task if isinstance(task, str) else task.name
    sql = "select args from {0}.job where task = :name order by id"
    return [row[0] for row in _execute(queue, sql, name=name)]


def assert_enqueued(
    queue: Queue, task: Task[..., Any], *args: Any, times: int | None = None, **kwargs: Any
) -> None:
    """Fail unless a job with these arguments was enqueued, and so many `times` if that is given.

    With no arguments at all any job of the task will do.
    """
    found = enqueued(queue, task)
    wanted = json.loads(task.s(*args, **kwargs).args) if args or kwargs else None
    count = sum(wanted in (None, one) for one in found)
    if count != times if times is not None else not count:
        shown = "\n".join(f"  {json.dumps(one)}" for one in found) or "  nothing"
        raise AssertionError(
            f"{task.name} with {json.dumps(wanted)}: {count} jobs, expected {times or 'some'}; "
            f"enqueued were\n{shown}"
        )


@contextmanager
def eager(queue: Queue) -> Iterator[None]:
    """Run each job as soon as it was enqueued in a transaction of its own.

    Those enqueued in a transaction of the test's exist only once that has committed: `drain`.
    """
    plain = queue.enqueue

    def enqueue(call: Any) -> Any:
        job = plain(call)
        drain(queue, call.options.queue)
        return job.refresh()

    queue.enqueue = enqueue  # type: ignore[method-assign]
    try:
        yield
    finally:
        del queue.enqueue


@contextmanager
def throwaway(server: str, name: str) -> Iterator[str]:
    """Create a database on a server and migrate sqlqueue in it; lend its url, and drop it."""
    driven = make_url(server).set(drivername="postgresql+psycopg")
    admin = create_engine(driven, isolation_level="AUTOCOMMIT")
    url = admin.url.set(database=name).render_as_string(hide_password=False)
    quoted = admin.dialect.identifier_preparer.quote_identifier(name)
    with admin.connect() as conn:
        conn.execute(text(f"create database {quoted}"))
        try:
            engine = create_engine(url)
            migrate(engine)
            engine.dispose()
            yield url
        finally:
            conn.execute(text(f"drop database {quoted} with (force)"))
    admin.dispose()


def _count(queue: Queue) -> int:
    count: int = _execute(queue, "select count(*) from {0}.run")[0][0]
    return count


def _execute(queue: Queue, sql: str, **params: Any) -> list[Any]:
    with queue.engine.begin() as conn:
        result = conn.execute(text(sql.format(queue.store.schema)), params)
        return list(result) if result.returns_rows else []
