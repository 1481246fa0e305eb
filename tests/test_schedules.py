"""Schedules: which instants they name, and that each of these makes one job."""

import random
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise, product
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

import pytest

from sqlqueue import Queue, Schedule
from sqlqueue.schedule import MOST
from tests.harness import POLLING, rows, value, wait_until, work

MINUTE = timedelta(minutes=1)
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def instants(schedule: Schedule, after: datetime, count: int) -> list[str]:
    tz = ZoneInfo(schedule.tz)
    return [str(at.astimezone(tz))[:16] for at in islice(schedule.after(after), count)]


# Which instants


def test_a_cron_line_names_instants_in_its_time_zone() -> None:
    schedule = Schedule(cron="30 9 * * MON-FRI", tz="Europe/Paris")

    assert instants(schedule, NOON, 2) == ["2026-03-02 09:30", "2026-03-03 09:30"]
    assert next(schedule.after(NOON)) == datetime(2026, 3, 2, 8, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("alias", "first"),
    [
        ("@hourly", "2026-03-01 13:00"),
        ("@daily", "2026-03-02 00:00"),
        ("@midnight", "2026-03-02 00:00"),
        ("@weekly", "2026-03-08 00:00"),
        ("@monthly", "2026-04-01 00:00"),
        ("@yearly", "2027-01-01 00:00"),
        ("@annually", "2027-01-01 00:00"),
    ],
)
def test_an_alias_stands_for_a_line(alias, first) -> None:
    assert instants(Schedule(cron=alias), NOON, 1) == [first]


def test_an_interval_is_counted_from_one_instant_for_all() -> None:
    schedule = Schedule(every=timedelta(minutes=7))
    first, second = islice(schedule.after(NOON), 2)

    assert second - first == 7 * MINUTE
    assert next(schedule.after(first - MINUTE)) == first


def test_what_falls_into_the_hour_left_out_runs_right_after_it() -> None:
    # In Paris, 2026-03-29 has no time from 02:00 to 03:00.
    schedule = Schedule(cron="30 2 * * *", tz="Europe/Paris")
    after = datetime(2026, 3, 28, 12, tzinfo=UTC)

    assert instants(schedule, after, 2) == ["2026-03-29 03:00", "2026-03-30 02:30"]


def test_what_falls_into_the_hour_that_comes_twice_runs_once() -> None:
    # In Paris, 2026-10-25 has the time from 02:00 to 03:00 twice.
    schedule = Schedule(cron="30 2 * * *", tz="Europe/Paris")
    day = datetime(2026, 10, 24, 12, tzinfo=UTC)

    assert instants(schedule, day, 2) == ["2026-10-25 02:30", "2026-10-26 02:30"]
    for minutes in range(0, 180, 10):  # wherever in these hours a worker begins
        begins = datetime(2026, 10, 24, 23, tzinfo=UTC) + minutes * MINUTE
        assert next(schedule.after(begins)) > begins


def test_a_line_with_a_star_goes_by_the_time_that_passes() -> None:
    schedule = Schedule(cron="*/30 * * * *", tz="Europe/Paris")
    for day in (datetime(2026, 3, 29, tzinfo=UTC), datetime(2026, 10, 25, tzinfo=UTC)):
        found = list(islice(schedule.after(day), 10))
        assert {b - a for a, b in pairwise(found)} == {30 * MINUTE}


def has_summer_time(name: str) -> bool:
    winter, summer = (datetime(2015, month, 1, tzinfo=ZoneInfo(name)) for month in (1, 7))
    return winter.utcoffset() != summer.utcoffset()


ZONES = sorted(zone for zone in available_timezones() if "/" in zone and has_summer_time(zone))


