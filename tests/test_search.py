"""The search: what each term finds, that it never reads all of the history, what is refused."""

import json
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from sqlqueue import Queue, Retry
from sqlqueue.cli import main
from sqlqueue.reports import Reports
from sqlqueue.reports import search as searching
from sqlqueue.reports.search import Search, SearchError
from tests.harness import rows, value, work


@pytest.fixture
def shop(engine: Engine, queue: Queue) -> dict[str, str]:
    """Jobs of several kinds; their names by id."""

    @queue.task(name="mail.send", retry=Retry(attempts=1))
    def send(user: dict[str, Any], tries: int = 0) -> Any:
        if tries:
            raise ConnectionError("smtp went away")
        return {"sent": user["id"]}

    @queue.task(name="bill", retry=Retry(attempts=2, waits=[timedelta(hours=1)]))
    def bill(n: int) -> None:
        raise TimeoutError(f"bank {n}")

    user = {"id": 42, "name": "Ana B", "vip": True}
    made = {
        "sent": send.using(tags=["vip", "eu"], headers={"trace": "abc"}).enqueue(user),
        "failed": send.using(key="k1").enqueue({"id": "42"}, 1),
        "retrying": bill.enqueue(7),
        "other": send.using(queue="emails", priority=5).enqueue({"id": 43}),
    }
    work(queue)
    made["later"] = send.using(delay=timedelta(hours=1)).enqueue(user)
    return {str(job.id): name for name, job in made.items()}


def found(engine: Engine, shop: dict[str, str], text: str) -> set[str]:
    with engine.begin() as conn:
        return {shop[str(one)] for one in Search(text).find(Reports(conn, "sqlqueue"), 50).ids}


EVERY = {"sent", "failed", "retrying", "other", "later"}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", EVERY),
        ("state:failed", {"failed"}),
        ("state:failed,ready", {"failed", "other"}),
        ("-state:failed,ready", {"sent", "retrying", "later"}),
        ("state:scheduled", {"retrying", "later"}),
        ("state:scheduled reason:retry", {"retrying"}),
        ("queue:emails", {"other"}),
        ("queue:e*", {"other"}),
        ("task:mail.*", EVERY - {"retrying"}),
        ("-task:mail.*", {"retrying"}),
        ("tag:vip", {"sent"}),
        ("tag:e*", {"sent"}),
        ("worker:*", {"sent", "failed"}),
        ("priority:>0", {"other"}),
        ("priority:0", EVERY - {"other"}),
        ("key:k1", {"failed"}),
        ("error:Conn*", {"failed"}),
        ("error:smtp*", {"failed"}),
        ("since:1h", EVERY),
        ("until:1h", set()),
        ("since:99999999w", EVERY),
        ("since:2020-01-01 until:2999-01-01T00:00Z", EVERY),
        ("attempt:2", {"retrying"}),
        ("run:>0", {"sent", "failed", "retrying"}),
        ("ran:>10m", set()),
        ("waited:<1h", {"sent", "failed", "other"}),
        ("args.user.id:42", {"sent", "failed", "later"}),
        ('args.user.id:"42"', {"failed"}),
        ('args.user.name:"Ana B"', {"sent", "later"}),
        ("args.user.name:Ana*", {"sent", "later"}),
        ("args.user.vip:true", {"sent", "later"}),
        ("args.n:7", {"retrying"}),
        ("args.no.such.path:1", set()),
        ("headers.trace:abc", {"sent"}),
        ("result.sent:42", {"sent"}),
        ("smtp", {"failed"}),
        ('"went away"', {"failed"}),
        ("bill", {"retrying"}),
        ("100%", set()),
        ("state:failed task:mail.* error:Conn* since:2h", {"failed"}),
    ],
)
def test_a_term_finds_what_it_says(engine, shop, text, names) -> None:
    assert found(engine, shop, text) == names


def test_m16_one_search_finds_the_same_in_commands_and_pages(engine, shop, migrated_url) -> None:
    from starlette.testclient import TestClient

    from sqlqueue.dashboard import Access, dashboard

    site = TestClient(dashboard(Queue(migrated_url), authorize=lambda _: Access("a", "view")))
    for text in ("", "state:failed", "args.user.id:42", "task:mail.* -state:failed"):
        listed = CliRunner().invoke(
            main, ["--url", migrated_url, "jobs", "list", "--where", text, "--json"]
        )
        ids = {row["id"] for row in json.loads(listed.stdout)}
        page = site.get("/jobs", params={"q": text}).text
        assert {one for one in shop if f'data-id="{one}"' in page} == ids


