"""What operators do: each verb is a function of the database, which writes down who did it.

Dashboard and command line act through the same Operator, so they cannot differ.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlqueue.queue import Queue
from sqlqueue.reports import Reports

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
    def begin(self) -> Iterator[Reports]:
        """Begin a transaction in which what is done is done by this operator."""
        named = "select set_config('sqlqueue.actor', :actor, true),"
        named += " set_config('sqlqueue.origin', :origin, true)"
        with self._queue.engine.begin() as conn:
            reports = Reports(conn, self._queue.store.schema)
            reports.rows(named, actor=self.actor, origin=self._origin)
            yield reports

    def call(self, function: str, **params: Any) -> Any:
        """Call a function of the database with arguments by name; return its value."""
        named = ", ".join(f"{name} => :{name}" for name in params)
        with self.begin() as reports:
            return reports.rows(f"select sqlqueue.{function}({named}) as value", **params)[0][
                "value"
            ]

    def change(
        self, verb: str, ids: Sequence[UUID], why: str = "", how: Mapping[str, Any] | None = None
    ) -> Done:
        """Do a verb to jobs, BATCH in a transaction; leave one action that says so.

        `why` is what chose them, such as a search. `how`: queue and priority of move, reason of
        cancel, spread of retry (a time over which they are put off evenly).
        Raises ValueError for a verb or value that is refused.
        """
        if verb not in STATES:
            raise ValueError(f"there is no verb {verb}")
        done = Done()
        how = {name: value for name, value in (how or {}).items() if value is not None}
        if "spread" in how:
            how["spread"] = f"{how['spread'].total_seconds()} s"
        for start in range(0, len(ids), BATCH):
            batch = list(ids[start : start + BATCH])
            changed = self.call("change", verb=verb, ids=batch, how=json.dumps(how))
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
        made: UUID | None = self.call("edit", job=job["id"], args=json.dumps(args))
        if made is None:
            raise ValueError(f"job {job['id']} is {job['state']}: nothing was enqueued")
        return made
