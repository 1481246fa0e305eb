"""Whatever is given is refused before the network, or comes back; and no message holds it.

Bar R38. The short form tries 1,000 examples in all, the long one ten times as many.
"""

import asyncio
import base64
import json
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from sqlqueue import (
    BadArguments,
    Ended,
    IdOutOfRange,
    JobFailed,
    NotRepresentable,
    Policy,
    Queue,
    Retry,
    Unique,
)
from sqlqueue.embedded import Server
from sqlqueue.integrations.alembic import migrate
from tests.harness import POLLING, SOON, rows, value, wait_until
from tests.test_enqueue import KINDS, Caller

SECRET = "hunter2"
MAX_BYTES = 1 << 20
LENGTHS = [pytest.param(1, id="short"), pytest.param(10, id="long", marks=pytest.mark.nightly)]
long_and_short = pytest.mark.parametrize("times", LENGTHS)
pytestmark = pytest.mark.timeout(600)


def examples(count: int) -> Callable[[Any], Any]:
    """Try so many examples, however long each takes."""
    slow = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large)
    return settings(max_examples=count, deadline=None, suppress_health_check=slow)


@pytest.fixture
def sent(queue: Queue) -> Callable[[], int]:
    """A function that says how often the queue has asked for a connection."""
    asked: list[object] = []
    event.listen(queue.engine, "checkout", lambda *args: asked.append(args))
    return lambda: len(asked)


# Values

characters = st.characters(codec=None) | st.sampled_from("\0\ud800\udfff\"\\'%:;-{}$\n\x1b")
texts = st.text(characters, max_size=20).map(lambda some: some + SECRET)
leaves = st.one_of(
    st.none() | st.booleans() | st.integers() | st.floats(),
    texts,
    st.sampled_from([10**4299, 2**63, 1e16, -0.0, 5e-324, 1.7976931348623157e308]),
    st.binary(max_size=9),
    st.datetimes() | st.datetimes(timezones=st.just(UTC)),
    st.dates() | st.uuids() | st.decimals() | st.timedeltas() | st.complex_numbers(),
    st.sampled_from([object(), len, int]),
)
large = st.integers(-20, 20).map(lambda more: (SECRET + " " * MAX_BYTES)[: MAX_BYTES - 12 + more])
small = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(texts, inner, max_size=4),
        st.dictionaries(texts | st.integers() | st.none() | st.booleans(), inner, max_size=3),
        st.lists(inner, max_size=2).map(tuple),
        st.tuples(st.sampled_from([1, 2, 61, 62, 63, 64]), inner).map(lambda pair: nested(*pair)),
    ),
    max_leaves=8,
)
values = st.integers(0, 19).flatmap(lambda number: large if number == 0 else small)


def nested(depth: int, value: Any) -> Any:
    for _ in range(depth):
        value = [value]
    return value


def is_text(value: object) -> bool:
    """Whether Postgres can hold it."""
    return type(value) is str and "\0" not in value and not re.search("[\ud800-\udfff]", value)


def is_plain(value: Any, room: int) -> bool:
    """Whether JSON holds exactly this, in so many levels of lists and objects."""
    if isinstance(value, dict):
        inner = value.values()
        return room > 0 and all(map(is_text, value)) and all(is_plain(v, room - 1) for v in inner)
    if isinstance(value, list):
        return room > 0 and all(is_plain(one, room - 1) for one in value)
    if isinstance(value, float):
        return math.isfinite(value)
    if type(value) is int:
        return abs(value) < 10**4300
    return value is None or type(value) is bool or is_text(value)


def is_small(value: Any) -> bool:
    """Whether the JSON of something plain is small enough."""
    return len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()) <= MAX_BYTES


def is_same(value: Any, back: Any) -> bool:
    """Whether what came back is what was given, but for what jsonb changes.

    A float without a fraction from 1e16 up comes back as an int, -0.0 as 0.0, keys in any order.
    """
    if isinstance(value, float):
        return float(back) == value and (type(back) is float or abs(value) >= 1e16)
    if type(value) is not type(back):
        return False
    if isinstance(value, dict):
        return value.keys() == back.keys() and all(is_same(value[key], back[key]) for key in value)
    if isinstance(value, list):
        return len(value) == len(back) and all(map(is_same, value, back))
    return bool(value == back)


