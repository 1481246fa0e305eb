"""What an application hangs around enqueuing and running; traces that go on in a run."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import text
from sqlalchemy.orm import Session

from sqlqueue import Queue, Retry, Run, current_run
from sqlqueue.integrations.otel import instrument
from sqlqueue.store import Ended, Lane
from tests.harness import POLLING, value, work
from tests.test_store import hire

ONCE = Retry(attempts=1)
SECOND = timedelta(seconds=1)


def recording(queue: Queue) -> list[Any]:
    seen: list[Any] = []

    @contextmanager
    def around(run: Run) -> Iterator[None]:
        seen.append(("began", run.task))
        try:
            yield
        except Exception as error:
            seen.append(type(error))
            raise
        seen.append("ended")

    queue.around_run.append(around)
    return seen


def test_a_hook_sees_each_run_and_what_it_raises(queue) -> None:
    seen = recording(queue)

    @queue.task(name="sync", retry=ONCE)
    def sync(fails: bool) -> None:
        if fails:
            raise KeyError

    @queue.task(name="async", retry=ONCE)
    async def asynchronous() -> None:
        raise OSError

    @queue.task(name="write", transactional=True)
    def write(session: Session) -> None: ...

    for call in (sync.s(False), sync.s(True), asynchronous.s(), write.s()):
        queue.enqueue(call)
        work(queue)

    assert seen == [
        ("began", "sync"), "ended", ("began", "sync"), KeyError,
        ("began", "async"), OSError, ("began", "write"), "ended",
    ]  # fmt: skip


def test_a_hook_that_fails_is_a_failure_of_the_run(queue) -> None:
    @contextmanager
    def broken(run: Run) -> Iterator[None]:
        raise ArithmeticError("hook")
        yield

    queue.around_run.append(broken)
    job = queue.task(name="t", retry=ONCE)(lambda: 1).enqueue()
    work(queue)

    assert job.refresh().error_type == "ArithmeticError"


def test_a_hook_is_told_of_each_end_that_was_recorded(queue, engine) -> None:
    told: list[tuple[Any, ...]] = []
    waiting = threading.Semaphore(0)

    def tell(ended: Ended) -> None:
        state = value(engine, "select outcome from sqlqueue.run where run = :run", run=ended.run)
        told.append((ended.job_id, ended.run, ended.outcome, ended.wait is not None, state))
        waiting.release()

    queue.after_run += [broken, tell]

    @queue.task(name="t", retry=Retry(attempts=2, waits=[timedelta(0)]))
    def fails_once() -> None:
        if current_run().number == 1:
            raise KeyError

    job = str(fails_once.enqueue().id)
    work(queue)

    assert waiting.acquire(timeout=10)
    assert waiting.acquire(timeout=10)
    assert told == [
        (job, 1, "failed", True, "failed"), (job, 2, "succeeded", False, "succeeded"),
    ]  # fmt: skip


def broken(ended: Ended) -> None:
    raise ArithmeticError("hook")


def test_a_hook_is_told_of_the_crashes_that_a_worker_finds(queue, engine) -> None:
    told: SimpleQueue[Ended] = SimpleQueue()
    queue.after_run.append(told.put)
    job = queue.task(name="t")(lambda: None).enqueue()
    with engine.begin() as conn:
        dead = hire(conn, queue.store, timedelta(seconds=1))
        queue.store.claim(conn, Lane("default", 0), 0, 1, dead)
        conn.execute(text("update sqlqueue.worker set heartbeat_at = now() - interval '1 min'"))

    with queue.worker(**POLLING):
        crash, end = (told.get(timeout=10) for _ in range(2))

    assert (crash.job_id, crash.outcome, end.outcome) == (str(job.id), "crashed", "succeeded")


def test_a_hook_changes_what_is_enqueued(queue, engine) -> None:
    def tag(call: Any) -> Any:
        return call._replace(options=call.options.changed({"tags": ["seen"]}))

    queue.before_enqueue.append(tag)
    task = queue.task(name="t")(lambda: current_run().job_id)

    queue.enqueue_many([task.s(), task.s()])
    queue.send("other")

    with engine.connect() as conn:
        found = conn.exec_driver_sql("select tags from sqlqueue.job").scalars().all()
    assert found == [["seen"]] * 3


@pytest.fixture(scope="module")
def spans() -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


def test_the_trace_of_the_caller_goes_on_in_the_run(queue, spans) -> None:
    instrument(queue)

    @queue.task(name="child", retry=ONCE)
    async def child() -> None:
        raise ValueError("no")

    @queue.task(name="parent")
    def parent() -> None:
        child.enqueue()

    with trace.get_tracer("test").start_as_current_span("request") as request:
        parent.enqueue()
    work(queue)

    by_name = {span.name: span for span in spans.get_finished_spans()}
    trace_id = request.get_span_context().trace_id
    assert {span.context.trace_id for span in by_name.values()} == {trace_id}
    assert by_name["parent"].parent.span_id == by_name["request"].context.span_id
    assert by_name["child"].parent.span_id == by_name["parent"].context.span_id
    assert by_name["child"].status.status_code == trace.StatusCode.ERROR
    assert by_name["child"].attributes["sqlqueue.attempt"] == 1


def test_without_a_trace_nothing_is_carried(queue) -> None:
    instrument(queue)
    task = queue.task(name="t")(lambda: None)

    assert task.s().options.headers == {}
