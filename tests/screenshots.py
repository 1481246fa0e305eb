"""Pictures of every page from the demo: `python -m tests.screenshots [FOLDER]` writes docs/images.

FOLDER holds the text files to work on, else Python's own are. It goes on for some minutes first, so
that the charts have something to show.
"""

import io
import os
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from rich.console import Console

from sqlqueue import Schedule, demo

IMAGES = Path(__file__).parent.parent / "docs/images"
CHROMIUM = os.environ.get("SQLQUEUE_CHROMIUM", "/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--hide-scrollbars"]
PORT = 8798
MINUTES = 6
FAILED = "/jobs?q=state:failed"
PAGES = {
    "overview": "/", "jobs": FAILED, "compact": "/jobs?compact=1", "failures": "/failures",
    "queues": "/queues", "workers": "/workers", "tasks": "/tasks", "schedules": "/schedules",
    "system": "/system", "logs": f"/logs?{FAILED.partition('?')[2]}", "job": FAILED,
}  # fmt: skip


def take(page: Page, name: str, path: str, height: int) -> None:
    """Save a picture of a page, no higher than `height`."""
    page.goto(f"http://127.0.0.1:{PORT}{path}")
    if name.startswith("job-") or name == "job":
        page.click("tbody.job a.id")
    page.wait_for_timeout(700)
    whole = page.evaluate("document.documentElement.scrollHeight")
    page.set_viewport_size({"width": page.viewport_size["width"], "height": min(whole, height)})
    page.screenshot(path=IMAGES / f"{name}.png")


def main() -> None:
    """Run the demo, and take pictures while its workers go on."""
    IMAGES.mkdir(exist_ok=True)
    console = Console(file=io.StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        scratch = Path(place)
        scratch.chmod(0o755)
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
        documents = demo._documents(folder, scratch)
        with demo._perform(console, documents, scratch / "log", PORT, browses=False):
            demo.queue.set_schedule("hourly", demo.ask.s(), Schedule(cron="@hourly"))
            demo.queue.set_schedule("nightly", demo.close.s(), Schedule(cron="30 2 * * *"))
            demo.ask.using(queue="reports").enqueue()
            demo.queue.pause("reports", by="ana", why="db upgrade")
            for second in range(MINUTES * 60):
                demo.queue.enqueue_many(demo.ask.s() for _ in range(3 + second % 40 // 4))
                time.sleep(1)
            demo.queue.enqueue_many(demo.ask.s() for _ in range(200))
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            for theme, width, names in (
                ("light", 1440, PAGES), ("dark", 1440, ["overview", "job"]),
                ("light", 390, ["overview"]), ("dark", 390, ["jobs"]),
            ):  # fmt: skip
                for name in names:
                    context = browser.new_context(
                        color_scheme=theme, viewport={"width": width, "height": 900}
                    )
                    plain = (theme, width) == ("light", 1440)
                    title = name if plain else f"{name}-{theme}-{width}"
                    take(context.new_page(), title, PAGES[name], 900)
                    context.close()


if __name__ == "__main__":
    main()