def shown(error: BaseException) -> str:
    """All that anybody prints of an error."""
    return "".join(traceback.format_exception(error)) + repr(error) + str(vars(error))


@long_and_short
def test_r38_an_argument_is_refused_before_the_network_or_comes_back(
    queue, engine, sent, times
) -> None:
    read = "select cast(args as text) from sqlqueue.job where id = :id"
    seen = {True: 0, False: 0}
    known = queue.task(name="greet")(lambda given: None)
    ways = {
        "send": (lambda given: queue.send("greet", given=given), 62),
        "task": (known.enqueue, 63),
    }

    @examples(400 * times)
    @given(values, st.sampled_from(sorted(ways)))
    @example(nested(62, 1), "send")
    @example(nested(63, 1), "send")
    @example(nested(63, 1), "task")
    @example(nested(64, 1), "task")
    def explore(given: Any, way: str) -> None:
        enqueue, room = ways[way]
        is_fine = is_plain(given, room) and is_small({"given": given})
        seen[is_fine] += 1
        before = sent()
        if not is_fine:
            with pytest.raises((NotRepresentable, BadArguments)) as caught:
                enqueue(given)
            assert sent() == before
            assert SECRET not in shown(caught.value)
        else:
            job = enqueue(given)
            assert sent() == before + 1
            assert is_same({"given": given}, json.loads(value(engine, read, id=job.id)))

    explore()
    assert min(seen.values()) > 50 * times
    assert value(engine, "select count(*) from sqlqueue.job") == seen[True]


# Names and words

SQL = (
    "'; drop table sqlqueue.job; --",
    "x' or '1'='1",
    "$$; truncate sqlqueue.job; $$",
    "sqlqueue.job",
    "%(queue)s",
    "%s",
    ":queue",
    "{a,b}",
    '"',
    "\\",
    "a\\'b",
    "NULL",
    "null",
    "default",
    "-- a comment",
    "/*",
    "\N{FULLWIDTH APOSTROPHE}; select 1",
    "a\u202eb",
    "x" * 100,
    "x" * 101,
    "k" * 1000,
    "k" * 1001,
    "\N{GREEK SMALL LETTER ALPHA}" * 501,
)
words = st.sampled_from(SQL) | st.text(characters, max_size=30) | st.text("aZ09_.:-", max_size=9)


def is_name(word: str) -> bool:
    """Whether tasks and queues may be called so."""
    return 0 < len(word) <= 100 and set(word) <= set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.:-"
    )


@long_and_short
def test_r38_sql_as_any_name_is_refused_or_is_data(queue, engine, sent, times) -> None:
    read = (
        "select task, queue, tags, description, key, unique_key, headers from sqlqueue.job"
        " where id = :id"
    )
    seen = {True: 0, False: 0}
    made: set[UUID] = set()  # the same unique key makes no second job

    @examples(300 * times)
    @given(words, st.sampled_from(["task", "queue", "words", "key", "unique"]))
    def explore(word: str, place: str) -> None:
        expected: dict[str, Any]
        if place in ("task", "queue"):
            expected, is_fine = {place: word}, is_name(word)
        elif place == "words":
            expected = {"tags": [word, "b"], "description": word, "headers": {word: word}}
            is_fine = is_text(word)
        else:
            expected = {"key": word} if place == "key" else {"unique_key": word}
            is_fine = is_text(word) and len(word.encode()) <= 1000
        options = {name: given for name, given in expected.items() if name != "task"}
        if place == "unique":
            options = {"unique": Unique(key=word)}
        seen[is_fine] += 1
        before = sent()
        if not is_fine:
            with pytest.raises(ValueError, match=r"must match|NUL|bytes"):
                queue.using(**options).send(expected.get("task", "greet"))
            assert sent() == before
        else:
            job = queue.using(**options).send(expected.get("task", "greet"))
            row = rows(engine, read, id=job.id)[0]._asdict()
            assert {name: row[name] for name in expected} == expected
            made.add(job.id)

    explore()
    assert min(seen.values()) > 50 * times
    assert value(engine, "select count(*) from sqlqueue.job") == len(made)


