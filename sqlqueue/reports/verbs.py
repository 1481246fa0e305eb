"""What operators do: each verb is a function of the database, which writes down who did it.

Dashboard and command line act through the same Operator, so they cannot differ.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from sqlqueue.queue import Queue

BATCH = 500  # jobs changed in one transaction
MOST = 10_000  # jobs that one action changes
# The states that a verb is for.
STATES = {
    "retry": ("failed", "cancelled"),
    "cancel": ("scheduled", "waiting", "ready", "running"),
    "discard": ("failed",),
    "delete": ("scheduled", "waiting", "ready", "succeeded", "failed", "cancelled", "expired"),
    "run_now": ("scheduled",),
    "move": ("scheduled", "waiting", "ready"),
}


@dataclass
class Done:
    """The jobs that were changed, and those that were not: no longer in a state for it."""

    ids: list[UUID] = field(default_factory=list)
    skipped: list[UUID] = field(default_factory=list)


class Operator:
    """Somebody who changes jobs: actor is who, origin from where; both are written down."""

    def __init__(self, queue: Queue, actor: str, origin: str) -> None:
        self._queue = queue
        self.actor = actor
        self._origin = origin

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """Lend a transaction in which what is done is done by this operator."""
        sql = "select set_config('sqlqueue.actor', :actor, true),"
        sql += " set_config('sqlqueue.origin', :origin, true)"
        with self._queue.engine.begin() as conn:
            conn.execute(text(self._in(sql)), {"actor": self.actor, "origin": self._origin})
            yield conn

    def _in(self, sql: str) -> str:
        schema = self._queue.store.schema
        return sql.replace("sqlqueue.", f"{schema}.").replace("'sqlqueue.", f"'{schema}.")

    def call(self, function: str, **params: Any) -> Any:
        """Call a function of the database with arguments by name; return its value."""
        named = ", ".join(f"{name} => :{name}" for name in params)
        with self.begin() as conn:
            sql = f"select {self._queue.store.schema}.{function}({named})"
            return conn.execute(text(sql), params).scalar()

    def change(
        self, verb: str, ids: Sequence[UUID], why: str = "", how: Mapping[str, Any] | None = None
    ) -> Done:
        """Do a verb to jobs, BATCH in a transaction; leave one action that says so.

        `why` is what chose them, such as a search. `how`: queue and priority of move, reason of
        cancel, spread of retry (seconds over which they are put off evenly).
        Raises ValueError for a verb or value that is refused.
        """
        if verb not in STATES:
            raise ValueError(f"there is no verb {verb}")
        done, how = Done(), dict(how or {})
        for start in range(0, len(ids), BATCH):
            batch = list(ids[start : start + BATCH])
            if isinstance(how.get("spread"), timedelta):
                how["spread"] = f"{how['spread'].total_seconds()} s"
            with self.begin() as conn:
                sql = self._in("select sqlqueue.change(:verb, :ids, cast(:how as jsonb))")
                params = {"verb": verb, "ids": batch, "how": json.dumps(how)}
                changed = set(conn.execute(text(sql), params).scalar() or ())
            done.ids += [one for one in batch if one in changed]
            done.skipped += [one for one in batch if one not in changed]
        target = why or " ".join(str(one) for one in ids[:20])
        name = "priority" if verb == "move" and how.get("queue") is None else verb
        self.call(
            "note", verb=name, target=target, affected=len(done.ids), skipped=len(done.skipped)
        )
        return done

    def edit(self, job: Mapping[str, Any], args: Any) -> UUID:
        """Enqueue a failed job anew with other arguments, and discard it; return the new id.

        Raises ValueError if the arguments are no object, or the job is not in a state for it.
        """
        if not isinstance(args, dict):
            raise ValueError("the arguments must be a JSON object")
        headers = {**(job["headers"] or {}), "edited_from": str(job["id"])}
        sql = self._in(
            "select sqlqueue.enqueue(:task, cast(:args as jsonb), queue => :queue,"
            " priority => :priority, timeout => :timeout, attempts => :attempts, tags => :tags,"
            " description => :description, headers => cast(:headers as jsonb), key => :key)"
        )
        names = ("task", "queue", "priority", "timeout", "attempts", "tags", "description", "key")
        params = {name: job[name] for name in names}
        params |= {"args": json.dumps(args), "headers": json.dumps(headers)}
        with self.begin() as conn:
            verb = "discard" if job["state"] == "failed" else "cancel"
            done = conn.execute(
                text(self._in("select sqlqueue.change(:verb, :ids)")),
                {"verb": verb, "ids": [job["id"]]},
            ).scalar()
            if not done and job["state"] != "cancelled":
                raise ValueError(f"job {job['id']} is {job['state']}: nothing was enqueued")
            made: UUID = conn.execute(text(sql), params).scalar_one()
            noted = {"verb": "edit", "target": f"{job['id']} as {made}", "n": 1}
            sql = self._in("select sqlqueue.note(:verb, :target, :n, 0)")
            conn.execute(text(sql), noted)
        return made