def transitions(zone: ZoneInfo) -> list[datetime]:
    """The instants, to the minute, at which the clocks of a zone change in twenty years."""
    found, hour = [], timedelta(hours=1)
    start = datetime(2010, 1, 1, tzinfo=UTC)
    before = start.astimezone(zone).utcoffset()
    for day in range(20 * 366):
        at = start + timedelta(days=day)
        if at.astimezone(zone).utcoffset() != before:
            low, high = at - 24 * hour, at
            while high - low > MINUTE:
                middle = low + (high - low) / 2
                is_low = middle.astimezone(zone).utcoffset() == before
                low, high = (middle, high) if is_low else (low, middle)
            found.append(high.replace(second=0, microsecond=0))
            before = at.astimezone(zone).utcoffset()
    return found


def expected(zone: ZoneInfo, hour: int, minute: int, begin: datetime, end: datetime) -> list[Any]:
    """What a daily line of a fixed time has to give, found by walking the clock on the wall.

    Each minute of real time is looked at. A time that the wall clock jumps over is due at the
    first minute after the jump; one that it shows twice is due the first time.
    """
    found: list[datetime] = []
    done: set[Any] = set()
    at = begin
    wall_before = (begin - MINUTE).astimezone(zone).replace(tzinfo=None)
    while at < end:
        wall = at.astimezone(zone).replace(tzinfo=None)
        target = wall.replace(hour=hour, minute=minute)
        for day in (target - timedelta(days=1), target):
            if wall_before < day <= wall and day.date() not in done:
                done.add(day.date())
                if at > begin:
                    found.append(at)
        wall_before = max(wall, wall_before) if wall < wall_before else wall
        at += MINUTE
    return found


@pytest.mark.parametrize("zone", random.Random(40).sample(ZONES, 40))
def test_r29_every_change_of_clocks_is_as_the_wall_shows_it(zone) -> None:
    tz, dice = ZoneInfo(zone), random.Random(zone)
    changes = transitions(tz)
    assert len(changes) >= 2
    for change in changes:
        begin, end = change - timedelta(hours=30), change + timedelta(hours=30)
        at = change.astimezone(tz) + timedelta(minutes=dice.choice([-60, -30, -1, 0, 1, 30, 60]))
        schedule = Schedule(cron=f"{at.minute} {at.hour} * * *", tz=zone)

        found = [at for at in islice(schedule.after(begin), 5) if at < end]

        assert found == expected(tz, at.hour, at.minute, begin, end), (change, schedule.cron)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_r29_every_line_is_as_the_wall_shows_it_at_every_change_of_clocks() -> None:
    # 60 daily lines, as near to the changes as dice put them, at each change of every zone.
    dice, looked = random.Random(29), 0
    minutes = [dice.choice([dice.randrange(-180, 181), -60, -1, 0, 1, 60]) for _ in range(60)]
    for zone in ZONES:
        tz = ZoneInfo(zone)
        for change, offset in product(transitions(tz)[::7], minutes):
            begin, end = change - timedelta(hours=30), change + timedelta(hours=30)
            at = change.astimezone(tz) + timedelta(minutes=offset)
            schedule = Schedule(cron=f"{at.minute} {at.hour} * * *", tz=zone)
            found = [at for at in islice(schedule.after(begin), 5) if at < end]
            assert found == expected(tz, at.hour, at.minute, begin, end), (change, schedule.cron)
            looked += 1
    print(f"{looked} lines in {len(ZONES)} zones")


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"cron": "* * * * *", "every": MINUTE},
        {"cron": "* * * *"},
        {"cron": "61 * * * *"},
        {"cron": "0 0 31 2 *"},
        {"cron": "* * * * *", "tz": "Mars/Base"},
        {"every": timedelta(0)},
        {"every": MINUTE, "missed": "some"},
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match=r"schedule|cron|every|missed"):
        Schedule(**wrong)


# Missed instants


