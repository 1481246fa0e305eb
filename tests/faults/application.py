"""What runs under load: tasks of each kind, for worker processes that know nothing else.

The environment variable SQLQUEUE_TEST_APP names the database; tests/harness.py sets it.
"""

import logging
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from sqlqueue import Queue, current_run
from sqlqueue.store import Store

queue = Queue(os.environ["SQLQUEUE_TEST_APP"])
REWRITE = text("update request set job_id = job_id where job_id = cast(:key as uuid)")


def load() -> Queue:
    """Return the queue; called by the worker processes of a supervisor."""
    logging.basicConfig(handlers=[logging.NullHandler()])
    return queue


def load_timed() -> Queue:
    """Return the queue; note how long each claim takes, in the folder SQLQUEUE_TEST_CLAIMS."""
    run_statement = Store.rows
    file = (Path(os.environ["SQLQUEUE_TEST_CLAIMS"]) / str(os.getpid())).open("a", buffering=1)

    def timed(store: Store, conn: Any, name: str, params: Any) -> Any:
        began = time.perf_counter()
        found = run_statement(store, conn, name, params)
        if name == "claim":
            file.write(f"{time.time()} {time.perf_counter() - began}\n")
        return found

    Store.rows = timed  # type: ignore[method-assign]
    return load()


@queue.task(name="plain")
async def plain(key: str, n: int = 0) -> None:
    """Do nothing, on the event loop."""


@queue.task(name="write", transactional=True)
def write(session: Session, key: str) -> None:
    """Use the transaction that finishes the job."""
    session.execute(REWRITE, {"key": key})


@queue.task(name="fail_once")
async def fail_once(key: str) -> None:
    """Fail the first time."""
    if current_run().number == 1:
        raise ValueError(key)


@queue.task(name="say")
def say(key: str) -> None:
    """Log, and say how far it is."""
    logging.getLogger("soak").warning("%s: begins", key)
    current_run().progress(50, key)


@queue.schedule(every=timedelta(seconds=1))
@queue.task(name="tick")
async def tick() -> None:
    """Come back every second."""
