"""The dashboard, through Starlette's client on a real Postgres: pages, actions, who may do what."""

import base64
import re
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from a2wsgi import ASGIMiddleware
from click.testing import CliRunner
from httpx import Client, WSGITransport
from sqlalchemy import Engine, create_engine
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from sqlqueue import Policy, Queue, Retry, Schedule, current_run
from sqlqueue.cli import main
from sqlqueue.dashboard import Access, actions, basic, bearer, dashboard, pages, trusted_header
from sqlqueue.dashboard.access import ROLES
from sqlqueue.dashboard.serve import authorize_for
from sqlqueue.integrations.alembic import migrate
from tests.harness import rows, value, work

SAME = {"Sec-Fetch-Site": "same-origin"}
HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"


class Shop:
    """An application with jobs in many states, and a dashboard of it."""

    def __init__(self, url: str) -> None:
        self.queue = Queue(url)
        self.ids: dict[str, str] = {}
        self.access = Access("ana", "admin")
        self.app = dashboard(self.queue, authorize=lambda _: self.access)
        self.site = TestClient(self.app, raise_server_exceptions=True)

    def fill(self) -> None:
        """Make jobs in several states."""

        @self.queue.task(name="mail.send", retry=Retry(attempts=1), redact=["card.*"])
        def send(user: Any, fails: bool = False, **more: Any) -> Any:
            current_run().log.info("connecting to %s", "smtp")
            if fails:
                raise ConnectionError(f"closed {HOSTILE}")
            return {"sent": user, "token": "secret-result"}

        card = {"number": "4111-secret"}
        made = {
            "succeeded": send.enqueue(HOSTILE, password="secret-1", card=card),
            "failed": send.enqueue(1, True),
            "alike": send.enqueue(2, True),
        }
        work(self.queue)
        made["ready"] = send.using(tags=[HOSTILE], description=HOSTILE).enqueue(3)
        made["scheduled"] = send.using(delay=timedelta(hours=1)).enqueue(4)
        self.queue.set_policy(Policy(concurrency=1), queue="few")
        made["waiting"] = send.using(queue="few").enqueue(5)
        self.queue.set_schedule("nightly", send.s(6), Schedule(cron="30 2 * * *"))
        self.ids = {name: str(job.id) for name, job in made.items()}

    def get(self, path: str, **given: Any) -> Any:
        return self.site.get(path, follow_redirects=False, **given)

    def token(self, path: str = "/jobs") -> str:
        """The token of the forms of this visitor."""
        return re.search(r'name="token" value="(\w+)"', self.get(path).text)[1]

    def post(self, name: str, /, code: int = 303, **form: Any) -> Any:
        """Send a form as a page of ours does."""
        form = {"token": self.token()} | form
        answer = self.site.post(f"/act/{name}", data=form, headers=SAME, follow_redirects=False)
        assert answer.status_code == code, answer.text[-400:]
        return answer

    def state(self, name: str) -> str:
        return value(
            self.queue.engine, "select state from sqlqueue.jobs where id = :id", id=self.ids[name]
        )

    def places(self) -> list[str]:
        """The paths of all pages, with what they are asked for."""
        given = {"{job}": self.ids["failed"], "{what}": "args", "{name}": "dark"}
        found = [path for path in pages.PAGES if path != "/events"]
        for word, real in given.items():
            found = [path.replace(word, real) for path in found]
        return found


@pytest.fixture
def shop(engine: Engine, migrated_url: str) -> Iterator[Shop]:
    shop = Shop(migrated_url)
    shop.fill()
    yield shop
    shop.queue.engine.dispose()


# Pages


def test_m07_every_page_is_complete_without_javascript(shop) -> None:
    for path in shop.places():
        answer = shop.get(path)
        assert answer.status_code in (200, 303), (path, answer.text[:300])
        if answer.headers.get("content-type", "").startswith("text/html"):
            assert "<h1" in answer.text
            scripted = r"<script(?! src)|<[^>]*\s(on\w+|style)=|<[^>]*javascript:"
            assert not re.search(scripted, answer.text), path