@pytest.mark.parametrize(
    ("missed", "fired"), [("latest", ["12:04"]), ("all", ["12:01", "12:02", "12:03", "12:04"])]
)
def test_r29_after_a_pause_of_all_workers_what_was_missed_is_made_up_for(missed, fired) -> None:
    schedule = Schedule(cron="* * * * *", missed=missed)

    found, following = schedule.due(NOON + MINUTE, NOON + 4.5 * MINUTE)

    assert [at.strftime("%H:%M") for at in found] == fired
    assert following == NOON + 5 * MINUTE


def test_without_making_up_only_what_is_due_now_fires() -> None:
    schedule = Schedule(cron="*/5 * * * *", missed="none")

    assert schedule.due(NOON, NOON + 14 * MINUTE)[0] == []
    assert schedule.due(NOON, NOON + 10.5 * MINUTE)[0] == [NOON + 10 * MINUTE]


def test_more_than_can_be_made_up_for_at_once_is_made_up_for_in_parts() -> None:
    schedule = Schedule(every=timedelta(seconds=1), missed="all")
    now = NOON + 60 * MINUTE

    found, following = schedule.due(NOON, now)

    assert len(found) == MOST
    assert following == found[-1] + timedelta(seconds=1)


# Jobs


def fired(engine: Any) -> list[Any]:
    return rows(engine, "select schedule, at from sqlqueue.tick order by at")


def make_due(engine: Any) -> None:
    """Have the instant of this year come again: no other comes while a test runs."""
    rows(engine, "update sqlqueue.schedule set next_at = date_trunc('year', now(), 'UTC')")


def test_a_declared_schedule_enqueues_its_task_by_itself(queue, engine) -> None:
    @queue.schedule("@yearly", args={"name": "you"})
    @queue.task(name="greet", queue="mail", priority=3)
    def greet(name: str) -> str:
        return name

    work(queue)
    assert fired(engine) == []
    make_due(engine)
    work(queue)

    sql = "select queue, priority, state, headers ->> 'schedule' from sqlqueue.jobs"
    assert rows(engine, sql) == [("mail", 3, "succeeded", "greet")]
    assert value(engine, "select next_at > now() from sqlqueue.schedule")


def test_r29_an_instant_makes_one_job_however_often_it_is_due(queue, engine) -> None:
    @queue.schedule("@yearly")
    @queue.task(name="greet")
    def greet() -> None: ...

    work(queue)
    for _ in range(3):
        make_due(engine)
        work(queue)

    assert len(fired(engine)) == value(engine, "select count(*) from sqlqueue.job") == 1


def test_a_schedule_is_made_and_changed_at_run_time(queue, engine) -> None:
    @queue.task(name="greet")
    def greet(name: str) -> None: ...

    queue.set_schedule("often", greet.s("a"), Schedule(every=timedelta(hours=1)))
    queue.set_schedule("often", greet.s("b"), Schedule(cron="@daily", tz="Asia/Tokyo"))

    sql = "select args, cron, every, tz, is_declared from sqlqueue.schedule"
    assert rows(engine, sql) == [({"name": "b"}, "@daily", None, "Asia/Tokyo", False)]


def test_a_schedule_changed_in_sql_is_planned_anew(queue, engine) -> None:
    greet = queue.task(name="greet")(lambda: None)
    queue.set_schedule("often", greet.s(), Schedule(every=timedelta(days=1)))
    work(queue)
    rows(engine, "update sqlqueue.schedule set every = '1 minute', next_at = null")
    with queue.worker():
        wait_until(lambda: value(engine, "select next_at from sqlqueue.schedule"))

    soon = "select next_at <= now() + interval '1 minute' from sqlqueue.schedule"
    assert value(engine, soon)


def test_a_schedule_that_makes_no_sense_says_so_and_harms_no_other(queue, engine) -> None:
    @queue.schedule("@yearly")
    @queue.task(name="greet")
    def greet() -> None: ...

    work(queue)
    rows(
        engine,
        "insert into sqlqueue.schedule (name, task, cron) values ('bad', 'greet', 'every day')",
    )
    make_due(engine)
    work(queue)

    assert "every day" in value(engine, "select problem from sqlqueue.schedule where name = 'bad'")
    assert [row[0] for row in fired(engine)] == ["greet"]


