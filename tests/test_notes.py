"""What runs say while they run: seen at once, kept whatever becomes of the run, and capped."""

import asyncio
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from sqlqueue import Retry, current_run
from sqlqueue.notes import MOST, MOST_MORE, Line, Said
from sqlqueue.run import Capture
from tests.harness import POLLING, application_table, load_app, rows, value, wait_until, work

ONCE = Retry(attempts=1)
log = logging.getLogger("shop")


@pytest.fixture(autouse=True)
def logging_of_an_application() -> Iterator[None]:
    """Records from DEBUG on, as a program might have it set up."""
    before = logging.root.level
    logging.root.setLevel(logging.DEBUG)
    yield
    logging.root.setLevel(before)
    for handler in [one for one in logging.root.handlers if isinstance(one, Capture)]:
        logging.root.removeHandler(handler)


@pytest.fixture
def app(engine: Engine, migrated_url: str) -> Iterator[ModuleType]:
    """The application of the tests, whose tasks child processes can import."""
    application_table(engine)
    loaded = load_app(migrated_url)
    yield loaded
    loaded.queue.engine.dispose()


def lines(engine: Engine, columns: str = "message") -> list[Any]:
    found = rows(engine, f"select {columns} from sqlqueue.logs order by job_id, run, seq")
    return [row[0] if len(row) == 1 else tuple(row) for row in found]


def test_what_a_task_logs_is_kept_with_its_job(queue, engine) -> None:
    @queue.task(name="t")
    def logs() -> None:
        log.info("connecting to %s", "smtp", extra={"host": "mail", "port": 25})
        try:
            raise KeyError("x")
        except KeyError:
            log.exception("gave up")
        current_run().log.warning("from its own logger")

    job = logs.enqueue()
    work(queue)

    first, second, third = lines(engine, "job_id, run, seq, level, logger, source, fields, message")
    assert first[:5] == (job.id, 1, 1, "INFO", "shop")
    assert first[5].startswith("test_notes.py:")
    assert first[6:] == ({"host": "mail", "port": "25"}, "connecting to smtp")
    assert second[3] == "ERROR"
    assert second[7].startswith("gave up\nTraceback")
    assert "KeyError: 'x'" in second[7]
    assert third[3:5] == ("WARNING", "sqlqueue.task")
    age = value(engine, "select extract(epoch from clock_timestamp() - min(at)) from sqlqueue.logs")
    assert 0 <= age < 10


def test_coroutines_log_each_to_its_own_job(queue, engine) -> None:
    @queue.task(name="t")
    async def logs(word: str) -> None:
        log.info("%s 1", word)
        await asyncio.sleep(0)
        log.info("%s 2", word)

    jobs = {logs.enqueue(word).id: word for word in "abcdefgh"}
    work(queue)

    said = lines(engine, "job_id, seq, message")
    assert sorted(said) == sorted(
        (job, seq, f"{word} {seq}") for job, word in jobs.items() for seq in (1, 2)
    )


def test_a_child_process_logs_to_its_job(app, engine) -> None:
    app.tell.enqueue("one")
    app.tell.enqueue("two")
    work(app.queue)

    assert lines(engine, "progress, message") == [
        (None, "one: begins"), (50.0, "one"), (None, "two: begins"), (50.0, "two"),
    ]  # fmt: skip


def test_lines_are_seen_while_the_job_runs(queue, engine) -> None:
    goes_on, may_end = threading.Event(), threading.Event()

    @queue.task(name="t")
    def waits() -> None:
        log.info("begun")
        current_run().progress(40, "resizing")
        goes_on.set()
        may_end.wait(20)

    job = waits.enqueue()
    with queue.worker(**POLLING):
        assert goes_on.wait(10)
        wait_until(lambda: len(lines(engine)) == 2)
        assert job.refresh().state == "running"
        assert (job.progress, job.note) == (40, "resizing")
        assert rows(engine, "select progress, note from sqlqueue.live") == [(40, "resizing")]
        may_end.set()


def test_lines_outlive_the_rollback_of_their_run(queue, engine) -> None:
    @queue.task(name="t", transactional=True, retry=ONCE)
    def fails(session: Session) -> None:
        log.error("before the end")
        current_run().progress(99.5)
        session.execute(text("select 1 / 0"))

    job = fails.enqueue()
    work(queue)

    assert job.refresh().state == "failed"
    assert lines(engine, "level, message, progress") == [
        ("ERROR", "before the end", None), ("PROGRESS", None, 99.5),
    ]  # fmt: skip