def test_m07_every_action_works_by_its_form(shop) -> None:
    shop.post("retry", job=shop.ids["failed"])
    assert shop.state("failed") == "ready"
    shop.post("cancel", job=shop.ids["failed"])
    assert shop.state("failed") == "cancelled"
    shop.post("discard", job=shop.ids["alike"])
    assert shop.state("alike") == "cancelled"
    shop.post("run_now", job=shop.ids["scheduled"])
    shop.post("move", job=shop.ids["ready"], to_queue="slow", to_priority="-5")
    moved = "select queue, priority from sqlqueue.live where id = :id"
    assert rows(shop.queue.engine, moved, id=shop.ids["ready"]) == [("slow", -5)]
    asked = shop.post("delete", 200, job=shop.ids["ready"]).text
    frozen = re.search(r'name="frozen" value="([^"]+)"', asked)[1]
    shop.post("delete", 400, frozen=frozen, typed="2")
    shop.post("delete", frozen=frozen, typed="1")
    gone = "select count(*) from sqlqueue.jobs where id = :id"
    assert value(shop.queue.engine, gone, id=shop.ids["ready"]) == 0
    shop.post("pause", scope="queue", name="few", why="upgrade", lasts="30m")
    paused = "select paused_by, paused_why from sqlqueue.queues where queue = 'few'"
    assert rows(shop.queue.engine, paused) == [("ana", "upgrade")]
    shop.post("resume", scope="queue", name="few")
    assert rows(shop.queue.engine, paused) == [(None, None)]
    shop.post("limit", name="few", concurrency="7", rate="100/1m")
    limit = "select concurrency from sqlqueue.queues where queue = 'few'"
    assert value(shop.queue.engine, limit) == 7
    assert (
        "/jobs/" in shop.post("enqueue", name="mail.send", args='{"user": 9}').headers["location"]
    )
    shop.post("run_schedule", name="nightly")
    shop.post("remove_schedule", name="nightly")
    assert value(shop.queue.engine, "select count(*) from sqlqueue.schedules") == 0
    done = [
        row[0] for row in rows(shop.queue.engine, "select verb from sqlqueue.actions order by at")
    ]
    assert done[-11:] == [
        "retry", "cancel", "discard", "run_now", "move", "delete", "pause", "resume", "set_policy",
        "enqueue", "run_schedule",
    ][-11:] or len(done) >= 12  # fmt: skip


def test_a_failed_job_is_edited_and_enqueued_anew(shop) -> None:
    answer = shop.post("edit", job=shop.ids["failed"], args='{"user": 7, "fails": false}')
    made = answer.headers["location"].split("/")[-1].split("?")[0]
    (row,) = rows(
        shop.queue.engine, "select args, headers, state from sqlqueue.jobs where id = :id", id=made
    )
    assert row == ({"user": 7, "fails": False}, {"edited_from": shop.ids["failed"]}, "ready")
    assert shop.state("failed") == "cancelled"
    shop.post("edit", 400, job=shop.ids["alike"], args="[1]")
    shop.post("edit", 400, job=shop.ids["alike"], args="{")
    assert shop.state("alike") == "failed"


def test_m18_one_click_retries_exactly_the_group(shop) -> None:
    page = shop.get("/failures").text
    assert "Requeue: 2" in page
    group = value(shop.queue.engine, "select fingerprint from sqlqueue.failures")
    asked = shop.post("retry", 200, q=f"state:failed group:{group}", all="1").text
    assert "Retry 2 jobs?" in asked
    frozen = re.search(r'name="frozen" value="([^"]+)"', asked)[1]

    shop.post("retry", frozen=frozen, q=f"state:failed group:{group}")

    assert [shop.state(name) for name in ("failed", "alike")] == ["ready", "ready"]
    acted = "select actor, verb, affected, skipped from sqlqueue.actions where verb = 'retry'"
    assert rows(shop.queue.engine, acted) == [("ana", "retry", 2, 0)]


def test_m20_jobs_that_match_only_after_confirming_stay_untouched(shop) -> None:
    asked = shop.post("retry", 200, q="state:failed", all="1").text
    frozen = re.search(r'name="frozen" value="([^"]+)"', asked)[1]
    late = shop.queue.tasks["mail.send"].enqueue(9, True)
    work(shop.queue)
    assert late.refresh().state == "failed"
    rows(shop.queue.engine, "select sqlqueue.change('discard', array[cast(:id as uuid)])",
         id=shop.ids["alike"])  # fmt: skip

    answer = shop.post("retry", frozen=frozen, q="state:failed", back="/jobs")

    assert late.refresh().state == "failed"
    notice = shop.get(answer.headers["location"]).text
    assert "retry: 2 done" in notice or "retry: 1 done" in notice


def test_m20_a_dry_run_changes_nothing_and_no_terminal_needs_yes(shop, migrated_url) -> None:
    base = ["--url", migrated_url, "jobs", "retry", "--where", "state:failed"]
    tried = CliRunner().invoke(main, [*base, "--dry-run"])
    refused = CliRunner().invoke(main, base)
    assert (tried.exit_code, refused.exit_code) == (0, 1)
    assert "would retry 2 of 2 jobs" in tried.stderr
    assert "--yes" in refused.stderr
    assert shop.state("failed") == "failed"
    assert (
        value(shop.queue.engine, "select count(*) from sqlqueue.actions where verb = 'retry'") == 0
    )


