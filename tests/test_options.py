"""Options and retry policies: what is refused, what is stored, what comes back, what is drawn."""

import json
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqlqueue import Options, Queue, Retry
from sqlqueue.store import Lane
from tests.test_store import hire

SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)
# Longer than any sensible wait, shorter than what a float of seconds holds to the microsecond.
durations = st.timedeltas(timedelta(microseconds=1), timedelta(days=3650))
rngs = st.integers().map(random.Random)


class Lowest(random.Random):
    """Draws the least there is."""

    def random(self) -> float:
        return 0.0


class Highest(random.Random):
    """Draws nearly the most there is."""

    def random(self) -> float:
        return 1 - 2**-53


class Busy(Exception):
    """Somebody else's."""


class Rude(Busy):
    """A subclass of it."""


# Backoff


@st.composite
def policies(draw: st.DrawFn) -> Retry:
    base, limit = sorted([draw(durations), draw(durations)])
    return Retry(attempts=draw(st.integers(1, 32767)), base=base, limit=limit)


@given(policies(), st.integers(1, 32767), rngs)
def test_a_wait_is_never_negative_nor_over_the_limit(policy, failures, rng) -> None:
    assert timedelta(0) <= policy.backoff(failures, rng) <= policy.limit


@given(policies(), st.integers(1, 32766))
def test_the_longest_wait_doubles_from_the_base_up_to_the_limit(policy, failures) -> None:
    longest = policy.backoff(failures, Highest())
    next_longest = policy.backoff(failures + 1, Highest())

    exact = min(policy.base.total_seconds() * 2.0 ** min(failures - 1, 900), 1e12)
    exact = min(exact, policy.limit.total_seconds())
    assert longest.total_seconds() == pytest.approx(exact, rel=1e-9, abs=2e-6)
    assert longest <= next_longest
    assert policy.backoff(failures, Lowest()) == timedelta(0)


def test_the_whole_range_is_random() -> None:
    policy, rng = Retry(base=SECOND, limit=HOUR), random.Random(1)

    waits = [policy.backoff(3, rng) / (4 * SECOND) for _ in range(10_000)]

    tenths = [sum(n / 10 <= wait < (n + 1) / 10 for wait in waits) for n in range(10)]
    assert all(850 < count < 1150 for count in tenths)


@pytest.mark.parametrize("failures", [0, -1])
def test_there_is_no_wait_before_the_first_failure(failures) -> None:
    with pytest.raises(ValueError, match="failures must be at least 1"):
        Retry().backoff(failures, random.Random())


# What a policy decides


def test_a_job_ends_when_its_attempts_are_used() -> None:
    policy = Retry(attempts=3)

    assert policy.wait(Busy(), 2) is not None
    assert policy.wait(Busy(), 3) is None
    assert Retry(attempts=1).wait(Busy(), 1) is None


def test_a_list_of_waits_is_followed_and_its_last_repeated() -> None:
    policy = Retry(waits=[SECOND, HOUR])

    assert [policy.wait(Busy(), n) for n in (1, 2, 3, 9)] == [SECOND, HOUR, HOUR, HOUR]


@pytest.mark.parametrize("named", [Busy, f"{__name__}.Busy", Exception, "Exception"])
def test_an_error_that_is_given_up_on_ends_the_job(named) -> None:
    policy = Retry(waits=[SECOND], give_up_on=[named])

    assert policy.wait(Rude(), 1) is None
    assert policy.wait(Busy(), 1) is None
    assert (policy.wait(KeyError(), 1) is None) == (named in (Exception, "Exception"))


def test_an_error_can_have_a_policy_of_its_own() -> None:
    policy = Retry(
        waits=[SECOND], by_error={Rude: Retry(attempts=1), Busy: Retry(attempts=99, waits=[HOUR])}
    )

    assert policy.wait(Rude(), 1) is None
    assert policy.wait(Busy(), 50) == HOUR
    assert policy.wait(KeyError(), 1) == SECOND


def test_a_function_can_decide() -> None:
    policy = Retry(decide=lambda error, failures: failures * SECOND if error.args else None)

    assert policy.wait(Busy("x"), 7) == 7 * SECOND
    assert policy.wait(Busy(), 7) is None
    assert policy.wait(Busy("x"), 10) is None  # its attempts are used


@pytest.mark.parametrize(
    "wrong",
    [
        {"attempts": 0},
        {"attempts": 32768},
        {"base": timedelta(0)},
        {"base": 2 * HOUR},
        {"limit": -HOUR},
        {"waits": [SECOND, -SECOND]},
        {"limit": timedelta.max},
        {"waits": [timedelta.max]},
        {"by_error": {Busy: Retry(decide=lambda error, failures: None)}},
        {"by_error": {Busy: Retry(by_error={Rude: Retry()})}},
    ],
)
def test_a_policy_cannot_be_built_wrong(wrong) -> None:
    with pytest.raises(ValueError, match=r"must|need|may"):
        Retry(**wrong)


# What is stored with the job

names = st.sampled_from([ValueError, KeyError, Busy, Rude, "shop.Error"])
leaves = st.builds(
    lambda policy, waits, names: Retry(
        attempts=policy.attempts,
        base=policy.base,
        limit=policy.limit,
        waits=waits,
        give_up_on=names,
    ),
    policies(),
    st.lists(durations, max_size=3),
    st.lists(names, max_size=2),
)
trees = st.builds(
    lambda policy, by_error: Retry(
        attempts=policy.attempts,
        waits=policy.waits,
        give_up_on=policy.give_up_on,
        by_error=by_error,
    ),
    leaves,
    st.dictionaries(names, leaves, max_size=2),
)
errors = st.sampled_from([ValueError(), KeyError(), Busy(), Rude(), OSError()])