WRONG = {
    "queue": [None, 1, b"mail"],
    "priority": [101, -101, 1.5, "1", None, math.nan],
    "delay": [-SOON, timedelta.max, timedelta.min, 5, "5 s"],
    "run_at": [datetime(2030, 1, 1), datetime.max, "tomorrow", 5, date(2030, 1, 1)],
    "expires": [datetime(2030, 1, 1), -SOON, timedelta.max, "tomorrow", 5],
    "timeout": [timedelta(0), -SOON, timedelta.max, 5],
    "retry": [None, 5],
    "max_crashes": [0, 32768, 1.5, "1", None],
    "executor": ["fork", 1, b"thread"],
    "keep": [None, "maybe", 2],
    "tags": ["word", [1], ["\0"], ["\ud800"], 5, None, [None]],
    "description": ["\0", "\ud800", 5, b"x"],
    "headers": [{"a": 1}, {1: "a"}, {"\0": ""}, {"a": "\udfff"}, {"a": "x" * 8192}, [], None],
    "key": ["\0", "\udfff", 5, "k" * 1001],
    "weight": [0, 1.5, "1", None, 1_000_001],
    "unique": [5, "key"],
}


@pytest.mark.parametrize("option", WRONG)
def test_r38_an_option_of_another_kind_is_refused_before_the_network(queue, sent, option) -> None:
    for wrong in WRONG[option]:
        before = sent()
        with pytest.raises((ValueError, TypeError)) as caught:
            queue.using(**{option: wrong}).send("greet", password=SECRET)
        assert sent() == before
        assert option in str(caught.value) or "unique" in option
        assert SECRET not in shown(caught.value)


class Nowhere(tzinfo):
    """A time zone that does not know how far off it is."""

    def utcoffset(self, at: datetime | None) -> None:
        return None


zones = st.timezones() | st.builds(
    timezone, st.timedeltas(timedelta(hours=-23), timedelta(hours=23))
)
instants = st.datetimes(timezones=zones) | st.datetimes(timezones=st.just(Nowhere()))
spans = st.timedeltas() | st.timedeltas(timedelta(-1), timedelta(40_000))
moments = st.tuples(instants, spans)


@long_and_short
def test_r38_an_instant_or_a_duration_is_refused_or_comes_back(queue, engine, sent, times) -> None:
    read = (
        "select created_at, due_at, expires_at, timeout from sqlqueue.job where id = :id and"
        " coalesce(due_at, now()) > now() - interval '1 minute'"
    )
    years = timedelta(days=36500)
    seen = {True: 0, False: 0}

    @examples(150 * times)
    @given(st.sampled_from(["run_at", "expires at", "expires in", "delay", "timeout"]), moments)
    def explore(which: str, given: tuple[datetime, timedelta]) -> None:
        option, (instant, span) = which.split()[0], given
        is_instant = which in ("run_at", "expires at")
        wanted: Any = instant if is_instant else span
        least = timedelta(microseconds=1) if option == "timeout" else timedelta(0)
        is_fine = (
            instant.utcoffset() is not None and 1 < instant.year < 9999
            if is_instant
            else least <= span <= years
        )
        seen[is_fine] += 1
        before = sent()
        if not is_fine:
            with pytest.raises(ValueError, match=option):
                queue.using(**{option: wanted}).send("greet")
            assert sent() == before
            return
        row = rows(engine, read, id=queue.using(**{option: wanted}).send("greet").id)[0]
        if is_instant:  # one that clocks skip or repeat equals none of another zone (PEP 495)
            wanted = wanted.astimezone(UTC)
        if option == "timeout":
            assert row.timeout == wanted
        elif option == "expires":
            assert row.expires_at == (wanted if is_instant else row.created_at + wanted)
        else:
            due = wanted if is_instant else row.created_at + wanted
            assert row.due_at == (due if due > row.created_at else None)

    explore()
    assert min(seen.values()) > 10 * times


# Results