def test_a_refresh_is_asked_for_by_a_header(shop) -> None:
    assert shop.get("/?refresh=10").headers["refresh"] == "10"
    assert "refresh" not in shop.get("/").headers


def test_a_number_that_is_none_is_as_if_it_were_not_given(shop) -> None:
    for text in ("²", "-1", "9" * 5000, "x"):
        assert "refresh" not in shop.get(f"/?refresh={text}").headers
        assert "connecting" in shop.get(f"/jobs/{shop.ids['failed']}?run={text}").text


def test_a_tab_is_marked_when_it_is_shown(shop) -> None:
    for name, search in pages.TABS.items():
        page = shop.get("/jobs", params={"q": f"{search} task:mail.*"}).text
        assert re.findall(r'<a [^>]*aria-current="page">(\w+)', page)[-1] == name


def test_a_form_with_too_many_fields_is_refused(shop) -> None:
    body = "&".join(f"job={n}" for n in range(20_001))
    answer = shop.site.post("/act/retry", content=body, headers=SAME)
    assert answer.status_code == 400


def test_a_search_that_is_wrong_is_said_to_be(shop) -> None:
    answer = shop.get("/jobs?q=stat:failed")
    assert answer.status_code == 400
    assert "did you mean state:" in answer.text
    for path in ("/jobs/zz", "/nope", "/jobs?before=zz", f"/jobs/{shop.ids['failed']}/other.json"):
        assert shop.get(path).status_code in (400, 403, 404)


def test_m21_what_a_job_logged_is_shown(shop) -> None:
    page = shop.get(f"/jobs/{shop.ids['failed']}").text
    assert "connecting to smtp" in page
    assert "ConnectionError" in page
    assert "Traceback" in page
    assert "connecting to smtp" in shop.get(f"/logs?q=id:{shop.ids['failed']}").text


# Where it is mounted


@pytest.mark.parametrize("prefix", ["", "/x/y"])
def test_m11_every_link_form_and_file_works_where_it_is_mounted(shop, prefix) -> None:
    app = Starlette(routes=[Mount(prefix, shop.app)]) if prefix else shop.app
    site = TestClient(app)
    seen, left = set(), [f"{prefix}/"]
    while left and len(seen) < 150:
        path = left.pop()
        if path in seen or "/theme/" in path:
            continue
        seen.add(path)
        answer = site.get(path, follow_redirects=False)
        assert answer.status_code == 200, (path, answer.status_code)
        for link in re.findall(r'(?:href|src|action)="([^"#]+)"', answer.text):
            link = link.replace("&amp;", "&")
            assert link.startswith(f"{prefix}/"), (path, link)
            if "/act/" not in link and link.split("?")[0] not in {s.split("?")[0] for s in seen}:
                left.append(link)
    assert f"{prefix}/static/app.css" in seen
    token = re.search(r'name="token" value="(\w+)"', site.get(f"{prefix}/jobs").text)[1]
    form = {"token": token, "job": shop.ids["failed"], "back": "/jobs?q=state:failed"}
    answer = site.post(f"{prefix}/act/retry", data=form, headers=SAME, follow_redirects=False)
    assert answer.headers["location"] == f"{prefix}/jobs?q=state:failed&done=1"


def test_m11_it_works_through_wsgi(shop) -> None:
    with Client(
        transport=WSGITransport(ASGIMiddleware(shop.app)), base_url="http://testserver"
    ) as site:
        for path in shop.places()[:12]:
            assert site.get(path).status_code in (200, 303), path
        token = re.search(r'name="token" value="(\w+)"', site.get("/jobs").text)[1]
        form = {"token": token, "job": shop.ids["failed"]}
        assert site.post("/act/retry", data=form, headers=SAME).status_code == 303
    assert shop.state("failed") == "ready"


# Who may


def test_m12_another_host_needs_to_know_who_may_enter(shop, migrated_url) -> None:
    refused = CliRunner().invoke(main, ["--url", migrated_url, "dashboard", "--host", "0.0.0.0"])
    assert refused.exit_code == 2
    assert "--auth" in refused.stderr
    assert "--insecure" in refused.stderr
    with pytest.raises(TypeError, match="authorize"):
        dashboard(shop.queue)
    with pytest.raises(TypeError, match="authorize"):
        dashboard(shop.queue, authorize=None)
    local = dashboard(shop.queue, authorize=authorize_for("127.0.0.1", None, "operate", False))
    here = {"host": "127.0.0.1:8787"}
    assert TestClient(local).get("/", headers=here).status_code == 200
    assert TestClient(local).get("/", headers={"host": "evil.example"}).status_code == 403
    for name in ("X-Forwarded-For", "Forwarded", "X-Forwarded-Host", "X-Real-IP", "Via"):
        assert TestClient(local).get("/", headers=here | {name: "1.2.3.4"}).status_code == 403