@given(leaves | trees, errors, st.integers(1, 32767), st.integers())
def test_a_policy_read_from_the_row_decides_the_same(policy, error, failures, seed) -> None:
    read = Retry.from_json(policy.attempts, policy.to_json())

    waits = [one.wait(error, failures, random.Random(seed)) for one in (policy, read)]
    assert waits[0] == waits[1]


def test_the_usual_policy_takes_no_room_in_the_row() -> None:
    assert Retry().to_json() is None
    assert Retry(attempts=3).to_json() is None
    assert Retry.from_json(3, None) == Retry(attempts=3)


def test_a_function_that_decides_is_asked_of_the_task() -> None:
    declared = Retry(decide=lambda error, failures: HOUR)
    text = declared.to_json()

    assert Retry.from_json(10, text, declared).wait(Busy(), 1) == HOUR
    assert Retry.from_json(10, text, Retry()).wait(Busy(), 1) <= 2 * SECOND  # it has been removed
    assert Retry.from_json(10, None, declared).decide is None  # the call had another policy


@pytest.mark.parametrize(
    "policy",
    [
        Retry(attempts=4, waits=[SECOND], give_up_on=[Busy]),
        Retry(base=HOUR, limit=2 * HOUR),
        Retry(by_error={Busy: Retry(attempts=2)}),
        Retry(decide=lambda error, failures: None),
    ],
)
def test_a_policy_comes_back_from_the_database(queue: Queue, engine, store, policy) -> None:
    queue.using(retry=policy).send("shop.greet")

    with engine.begin() as conn:
        (row,) = store.claim(conn, Lane("default", 0), 0, 1, hire(conn, store))
    read = Retry.from_json(row.attempts, row.retry, policy)
    assert (read.attempts, read.to_json()) == (policy.attempts, policy.to_json())
    assert read.decide is policy.decide


# Options


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"queue": ""}, "queue must match"),
        ({"queue": "a b"}, "queue must match"),
        ({"queue": "x" * 101}, "queue must match"),
        ({"queue": "a\n"}, "queue must match"),
        ({"queue": None}, "queue must match"),
        ({"priority": 101}, "priority must be from -100 to 100"),
        ({"priority": -101}, "priority must be from -100 to 100"),
        ({"delay": -SECOND}, "delay must"),
        ({"delay": timedelta.max}, "delay must"),
        ({"delay": SECOND, "run_at": datetime.now(UTC)}, "delay or run_at, not both"),
        ({"run_at": datetime(2030, 1, 1)}, "run_at must be an aware datetime"),
        ({"expires": datetime(2030, 1, 1)}, "expires must be an aware datetime"),
        ({"timeout": timedelta(0)}, "timeout must be more than 0"),
        ({"timeout": -SECOND}, "timeout must be more than 0"),
        ({"max_crashes": 0}, "max_crashes must be from 1"),
        ({"max_crashes": 32768}, "max_crashes must be from 1"),
        ({"executor": "fork"}, "executor must be one of"),
        ({"tags": ["a\0"]}, "no NUL or surrogate"),
        ({"tags": ["\ud800"]}, "no NUL or surrogate"),
        ({"description": "a\0"}, "no NUL or surrogate"),
        ({"headers": {"a\0": ""}}, "no NUL or surrogate"),
        ({"headers": {"a": "\udfff"}}, "no NUL or surrogate"),
        ({"headers": {"a": "x" * 8192}}, "headers must be at most 8192 bytes"),
    ],
)
def test_an_option_that_fits_no_job_is_refused(wrong: dict[str, Any], problem) -> None:
    with pytest.raises(ValueError, match=problem):
        Options(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"tags": "abc"}, {"tags": [1]}, {"headers": {"a": 1}}, {"headers": {1: "a"}}]
)
def test_words_are_text(wrong) -> None:
    with pytest.raises(TypeError, match="string"):
        Options(**wrong)


def test_options_are_changed_one_by_one() -> None:
    options = Options(queue="mail", priority=3)

    changed = options.changed({"priority": 4, "delay": SECOND})

    assert changed == Options(queue="mail", priority=4, delay=SECOND)
    assert options == Options(queue="mail", priority=3)
    assert options.changed({}) is options


@pytest.mark.parametrize("edge", [-100, 0, 100])
def test_the_edges_of_what_is_allowed_are_stored(queue: Queue, edge) -> None:
    job = queue.using(
        queue="x" * 100,
        priority=edge,
        timeout=timedelta(microseconds=1),
        retry=Retry(attempts=32767),
        max_crashes=32767,
        headers={"a": "x" * 8100},
        run_at=datetime(9998, 12, 31, tzinfo=UTC),
    ).send("x" * 100)

    assert (job.queue, job.task, job.state) == ("x" * 100, "x" * 100, "scheduled")


def test_headers_are_measured_as_json() -> None:
    almost = {"a": "x" * (8192 - len(json.dumps({"a": ""})))}

    assert Options(headers=almost).headers == almost
    with pytest.raises(ValueError, match="headers"):
        Options(headers={"a": almost["a"] + "x"})