def test_a_schedule_that_vanishes_from_the_code_is_paused(queue, engine) -> None:
    def with_schedules(*names: str) -> Queue:
        ours = Queue(queue.engine)
        greet = ours.task(name="greet")(lambda: None)
        for name in names:
            ours.schedule("@daily", name=name)(greet)
        return ours

    work(with_schedules("a", "b"))
    queue.set_schedule(
        "by-hand", queue.task(name="greet")(lambda: None).s(), Schedule(cron="@daily")
    )
    work(with_schedules("b"))

    paused = "select name, paused_by from sqlqueue.schedule order by name"
    assert rows(engine, paused) == [("a", "code"), ("b", None), ("by-hand", None)]
    work(with_schedules("a", "b"))
    assert rows(engine, paused) == [("a", None), ("b", None), ("by-hand", None)]


def test_a_paused_schedule_does_not_fire(queue, engine) -> None:
    @queue.schedule("@yearly")
    @queue.task(name="greet")
    def greet() -> None: ...

    work(queue)
    queue.pause(schedule="greet", by="me", why="holiday")
    make_due(engine)
    work(queue)
    assert fired(engine) == []

    queue.resume(schedule="greet")
    work(queue)
    assert value(engine, "select paused_at is null and next_at > now() from sqlqueue.schedule")


def test_what_was_declared_in_a_transaction_that_failed_is_declared_again(
    queue, engine, caplog
) -> None:
    @queue.schedule("@yearly")
    @queue.task(name="greet")
    def greet() -> None: ...

    rows(
        engine,
        "create function refuse() returns trigger language plpgsql as"
        " $$ begin raise exception 'refused'; end $$;"
        "create constraint trigger refused after insert on sqlqueue.schedule"
        " deferrable initially deferred for each row execute function refuse()",
    )
    try:
        with queue.worker(**POLLING):
            wait_until(lambda: "refused" in caplog.text)
            rows(engine, "drop function refuse() cascade")
            wait_until(lambda: value(engine, "select name from sqlqueue.schedule"))
    finally:
        rows(engine, "drop function if exists refuse() cascade")


def test_a_schedule_is_run_now_by_sql(queue, engine) -> None:
    greet = queue.task(name="greet")(lambda: None)
    queue.set_schedule("daily", greet.s(), Schedule(cron="@daily"))

    job_id = value(engine, "select sqlqueue.run_schedule('daily')")

    assert value(engine, "select id from sqlqueue.jobs where state = 'ready'") == job_id


def test_a_full_queue_costs_a_schedule_one_job_and_no_more(queue, engine) -> None:
    from sqlqueue import Policy

    greet = queue.task(name="greet", queue="mail")(lambda: None)
    queue.set_policy(Policy(max_waiting=1), queue="mail")
    greet.enqueue()
    queue.set_schedule("daily", greet.s(), Schedule(cron="@daily"))

    assert value(engine, "select sqlqueue.run_schedule('daily')") is None
    assert value(engine, "select count(*) from sqlqueue.tick where job_id is null") == 1


def test_instants_of_long_ago_are_forgotten(queue, engine) -> None:
    greet = queue.task(name="greet")(lambda: None)
    queue.set_schedule("yearly", greet.s(), Schedule(cron="@yearly"))
    make_due(engine)
    rows(
        engine,
        "insert into sqlqueue.tick (schedule, at)"
        " select schedule, now() - interval '401 days'"
        " from unnest(array['yearly', 'other']) as schedule",
    )
    work(queue)

    assert [row[0] for row in fired(engine)] == ["other", "yearly"]
    assert value(engine, "select count(job_id) from sqlqueue.tick") == 1