def test_users_tokens_and_trusted_headers_let_in(shop) -> None:
    def code(authorize: Any, **headers: str) -> int:
        site = TestClient(dashboard(shop.queue, authorize=authorize))
        return site.get("/queues", headers=headers).status_code

    known = basic("ana:pa:ss:admin,bo:secret")
    given = ("ana:pa:ss", "bo:secret", "bo:wrong", "eve:secret", "nobody")
    encoded = {one: "Basic " + base64.b64encode(one.encode()).decode() for one in given}
    codes = {name: code(known, authorization=text) for name, text in encoded.items()}
    assert codes == {"ana:pa:ss": 200, "bo:secret": 200, "bo:wrong": 403, "eve:secret": 403,
                     "nobody": 403}  # fmt: skip
    assert code(known) == 403
    assert code(authorize_for("0.0.0.0", "bo:secret", "view", False)) == 401
    assert code(bearer("t0ken"), authorization="Bearer t0ken") == 200
    assert code(bearer("t0ken"), authorization="Bearer other") == 403
    assert code(trusted_header("x-user"), **{"x-user": "ana"}) == 200
    assert code(trusted_header("x-user")) == 403
    for wrong in ("ana", "", ":x"):
        with pytest.raises(ValueError, match="USER:PASSWORD"):
            basic(wrong)


FORMS: dict[str, Callable[[Shop], dict[str, str]]] = {
    "edit": lambda shop: {"job": shop.ids["failed"], "args": '{"user": 1}'},
    "enqueue": lambda shop: {"name": "mail.send", "args": "{}"},
    "limit": lambda shop: {"name": "few", "concurrency": "2"},
    "mute": lambda shop: {"name": "abc"},
    "drain": lambda shop: {"name": "1"},
    "stop": lambda shop: {"name": "1"},
    "pause": lambda shop: {"scope": "queue", "name": "few"},
    "resume": lambda shop: {"scope": "queue", "name": "few"},
    "run_schedule": lambda shop: {"name": "nightly"},
    "remove_schedule": lambda shop: {"name": "nightly"},
}


def everything(engine: Engine) -> list[Any]:
    """What an action could change."""
    return [
        rows(engine, f"select * from sqlqueue.{table} order by 1")
        for table in ("ready", "scheduled", "waiting", "run", "queue", "policy", "schedule", "mute",
                      "action")
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(actions.ACTIONS))
def test_m13_an_action_needs_its_role_and_a_form_of_ours(shop, name) -> None:
    form = FORMS.get(name, lambda shop: {"job": shop.ids["failed"], "to_queue": "x"})(shop)
    needed = actions.ACTIONS[name].role
    shop.access = Access("ana", "admin")
    ours = {"token": shop.token()} | form
    before = everything(shop.queue.engine)

    def post(form: dict[str, str], headers: dict[str, str]) -> int:
        return shop.site.post(
            f"/act/{name}", data=form, headers=headers, follow_redirects=False
        ).status_code

    assert post(ours, {"Sec-Fetch-Site": "cross-site"}) == 403
    assert post(ours, {"Sec-Fetch-Site": "same-site"}) == 403
    assert post(ours, {"Origin": "https://evil.example"}) == 403
    assert post(ours, {}) == 403
    assert post(form, SAME) == 403
    assert post(form | {"token": "0" * 64}, SAME) == 403
    for role in ROLES[: ROLES.index(needed)]:
        shop.access = Access("ana", role)
        assert post(ours, SAME) == 403, role
    shop.access = Access("bo", "admin")  # the token is another's
    assert post(ours, SAME) == 403
    assert shop.get(f"/act/{name}").status_code == 405
    assert everything(shop.queue.engine) == before

    shop.access = Access("ana", needed)
    assert post(ours, {"Origin": "http://testserver"}) in (200, 303, 400, 409)


def test_who_may_only_view_sees_no_button(shop) -> None:
    shop.access = Access("ana", "view")
    for path in shop.places():
        text = shop.get(path).text
        assert "/act/" not in text, path