@long_and_short
def test_r38_a_result_that_is_no_json_fails_once(queue, engine, times) -> None:
    held: list[Any] = []
    seen = {True: 0, False: 0}

    @queue.task(name="give", retry=Retry(attempts=5, waits=[timedelta(0)]))
    def give(number: int) -> Any:
        return held[number]

    @examples(10 * times)
    @given(st.lists(values, min_size=20, max_size=20))
    def explore(given: list[Any]) -> None:
        held[:] = given
        jobs = [give.enqueue(number) for number in range(len(given))]
        for one, job in zip(given, jobs, strict=True):
            is_fine = is_plain(one, 63) and (one is None or is_small(one))
            seen[is_fine] += 1
            if is_fine:
                assert is_same(one, job.wait(timedelta(seconds=30)))
                continue
            with pytest.raises(JobFailed, match="NotRepresentable") as caught:
                job.wait(timedelta(seconds=30))
            assert (job.run, job.state) == (1, "failed")
            assert SECRET not in f"{caught.value}{job.error}{job.traceback}"

    with queue.worker("default", **POLLING):
        explore()
    assert min(seen.values()) > 20 * times


# Messages


class Place(NamedTuple):
    """A database of a server of its own, which has logged what went wrong there."""

    engine: Engine
    url: str
    log: Path

    def logged(self, what: str) -> int:
        """How often the server's log says something."""
        return self.log.read_text(errors="replace").count(what)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """A server with the settings that Postgres has by itself, but for speed."""
    with Server(durable=False) as server:
        engine = create_engine(server.url)
        migrate(engine)
        folder = value(engine, "show data_directory")
        yield Place(engine, server.url, Path(folder).parent / "log")
        engine.dispose()


@contextmanager
def locked(engine: Engine, table: str) -> Iterator[None]:
    """Have somebody else hold a table."""
    with engine.connect() as conn:
        conn.execute(text(f"lock table sqlqueue.{table}"))
        yield
        conn.rollback()


@pytest.fixture
def caller(place: Place, request: pytest.FixtureRequest) -> Iterator[Caller]:
    """An application's own transaction, of a kind."""
    caller = Caller(request.param, place.url)
    yield caller
    caller.close()


@pytest.mark.parametrize("caller", KINDS, indirect=True)
@long_and_short
def test_r38_no_argument_is_in_an_error_on_a_callers_connection(
    place, caller, caplog, times
) -> None:
    """The application's engine shows parameters, as SQLAlchemy does by default."""
    caplog.set_level(logging.DEBUG)
    queue = Queue(place.engine)
    give = queue.task(name="give")(lambda secret: secret)
    ways = {
        "enqueue": (give, "ready", "55P03"),
        "refused": (give.using(id=UUID(int=7 << 76)), None, None),
        "unique": (give.using(unique=Unique()), "unique_claim", "55P03"),
        "late": (give.using(delay=SOON), "scheduled", "57014"),
    }

    @examples(8 * times)
    @given(st.sampled_from(sorted(ways)), texts.filter(is_text))
    def explore(way: str, secret: str) -> None:
        task, table, code = ways[way]
        limit = "statement" if code == "57014" else "lock"
        caller.execute(f"set local {limit}_timeout = '20ms'")
        held = locked(place.engine, table) if table else nullcontext()
        with held, pytest.raises((DBAPIError, psycopg.Error, IdOutOfRange)) as caught:
            caller.enqueue(task, secret)
        caller.rollback()
        if code:
            assert getattr(caught.value, "orig", caught.value).sqlstate == code
        else:
            assert isinstance(caught.value, IdOutOfRange)
        assert SECRET not in shown(caught.value)

    before = place.logged("ERROR")
    explore()
    assert place.logged("ERROR") > before
    assert place.logged("insert into sqlqueue.job") > 0  # the statement that failed is there
    assert place.logged(SECRET) == 0
    assert SECRET not in caplog.text


