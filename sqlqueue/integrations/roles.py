"""Roles of the database: what each may do is said in roles.sql, once.

Optional: one role that owns the schema works as well. See docs/security.md.
"""

import re
from collections.abc import Sequence
from datetime import timedelta
from functools import partial

import psycopg
from sqlalchemy import Engine

from sqlqueue.errors import IdOutOfRange, QueueFull
from sqlqueue.integrations.alembic import LOCK_TIMEOUT, folder
from sqlqueue.queue import Queue
from sqlqueue.store import Executes, Params, Store, milliseconds, statement


def roles_script(schema: str = "sqlqueue") -> str:
    """Return the statements that make the roles and their grants in a schema.

    Raises ValueError for a schema that is no plain name.
    """
    return _in_schema((folder() / "roles.sql").read_text("utf-8"), schema)


def make_roles(
    engine: Engine, schema: str = "sqlqueue", *, lock_timeout: timedelta = LOCK_TIMEOUT
) -> None:
    """Make the roles, unless they are there, and set their grants; all or nothing.

    Gives up when it has waited `lock_timeout` for a lock, and can be run again.
    """
    with engine.begin() as conn:
        conn.exec_driver_sql(f"set local lock_timeout = '{milliseconds(lock_timeout)}'")
        conn.execution_options(no_parameters=True).exec_driver_sql(roles_script(schema))


def enqueue_only(queue: Queue) -> None:
    """Have a queue enqueue by the function sqlqueue.enqueue, as the role sqlqueue_enqueue may.

    Each job is a statement of its own. Nothing can be read: of a Job only the id is known.
    Unique keys are refused, and `enqueue_many` counts jobs that were there already as new. A
    refusal by the database, QueueFull or IdOutOfRange, aborts the caller's transaction.
    """
    store = Store(queue.store.schema)
    store.enqueue = partial(_enqueue, store.schema)  # type: ignore[method-assign]
    store.take_keys = _refuse_keys
    queue.store = store


def _enqueue(
    schema: str,
    conn: Executes,
    ids: Sequence[str],
    args: Sequence[str],
    task: str,
    options: Params,
    *_: object,
) -> int:
    for one, text in zip(ids, args, strict=True):
        params = {**options, "id": one, "args": text, "task": task}
        given = ", ".join(f"{name} => %({name})s" for name in params)
        try:
            conn.exec_driver_sql(f"select {schema}.enqueue({given})", params)
        except psycopg.errors.ConfigurationLimitExceeded as error:
            raise QueueFull(options["queue"]) from error
        except psycopg.errors.InvalidParameterValue as error:
            raise IdOutOfRange() from error
    return len(ids)


def _refuse_keys(*_: object) -> None:
    raise ValueError("nothing was enqueued: who may only enqueue cannot take unique keys")


def _in_schema(sql: str, schema: str) -> str:
    statement("begin", schema)  # refuses a bad name
    return re.sub(r"\bsqlqueue\b", schema, sql)
