"""What a person does with the dashboard, in a real browser: Chromium, driven by Playwright.

SQLQUEUE_CHROMIUM says where it is, if not at /usr/bin/chromium. Where it cannot be had these tests
skip, and the summary says so.
"""

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright
from sqlalchemy import Engine

from sqlqueue import Queue, Retry, current_run
from sqlqueue.dashboard import Access, dashboard
from sqlqueue.dashboard.serve import Server, bound
from tests.harness import POLLING, rows, value, wait_until, work

CHROMIUM = Path(os.environ.get("SQLQUEUE_CHROMIUM", "/usr/bin/chromium"))
pytestmark = [
    pytest.mark.browser,
    pytest.mark.alone,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"BROWSER TESTS DID NOT RUN: no {CHROMIUM}"),
]
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
PLACES = (
    "/",
    "/jobs",
    "/failures",
    "/queues",
    "/workers",
    "/tasks",
    "/schedules",
    "/system",
    "/logs",
)


class Shop:
    """A dashboard that is served, of an application with some jobs."""

    def __init__(self, url: str) -> None:
        self.queue = Queue(url)
        self.goes_on = threading.Event()

        @self.queue.task(name="mail.send", retry=Retry(attempts=1))
        def send(user: int, fails: bool = True) -> int:
            current_run().log.info("connecting to smtp for %d", user)
            if fails:
                raise ConnectionError(f"closed for {user}")
            return user

        @self.queue.task(name="reports.build", queue="reports", retry=Retry(attempts=1))
        def build() -> None:
            for n in range(100):
                current_run().log.info("page %d", n)
                current_run().progress(n, "pages")
                if self.goes_on.wait(0.2):
                    return

        self.send, self.build = send, build
        self.app: Any = dashboard(self.queue, authorize=lambda _: Access("ana", "admin"))

    @contextmanager
    def served(self, app: Any = None) -> Iterator[str]:
        sock = bound("127.0.0.1", 0)
        server = Server(app or self.app, self.app.hub)
        thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@pytest.fixture
def shop(engine: Engine, migrated_url: str) -> Iterator[Shop]:
    shop = Shop(migrated_url)
    for n in range(3):
        shop.send.enqueue(n)
    work(shop.queue)
    shop.send.using(delay=timedelta(hours=1)).enqueue(9)
    yield shop
    shop.goes_on.set()
    shop.queue.engine.dispose()


@pytest.fixture
def site(shop: Shop) -> Iterator[str]:
    with shop.served() as url:
        yield url


@pytest.fixture
def page(browser: Browser, site: str) -> Iterator[Page]:
    """A page that may say nothing on its console, and ask no other host (m08)."""
    context = browser.new_context(base_url=site, viewport={"width": 1280, "height": 900})
    page = context.new_page()
    said: list[str] = []

    def heard(message: ConsoleMessage) -> None:
        said.append(message.text)

    page.on("console", heard)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda r: r.url.startswith(site) or said.append(f"asks {r.url}"))
    yield page
    context.close()
    assert said == []


def failed(engine: Engine) -> int:
    return int(value(engine, "select count(*) from sqlqueue.jobs where state = 'failed'"))


def test_m08_no_page_says_anything_on_the_console_or_asks_another_host(page, shop) -> None:
    """The fixture hears both; so do all tests that use it."""
    for path in (*PLACES, "/jobs?compact=1&line=1", "/theme/dark?back=/jobs"):
        page.goto(path, wait_until="load")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_m19_a_failed_job_is_found_read_edited_and_retried(page, shop, engine) -> None:
    page.goto("/")
    page.keyboard.press("/")
    page.keyboard.type('state:failed "closed for 1"')
    page.keyboard.press("Enter")
    expect(page.locator("tbody.job")).to_have_count(1)
    page.click("tbody.job a.id")
    for text in ("connecting to smtp for 1", "ConnectionError", "Traceback", '"user": 1'):
        expect(page.locator("main")).to_contain_text(text)
    page.click("text=Edit and retry")
    page.fill("textarea[name=args]", '{"user": 1, "fails": false}')
    page.click("text=Enqueue a new job")
    expect(page.locator("h1")).to_contain_text("ready")
    expect(page.locator("#notice")).to_contain_text("edit: 1 done")
    work(shop.queue)
    assert failed(engine) == 2


def test_m19_compact_all_logs_and_requeue_all_failed(page, shop, engine) -> None:
    page.goto("/jobs?q=state:failed")
    expect(page.locator("tr.more")).to_have_count(3)
    page.click("text=Compact")
    expect(page.locator("tr.more")).to_have_count(0)
    page.click("p.choices >> text=View all logs")
    for n in range(3):
        expect(page.locator("main")).to_contain_text(f"connecting to smtp for {n}")
    page.goto("/")
    page.click("text=Requeue all failed: 3")
    expect(page.locator("h1")).to_have_text("Retry 3 jobs?")
    page.click("button:has-text('Retry 3')")
    expect(page.locator("#notice")).to_contain_text("retry: 3 done")
    assert failed(engine) == 0


def test_a_group_is_requeued(page, shop, engine) -> None:
    page.goto("/failures")
    page.click("tbody >> text=Requeue: 3")
    page.click("button:has-text('Retry 3')")
    expect(page.locator("main")).to_contain_text("no job has failed")
    assert failed(engine) == 0