def test_of_progress_the_last_is_kept(queue, engine) -> None:
    @queue.task(name="t")
    def counts() -> None:
        for percent in range(101):
            current_run().progress(percent)

    job = counts.enqueue()
    work(queue)

    assert job.refresh().progress == 100
    assert len(lines(engine)) < 5  # of what is said within a second


@pytest.mark.parametrize("percent", [-1, 100.1, float("nan")])
def test_progress_is_a_percentage(queue, percent) -> None:
    @queue.task(name="t", retry=ONCE)
    def says() -> None:
        current_run().progress(percent)

    job = says.enqueue()
    work(queue)

    assert job.refresh().error_type == "ValueError"


def test_a_talkative_run_is_cut_short_and_says_so(queue, engine) -> None:
    @queue.task(name="t")
    def talks() -> None:
        for number in range(MOST + 500):
            log.info("%d", number)
        for number in range(MOST_MORE + 50):
            log.warning("%d", number)

    talks.enqueue()
    work(queue)

    told = lines(engine, "level, message")
    assert len(told) == MOST + MOST_MORE + 1
    assert told[MOST - 1 : MOST + 1] == [("INFO", str(MOST - 1)), ("WARNING", "0")]
    assert told[-1] == ("WARNING", "550 more records were not kept")


def test_long_lines_count_by_their_length(queue, engine) -> None:
    @queue.task(name="t")
    def talks() -> None:
        for _ in range(30):
            log.info("x" * 20_000)

    talks.enqueue()
    work(queue)

    assert lines(engine)[-1] == "16 more records were not kept"


def test_a_task_says_from_which_level_its_lines_are_kept(queue, engine) -> None:
    def logs() -> None:
        log.debug("debug")
        log.error("error")

    queue.task(name="usual")(logs).enqueue()
    queue.task(name="all", log_level=logging.DEBUG)(logs).enqueue()
    queue.task(name="none", log_level=logging.CRITICAL)(logs).enqueue()
    work(queue)

    assert sorted(lines(engine)) == ["debug", "error", "error"]


def test_what_the_database_cannot_hold_is_replaced(queue, engine) -> None:
    @queue.task(name="t")
    def logs() -> None:
        log.info("a\0b\ud800", extra={"na\0me": "\0\ud800", "object": object})
        log.info("after")
        current_run().progress(1, "\0\udfff")

    logs.enqueue()
    work(queue)

    assert lines(engine) == ["a\ufffdb?", "after", "\ufffd?"]


def test_who_has_set_up_no_logging_still_finds_warnings_on_stderr(
    queue, capfd, monkeypatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr("sqlqueue.run._on_stderr.stream", sys.stderr)

    @queue.task(name="t")
    def logs() -> None:
        log.info("quiet")
        log.warning("loud")

    logs.enqueue()
    work(queue)

    assert capfd.readouterr().err.splitlines() == ["loud"]


def failing(said: Said, error: Callable[[], Exception]) -> None:
    """Take the lines, say something meanwhile, and fail."""
    with said.taken():
        said.add(Line("j", 1, 3, 0.0, "PROGRESS", progress=2.0))
        raise error()


AWAY = [psycopg.OperationalError, partial(OperationalError, None, None, BaseException())]


@pytest.mark.parametrize("error", AWAY, ids=["in use", "connecting"])
def test_lines_that_cannot_be_written_wait_and_those_refused_do_not(error) -> None:
    said = Said()
    said.add(Line("j", 1, 1, 0.0, "INFO", message="kept"))
    said.add(Line("j", 1, 2, 0.0, "PROGRESS", progress=1.0))

    with pytest.raises((psycopg.OperationalError, OperationalError)):
        failing(said, error)
    with said.taken() as waiting:
        kept = [(row["message"], row["progress"]) for row in json.loads(waiting)]
    said.add(Line("j", 1, 4, 0.0, "INFO", message="refused"))
    with pytest.raises(psycopg.DataError):
        failing(said, psycopg.DataError)
    with said.taken() as after:
        assert [row["seq"] for row in json.loads(after)] == [3]

    assert kept == [("kept", None), (None, 2.0)]


def test_lines_go_when_their_job_goes(queue, engine) -> None:
    @queue.task(name="t")
    def logs() -> None:
        log.info("old")

    logs.enqueue()
    work(queue)
    with engine.begin() as conn:
        partition = conn.scalar(text("select tableoid::regclass::text from sqlqueue.log"))
        job = conn.scalar(text("select tableoid::regclass::text from sqlqueue.job"))

    assert partition == job.replace("job_", "log_")