def test_r38_no_argument_is_in_an_error_of_our_own_connection(place, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    application = create_engine(place.url, connect_args={"options": "-c lock_timeout=20ms"})
    queue = Queue(application)
    give = queue.task(name="give")(lambda secret: secret)
    ended = "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()"
    before = place.logged("ERROR")

    with locked(place.engine, "ready"):
        for call in (
            lambda: give.enqueue(SECRET),
            lambda: asyncio.run(give.aenqueue(SECRET)),
            lambda: queue.enqueue_many([give.s(SECRET)] * 3),
        ):
            with pytest.raises(DBAPIError) as caught:
                call()
            assert SECRET not in shown(caught.value)
    rows(place.engine, ended)
    with pytest.raises(DBAPIError) as caught:
        queue.enqueue_many([give.s(SECRET)])  # a single one would be tried again
    assert SECRET not in shown(caught.value)

    assert place.logged("ERROR") >= before + 3
    assert place.logged(SECRET) == 0
    assert SECRET not in caplog.text
    application.dispose()


def test_r38_no_argument_or_result_is_in_the_log_of_a_worker(place, caplog) -> None:
    """Whatever a task, a retry policy, a hook or a result does wrong."""
    caplog.set_level(logging.DEBUG)
    queue = Queue(create_engine(place.url, hide_parameters=True))

    def decide(error: BaseException, failures: int) -> timedelta:
        raise KeyError(str(error))

    def told(ended: Ended) -> None:
        raise RuntimeError(f"{ended.result} {ended.error}")

    queue.after_run.append(told)

    @queue.task(name="fail", retry=Retry(attempts=2, decide=decide))
    def fail(secret: str) -> None:
        raise ValueError(secret)

    @queue.task(name="give_odd", retry=Retry(attempts=1))
    def give_odd(secret: str) -> Any:
        return {secret}

    @queue.task(name="finish", retry=Retry(attempts=1), transactional=True)
    def finish(session: Session, secret: str) -> str:
        session.execute(text("set local statement_timeout = '20ms'"))
        session.execute(text("select pg_sleep(1), :secret"), {"secret": secret})
        return secret

    calls = [(fail, 2), (give_odd, 1), (finish, 1)]
    jobs = [task.using(queue="r38").enqueue(SECRET) for task, _ in calls]
    done = [queue.using(queue="r38").send("fail", other=SECRET)]
    with queue.worker("r38", **POLLING):
        for job in (*jobs, *done):
            with pytest.raises(JobFailed):
                job.wait(timedelta(seconds=30))
        wait_until(lambda: caplog.text.count("a hook of run") >= 4, what="the hooks")

    assert [job.run for job in jobs] == [runs for _, runs in calls]
    for said in ("its retry policy failed", "KeyError", "RuntimeError", "run 1 failed"):
        assert said in caplog.text
    assert SECRET not in caplog.text
    assert place.logged("canceling statement due to statement timeout") > 0
    assert place.logged(SECRET) == 0
    queue.engine.dispose()


# Names of tasks


@pytest.mark.parametrize("executor", [None, "process"])
def test_r38_only_registered_tasks_run_and_nothing_is_imported(
    queue, engine, tmp_path, monkeypatch, executor
) -> None:
    """What is named in the database is looked up in a dictionary."""
    (tmp_path / "planted.py").write_text(
        f"open({str(tmp_path / 'was_here')!r}, 'w')\ndef run(): ..."
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ran = queue.task(name="known")(lambda: "ran").enqueue()
    odd = Retry(attempts=2, give_up_on=["planted.Error"])
    names = ["planted", "planted.run", "os.system", "builtins.exec", "known.__call__", "__main__"]
    jobs = [queue.using(retry=odd, executor=executor).send(name) for name in names]

    with queue.worker("default", **POLLING):
        wait_until(lambda: all(job.refresh().state == "scheduled" for job in jobs), 30)
        assert ran.wait(SOON) == "ran"

    reasons = "select distinct outcome, error_type from sqlqueue.run where not is_final"
    assert rows(engine, reasons) == [("snoozed", "unknown_task")]
    assert "planted" not in sys.modules
    assert not (tmp_path / "was_here").exists()


# What a role that may only enqueue could do to the others


def test_r38_a_key_that_fits_no_index_holds_nobody_up(queue, engine) -> None:
    """A policy puts keys into an index; one that were too long would stop all promotion."""
    queue.set_policy(Policy(concurrency=1), queue="few")
    longest = base64.b64encode(os.urandom(750)).decode()
    assert len(longest) == 1000
    with pytest.raises(ValueError, match="at most 1000 bytes"):
        queue.using(key=longest + "x").send("greet")
    with pytest.raises(DBAPIError, match="key is over 1000 bytes"):
        rows(engine, "select sqlqueue.enqueue('a', key => :key)", key=longest + "x")

    queue.using(queue="few", key=longest, delay=timedelta(milliseconds=1)).send("x" * 100)
    queue.set_policy(Policy(concurrency=1), task="x" * 100)
    with engine.begin() as conn:
        assert [moved for _, moved in queue.store.promote(conn, None, 10)] == [1]

    assert value(engine, "select count(*) from sqlqueue.waiting") == 1