def test_ids_are_found_whole_or_by_their_end(engine, shop) -> None:
    for job_id, name in shop.items():
        assert found(engine, shop, f"id:{job_id}") == {name}
        assert found(engine, shop, f"id:{job_id[-8:]}") == {name}
    first, second = list(shop)[:2]
    assert found(engine, shop, f"id:{first},{second}") == {shop[first], shop[second]}


def test_a_group_is_found_by_its_fingerprint(engine, shop) -> None:
    ((group, jobs),) = rows(engine, "select fingerprint, jobs from sqlqueue.failures")
    assert jobs == 1
    assert found(engine, shop, f"group:{group}") == {"failed"}
    assert found(engine, shop, "group:nobody") == set()


def test_pages_follow_one_another_newest_first(engine, queue, shop) -> None:
    with engine.begin() as conn:
        reports = Reports(conn, "sqlqueue")
        every = Search("").find(reports, 50).ids
        pages, before = [], None
        while ids := Search("").find(reports, 2, before).ids:
            pages += ids
            before = ids[-1]
    assert pages == every == sorted(every, reverse=True)


def test_it_says_how_far_it_looked(engine, queue, shop, monkeypatch) -> None:
    monkeypatch.setattr(searching, "DEPTH", 2)
    for n in range(3):
        queue.send("bill", n)
    with engine.begin() as conn:
        reports = Reports(conn, "sqlqueue")
        assert Search("state:ready args.n:0").find(reports, 50).looked_back_to is not None
        assert Search("state:running args.n:0").find(reports, 50).looked_back_to is None
        assert Search("").find(reports, 50).looked_back_to is None


def test_what_lies_deeper_is_found_by_its_id_or_its_time(engine, queue, shop, monkeypatch) -> None:
    old = str(value(engine, "select sqlqueue.enqueue('bill', id => sqlqueue.uuid_at(now() - "
                    "interval '9 d'))"))  # fmt: skip
    rows(
        engine, "update sqlqueue.job set created_at = now() - interval '9 d' where id = :id", id=old
    )
    queue.send("bill", 1)
    queue.send("bill", 2)
    sent = next(job for job, name in shop.items() if name == "sent")
    shop[old] = "old"

    monkeypatch.setattr(searching, "DEPTH", 1)

    assert found(engine, shop, f"id:{sent}") == {"sent"}
    assert found(engine, shop, "until:8d task:bill") == {"old"}
    assert found(engine, shop, "since:10d until:8d task:bill") == {"old"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("foo:1", "there is no key foo"),
        ("stat:failed", "did you mean state:"),
        ("state:fail", "did you mean failed"),
        ("run:x", "no number"),
        ("ran:3", "no duration"),
        ("since:yesterday", "no time"),
        ("id:zz", "neither an id nor its last"),
        ("args:3", "needs a path"),
        ("state:", "needs a value"),
        ('"open', "quote is open"),
        ("a\0b", "no NUL"),
        ("x" * 3000, "at most"),
        ("reason:why", "knows retry"),
    ],
)
def test_what_cannot_be_understood_is_refused(text, says) -> None:
    with pytest.raises(SearchError, match=says):
        Search(text)


@given(st.text(max_size=60) | st.from_regex(r"[a-z]{1,9}(\.[a-z0-9]{1,4})?:[<>=\"*,\w]{0,9}"))
@settings(max_examples=300, deadline=None)
def test_m16_random_input_is_refused_or_finds_something(text) -> None:
    with suppress(SearchError):
        Search(text)


@given(
    st.from_regex(
        r"-?(queue|task|tag|error|worker|key|unique|args\.[a-z0-9.]{1,6}|headers\.x|result\.y):"
        r"[\w*%\\'\"\[\]{}.-]{1,9}",
        fullmatch=True,
    )
)
@settings(max_examples=80, deadline=None)
def test_m16_random_values_are_data(migrated_url, text) -> None:
    try:
        search = Search(text)
    except SearchError:
        return
    queue = Queue(migrated_url)
    with queue.engine.begin() as conn:
        search.find(Reports(conn, "sqlqueue"), 5)
    queue.engine.dispose()
