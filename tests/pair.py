"""Two applications, with a database each, for worker processes that serve both.

The environment variable SQLQUEUE_TEST_PAIR names their databases.
"""

import os
import threading

from sqlqueue import Queue, current_run

URLS = os.environ["SQLQUEUE_TEST_PAIR"].split()
left, right = (Queue(url) for url in URLS)


def note(queue: Queue, key: str) -> None:
    """Write down in the database of the job that this run was here."""
    run = current_run()
    with queue.autocommit() as conn:
        conn.exec_driver_sql(
            "insert into effect (key, run, pid) values (%s, %s, %s)",
            (key, run.number, os.getpid()),
        )


@left.task(name="linger")
def linger_left(key: str, seconds: float) -> None:
    """Write down the start, then take some time."""
    note(left, key)
    threading.Event().wait(seconds)


@right.task(name="linger")
def linger_right(key: str, seconds: float) -> None:
    """Do the same in the other database."""
    note(right, key)
    threading.Event().wait(seconds)


@right.task(name="forward")
def forward(key: str, seconds: float, fails: int = 0) -> None:
    """Take some time, then have a job in the other database, with the id of this one.

    The first `fails` runs fail after that.
    """
    run = current_run()
    threading.Event().wait(seconds)
    linger_left.using(id=run.job_id).enqueue(key, 0)
    if run.number <= fails:
        raise ConnectionError
