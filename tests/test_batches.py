"""Batch tasks: many jobs in one call, each with its own answer, end, lease and limits."""

import asyncio
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

from sqlqueue import BadArguments, Cancel, Job, NotRepresentable, Queue, Retry, Snooze, current_run
from sqlqueue.integrations.batches import batch_task
from tests.harness import POLLING, SOON, outcomes, rows, value, wait_until, work

ONCE = Retry(attempts=1)
MOMENT = timedelta(milliseconds=50)
LONG = timedelta(hours=1)


@dataclass
class Item:
    name: str
    price: int


def recording(queue: Queue, **given: Any) -> tuple[Any, list[list[int]]]:
    """A batch task that doubles numbers, and the batches it was called with."""
    batches: list[list[int]] = []

    @batch_task(queue, name="double", **given)
    def double(numbers: list[int]) -> list[int]:
        batches.append(numbers)
        return [2 * number for number in numbers]

    return double, batches


def enqueue(queue: Queue, task: Any, numbers: Any) -> list[Job[Any]]:
    with queue.engine.begin() as conn:
        return [task.using(conn).enqueue(number) for number in numbers]


def test_a_full_batch_is_one_call_and_each_job_has_its_answer(queue) -> None:
    double, batches = recording(queue, size=5, wait=LONG)
    jobs = enqueue(queue, double, range(10))

    with queue.worker(**POLLING):
        assert [job.wait(SOON) for job in jobs] == [2 * number for number in range(10)]

    assert batches == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_what_there_is_is_run_when_it_has_waited_for_long_enough(queue) -> None:
    double, batches = recording(queue, size=100, wait=MOMENT)
    jobs = enqueue(queue, double, range(3))

    with queue.worker(**POLLING):
        assert [job.wait(SOON) for job in jobs] == [0, 2, 4]

    assert batches == [[0, 1, 2]]


def test_a_batch_is_not_larger_than_the_slots_of_the_worker(queue) -> None:
    double, batches = recording(queue, size=100, wait=MOMENT)
    enqueue(queue, double, range(8))

    queue.worker(drain=True, slots=4, **POLLING).run()

    assert [len(batch) for batch in batches] == [4, 4]


def test_coroutines_and_columns_of_any_type_work_too(queue) -> None:
    @batch_task(queue, name="total")
    async def total(items: list[Item], counts: list[int]) -> list[Item]:
        await asyncio.sleep(0)
        return [Item(one.name, one.price * n) for one, n in zip(items, counts, strict=True)]

    first = total.enqueue(Item("a", 2), counts=3)
    second = total.enqueue(Item("b", 5), 7)
    work(queue)

    assert (first.refresh().result, second.refresh().result) == (Item("a", 6), Item("b", 35))


@pytest.mark.parametrize("is_async", [False, True])
def test_a_batch_is_no_run(queue, is_async) -> None:
    def ask(numbers: list[int]) -> list[Any]:
        return [current_run().number for _ in numbers]

    async def ask_async(numbers: list[int]) -> list[Any]:
        return ask(numbers)

    job = batch_task(queue, name="t", retry=ONCE)(ask_async if is_async else ask).enqueue(1)
    work(queue)

    assert job.refresh().error_type == "LookupError"


def test_a_batch_task_is_called_with_lists_and_enqueued_with_items(queue, engine) -> None:
    double, _ = recording(queue)

    assert double([1, 2]) == [2, 4]
    with pytest.raises(NotRepresentable):
        double.enqueue([1, 2])
    with pytest.raises(BadArguments):
        double.enqueue()
    assert value(engine, "select count(*) from sqlqueue.job") == 0


@pytest.mark.parametrize("is_async", [False, True])
def test_each_answer_may_be_an_exception_of_its_own(queue, engine, is_async) -> None:
    def answer(words: list[str]) -> list[Any]:
        answers = {
            "ok": 1, "fails": KeyError("x"), "snoozes": Snooze(LONG), "cancels": Cancel("no"),
            "unstorable": object(), "text": "fine",
        }  # fmt: skip
        return [answers[word] for word in words]

    async def answer_async(words: list[str]) -> list[Any]:
        return answer(words)

    task = batch_task(queue, name="t", retry=ONCE)(answer_async if is_async else answer)
    jobs = {word: task.enqueue(word) for word in ("ok", "fails", "snoozes", "cancels", "text")}
    odd = task.enqueue("unstorable")
    work(queue)

    states = {word: job.refresh().state for word, job in jobs.items()}
    assert states == {
        "ok": "succeeded", "fails": "failed", "snoozes": "scheduled", "cancels": "cancelled",
        "text": "succeeded",
    }  # fmt: skip
    assert (jobs["fails"].error_type, jobs["text"].result) == ("KeyError", "fine")
    assert odd.refresh().error_type.endswith("NotRepresentable")


