"""An application that any release of sqlqueue can run: it uses what each release has to keep.

Run as a program it calls every verb once: `python release.py`. It imports nothing of the tests, so
that the code of another release can be put before it. SQLQUEUE_URL names the database.
"""

import os
import sys
from datetime import timedelta

from sqlalchemy import text
from sqlalchemy.orm import Session

from sqlqueue import Policy, Queue, Retry, Schedule, Snooze, Unique, current_run

queue = Queue(os.environ["SQLQUEUE_URL"])
NOTE = text("insert into effect (key, run, pid) values (:key, :run, :pid)")
AT_ONCE = Retry(attempts=100, waits=[timedelta(0)])


@queue.task(name="write", transactional=True, retry=AT_ONCE, max_crashes=1000)
def write(session: Session, key: str, seconds: float = 0) -> None:
    """Write the key in the transaction that finishes the job."""
    session.execute(NOTE, {"key": key, "run": current_run().number, "pid": os.getpid()})


@queue.task(name="fails", retry=Retry(attempts=2, waits=[timedelta(0)]))
def fails() -> None:
    """Fail each time."""
    raise RuntimeError("no")


@queue.task(name="snoozes")
def snoozes() -> str:
    """Put itself off once."""
    if current_run().number == 1:
        raise Snooze(timedelta(0))
    current_run().progress(50, "half")
    return "woken"


@queue.task(name="adds", executor="process")
def adds(a: int, b: int) -> int:
    """Add, in a child process."""
    return a + b


def call_every_verb() -> None:
    """Enqueue in each way, run, retry, cancel, pause and resume; fail if anything is off."""
    queue.set_policy(Policy(concurrency=2), queue="few")
    queue.set_schedule("hourly", adds.s(1, 1), Schedule(cron="0 * * * *"))
    with Session(queue.engine) as session, session.begin():
        first = write.using(session, id=None).enqueue("00000000-0000-7000-8000-000000000001")
    queue.enqueue_many(write.s(f"00000000-0000-7000-8000-{n:012}") for n in range(2, 10))
    limited = [adds.using(queue="few", key="a").enqueue(n, 1) for n in range(3)]
    only = [adds.using(unique=Unique()).enqueue(2, 2) for _ in range(2)]
    cancelled = adds.using(delay=timedelta(days=1)).enqueue(0, 0)
    failed, snoozed = fails.enqueue(), snoozes.enqueue()
    cancelled.cancel()
    queue.worker("default", "few", drain=True).run()
    assert [job.result for job in limited] == [1, 2, 3]
    assert only[0].id == only[1].id
    assert only[0].result == 4
    assert first.refresh().state == "succeeded"
    assert cancelled.refresh().state == "cancelled"
    assert snoozed.result == "woken"
    assert failed.refresh().state == "failed"
    failed.retry()
    assert failed.refresh().state == "ready"
    queue.worker(drain=True).run()
    assert failed.refresh().state == "failed"
    with queue.engine.begin() as conn:
        sql = "select count(*) from sqlqueue.jobs where state not in ('succeeded', 'failed')"
        assert conn.scalar(text(sql)) == 1  # the one cancelled


if __name__ == "__main__":
    if "--works" in sys.argv:
        queue.worker(ttl=timedelta(seconds=3), poll=timedelta(seconds=0.25)).run()
    else:
        call_every_verb()