def test_a_queue_is_paused_and_resumed(page, shop, engine) -> None:
    shop.send.enqueue(5)
    page.goto("/queues")
    page.fill("input[name=why]", "upgrade")
    page.click("button:has-text('Pause')")
    expect(page.locator(".paused")).to_contain_text("paused by ana: “upgrade”")
    page.click("button:has-text('Resume')")
    expect(page.locator(".paused")).to_have_count(0)


def test_m21_the_log_of_a_running_job_is_followed(page, shop) -> None:
    with shop.queue.worker("reports", **POLLING):
        job = shop.build.enqueue()
        wait_until(lambda: job.refresh().state == "running")
        page.goto(f"/jobs/{job.id}")
        expect(page.locator("#lines")).to_contain_text("page 3", timeout=8000)
        expect(page.locator("#lines")).to_contain_text("page 8", timeout=8000)
        shop.goes_on.set()
        expect(page.locator("#headline")).to_contain_text("succeeded", timeout=8000)


def test_m22_keyboard_alone_does_a_bulk_retry(page, shop, engine) -> None:
    page.goto("/")
    page.keyboard.press("g")
    page.keyboard.press("j")
    page.wait_for_url("**/jobs")
    page.keyboard.press("/")
    page.keyboard.press("Control+A")
    page.keyboard.type("state:failed")
    page.keyboard.press("Enter")
    page.wait_for_url("**state%3Afailed*")
    for _ in range(2):
        page.keyboard.press("j")
        page.keyboard.press("x")
    page.keyboard.press("r")
    expect(page.locator("h1")).to_have_text("Retry 2 jobs?")
    page.locator("button:has-text('Retry 2')").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_contain_text("retry: 2 done")
    assert failed(engine) == 1


def test_m09_a_change_shows_within_two_seconds(page, shop) -> None:
    page.goto("/")
    expect(page.locator("#live")).to_have_class(re.compile("on"))
    expect(page.locator(".of-ready dd")).to_have_text("0")
    began = time.monotonic()
    shop.send.enqueue(7)
    expect(page.locator(".of-ready dd")).to_have_text("1", timeout=10_000)
    took = time.monotonic() - began
    print(f"shown after {took:.2f} s")
    assert took < 2.5  # of which the machine may take half a second to draw it


def test_m09_twenty_tabs_cost_one_snapshot_a_second_and_no_tab_none(browser, shop, site) -> None:
    hub = shop.app.hub
    contexts = [browser.new_context(base_url=site) for _ in range(4)]
    pages = [context.new_page() for context in contexts for _ in range(5)]
    for page in pages:
        page.goto("/")
    before, began = hub.snapshots, time.monotonic()
    threading.Event().wait(4)
    read, took = hub.snapshots - before, time.monotonic() - began
    print(f"{read} snapshots in {took:.1f} s for {len(pages)} tabs")
    assert 1 <= read <= took + 1.5
    for context in contexts:
        context.close()
    threading.Event().wait(2.5)
    before = hub.snapshots
    threading.Event().wait(2.5)
    assert hub.snapshots == before


def test_m10_behind_a_proxy_that_keeps_events_back_a_change_shows_in_time(browser, shop) -> None:
    async def buffering(scope: Any, receive: Any, send: Any) -> None:
        """Pass all on, but for events, whose bodies it keeps."""
        if scope["type"] == "http" and scope["path"] == "/events":

            async def keep(message: Any) -> None:
                if message["type"] == "http.response.start":
                    await send(message)

            await shop.app(scope, receive, keep)
        else:
            await shop.app(scope, receive, send)

    with shop.served(buffering) as url:
        context = browser.new_context(base_url=url)
        page = context.new_page()
        page.goto("/")
        page.wait_for_timeout(8000)
        began = time.monotonic()
        shop.send.enqueue(7)
        expect(page.locator(".of-ready dd")).to_have_text("1", timeout=15_000)
        took = time.monotonic() - began
        print(f"shown after {took:.2f} s")
        assert took < 5.5
        context.close()


def test_m07_without_javascript_a_job_is_found_and_retried(browser, shop, site, engine) -> None:
    context = browser.new_context(base_url=site, java_script_enabled=False)
    page = context.new_page()
    page.goto("/jobs?q=state:failed")
    page.click("tbody.job a.id")
    page.click("button:has-text('Retry')")
    expect(page.locator("h1")).to_contain_text("ready")
    page.goto("/?refresh=2")
    page.goto("/jobs?q=state:failed")
    page.check("input[type=checkbox][name=all]")
    page.click("fieldset >> text=Retry")
    page.click("button:has-text('Retry 2')")
    expect(page.locator("#notice")).to_contain_text("retry: 2 done")
    assert failed(engine) == 0
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_m22_axe_finds_nothing_serious(browser, shop, site, scheme, width) -> None:
    job = value(shop.queue.engine, "select id from sqlqueue.jobs where state = 'failed' limit 1")
    context = browser.new_context(
        base_url=site, color_scheme=scheme, viewport={"width": width, "height": 800}
    )
    page = context.new_page()
    rows(shop.queue.engine, "select sqlqueue.pause('queue', 'default', true, 'ana', 'x')")
    for path in (*PLACES, f"/jobs/{job}", "/jobs?compact=1"):
        page.goto(path)
        found = Axe().run(page).response["violations"]
        serious = [
            (one["id"], [node["html"][:120] for node in one["nodes"]][:3])
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
        assert serious == [], path
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{path} is {wide} px too wide"
    context.close()