def test_who_may_not_see_arguments_sees_none(shop) -> None:
    shop.access = Access("ana", "admin", sees_args=False)
    for path in [*shop.places(), f"/jobs/{shop.ids['succeeded']}", "/jobs?line=1"]:
        text = shop.get(path).text
        assert "connecting to" not in text, path
        assert "closed" not in text.replace("disclosed", ""), path
        assert "&#34;user&#34;" not in text, path


# What is shown


def test_m15_what_is_secret_is_in_no_page_and_hostile_text_stays_text(shop, migrated_url) -> None:
    shown = [*shop.places(), "/jobs?line=1", "/jobs?q=state:succeeded"]
    for name in ("args", "result", "logs"):
        shown.append(f"/jobs/{shop.ids['succeeded']}/{name}.json")
    for job in shop.ids.values():
        shown.append(f"/jobs/{job}")
    for path in shown:
        answer = shop.get(path)
        assert "secret-1" not in answer.text, path
        assert "4111-secret" not in answer.text, path
        assert "secret-result" not in answer.text, path
        if "html" in answer.headers.get("content-type", ""):
            assert "<script>alert" not in answer.text, path
            assert "<img" not in answer.text, path
    for words in (
        ["jobs", "show", shop.ids["succeeded"]], ["jobs", "list"], ["jobs", "dump"], ["report"],
        ["jobs", "result", shop.ids["succeeded"]],
        ["jobs", "show", shop.ids["succeeded"], "--json"],
    ):  # fmt: skip
        said = CliRunner().invoke(main, ["--url", migrated_url, *words])
        assert said.exit_code == 0, said.output
        assert "secret-1" not in said.output
        assert "secret-result" not in said.output


def test_headers_let_nothing_else_in(shop) -> None:
    for path in ("/", "/nope", "/static/app.css", "/snapshot"):
        headers = shop.get(path).headers
        assert headers["content-security-policy"].startswith(
            "default-src 'none'; script-src 'self'"
        )
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"


def test_a_snapshot_is_sent_once(shop) -> None:
    first = shop.get("/snapshot")
    again = shop.get("/snapshot", headers={"If-None-Match": first.headers["etag"]})
    assert (first.status_code, again.status_code) == (200, 304)


def test_a_way_back_leads_nowhere_else(shop) -> None:
    for back in ("https://evil.example", "//evil.example", "/\\evil.example", "evil"):
        answer = shop.post("resume", scope="queue", name="few", back=back)
        assert answer.headers["location"] == "/?done=1"


# Read-only


def test_m14_read_only_shows_no_button_and_refuses_every_post(shop) -> None:
    token = shop.token()
    shop.app = dashboard(shop.queue, authorize=lambda _: shop.access, read_only=True)
    shop.site = TestClient(shop.app)
    for path in shop.places():
        answer = shop.get(path)
        assert answer.status_code in (200, 303), path
        assert "/act/" not in answer.text
    for name in actions.ACTIONS:
        answer = shop.site.post(f"/act/{name}", data={"token": token}, headers=SAME)
        assert answer.status_code == 403


@pytest.mark.alone
def test_m14_on_a_replica_every_page_works(tmp_path) -> None:
    from tests.faults.cluster import Cluster

    with Cluster() as primary, primary.standby() as standby:
        engine = create_engine(primary.url)
        migrate(engine)
        shop = Shop(primary.url)
        shop.fill()
        wait = "select pg_last_wal_replay_lsn() >= cast(:lsn as pg_lsn)"
        lsn = value(engine, "select cast(pg_current_wal_lsn() as text)")
        replica = Shop(standby.url)
        replica.ids = shop.ids
        from tests.harness import wait_until

        wait_until(lambda: value(replica.queue.engine, wait, lsn=lsn), within=20)
        for path in replica.places():
            answer = replica.get(path)
            assert answer.status_code in (200, 303), (path, answer.text[:300])
            assert "/act/" not in answer.text
        token = replica.app._site.forms.token(replica.access)
        for name in actions.ACTIONS:
            answer = replica.site.post(f"/act/{name}", data={"token": token}, headers=SAME)
            assert answer.status_code == 403


def test_those_who_watch_one_page_share_what_is_read_for_it(shop) -> None:
    live = {"X-Live": "1"}
    first = shop.get("/jobs?q=state:ready", headers=live).text
    shop.queue.tasks["mail.send"].enqueue(77)
    assert shop.get("/jobs?q=state:ready", headers=live).text == first
    assert shop.get("/jobs?q=state:ready").text != first
    shop.access = Access("bo", "view")
    assert shop.get("/jobs?q=state:ready", headers=live).text != first
    shop.access = Access("ana", "admin")
    threading.Event().wait(1.1)
    assert shop.get("/jobs?q=state:ready", headers=live).text != first