@pytest.mark.parametrize(
    ("answers", "error_type"),
    [
        (lambda words: words[1:], "ValueError"),
        (lambda words: None, "TypeError"),
        (lambda words: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_without_an_answer_for_each_all_jobs_fail(queue, answers, error_type) -> None:
    def answer(words: list[str]) -> list[Any]:
        return answers(words)  # type: ignore[no-any-return]

    task = batch_task(queue, name="t", retry=ONCE)(answer)
    jobs = [task.enqueue(word) for word in "ab"]
    work(queue)

    assert [job.refresh().error_type for job in jobs] == [error_type] * 2


def test_failed_jobs_of_a_batch_are_retried_and_the_others_are_not(queue, engine) -> None:
    batches: list[list[str]] = []

    @batch_task(queue, name="t", retry=Retry(attempts=3, waits=[timedelta(0)]))
    def once(words: list[str]) -> list[Any]:
        batches.append(words)
        is_first = len(batches) == 1
        return [KeyError(word) if is_first and word == "bad" else word for word in words]

    bad, good = once.enqueue("bad"), once.enqueue("good")
    work(queue)

    assert batches == [["bad", "good"], ["bad"]]
    assert outcomes(engine, bad.id) == ["failed", "succeeded"]
    assert outcomes(engine, good.id) == ["succeeded"]


def test_a_job_whose_arguments_do_not_fit_any_more_fails_alone(queue, engine) -> None:
    double, batches = recording(queue, retry=ONCE)
    good, bad = double.enqueue(1), double.enqueue(2)
    rows(engine, """update sqlqueue.job set args = '{"numbers": "x"}' where id = :id""", id=bad.id)
    work(queue)

    assert batches == [[1]]
    assert (good.refresh().state, bad.refresh().state) == ("succeeded", "failed")


def test_a_job_cancelled_while_it_is_collected_is_not_run(queue) -> None:
    double, batches = recording(queue, size=3, wait=LONG)
    cancelled, other = enqueue(queue, double, range(2))

    with queue.worker(**POLLING):
        wait_until(lambda: other.refresh().state == "running")
        assert cancelled.cancel()
        wait_until(lambda: cancelled.refresh().state == "cancelled")
        assert batches == []
        enqueue(queue, double, [2, 3])
        assert other.wait(SOON) == 2

    assert batches == [[1, 2, 3]]


def test_a_job_cancelled_in_a_running_batch_leaves_the_others_alone(queue) -> None:
    began, may_end = threading.Event(), threading.Event()

    @batch_task(queue, name="t", size=2, wait=LONG)
    def waits(numbers: list[int]) -> list[Any]:
        began.set()
        assert may_end.wait(10)
        return numbers

    cancelled, other = enqueue(queue, waits, range(2))
    with queue.worker(**POLLING):
        assert began.wait(10)
        assert cancelled.cancel()
        wait_until(lambda: cancelled.refresh().state == "cancelled")
        assert other.refresh().state == "running"
        may_end.set()
        assert other.wait(SOON) == 1


def test_a_job_whose_time_is_over_ends_alone_and_a_batch_that_nobody_awaits_is_stopped(queue):
    stopped = threading.Event()

    @batch_task(queue, name="t", size=2, wait=LONG, retry=ONCE)
    async def hangs(numbers: list[int]) -> list[int]:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return numbers

    short = hangs.using(timeout=MOMENT * 2).enqueue(0)
    longer = hangs.using(timeout=MOMENT * 10).enqueue(1)
    with queue.worker(**POLLING):
        wait_until(lambda: short.refresh().has_ended)
        assert not stopped.is_set()
        wait_until(lambda: longer.refresh().has_ended)
        assert stopped.wait(10)

    assert short.error_type == longer.error_type == "TimeoutError"


def test_what_was_collected_is_handed_back_when_the_worker_stops(queue, engine) -> None:
    double, _ = recording(queue, size=100, wait=LONG)
    jobs = enqueue(queue, double, range(5))

    with queue.worker(**POLLING | {"grace": timedelta(0)}):
        wait_until(lambda: value(engine, "select count(*) from sqlqueue.lease") == 5)
    assert [outcomes(engine, job.id) for job in jobs] == [["returned"]] * 5
    assert {job.refresh().attempt for job in jobs} == {1}
    queue.tasks.clear()
    double, batches = recording(queue, size=5, wait=LONG)
    work(queue)

    assert [sorted(batch) for batch in batches] == [[0, 1, 2, 3, 4]]


def test_what_was_collected_is_run_while_a_stopping_worker_has_time(queue) -> None:
    started: list[Any] = []
    queue.around_run.append(lambda run: nullcontext(started.append(run)))
    double, batches = recording(queue, size=100, wait=timedelta(seconds=2))
    enqueue(queue, double, range(3))

    with queue.worker(**POLLING):
        wait_until(lambda: len(started) == 3)  # what has not been started is handed back

    assert batches == [[0, 1, 2]]


def test_hooks_are_entered_for_each_run_of_a_batch(queue) -> None:
    seen: list[Any] = []

    @contextmanager
    def around(run: Any) -> Any:
        seen.append(run.task)
        yield
        seen.append("left")

    queue.around_run.append(around)
    double, _ = recording(queue, size=2, wait=LONG)
    enqueue(queue, double, range(2))
    work(queue)

    assert sorted(seen) == ["double", "double", "left", "left"]


@pytest.mark.parametrize(
    ("function", "given", "error"),
    [
        (lambda: [], {}, "names and no defaults"),
        (lambda *numbers: [], {}, "names and no defaults"),
        (lambda numbers=(): [], {}, "names and no defaults"),
        (lambda numbers: [], {"executor": "process"}, "no process"),
        (lambda numbers: [], {"size": 0}, "size must be"),
        (lambda session, numbers: [], {"transactional": True}, "no transaction"),
    ],
)
def test_a_batch_task_that_makes_no_sense_is_refused(queue, function, given, error) -> None:
    with pytest.raises((ValueError, BadArguments), match=error):
        batch_task(queue, name="t", **given)(function)
