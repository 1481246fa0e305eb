"""Pictures of every page from the demo: `python -m tests.screenshots` writes docs/images."""

import io
import os
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from rich.console import Console

from sqlqueue import demo

IMAGES = Path(__file__).parent.parent / "docs/images"
CHROMIUM = os.environ.get("SQLQUEUE_CHROMIUM", "/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--hide-scrollbars"]
PORT = 8798
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
        documents = demo._documents(None, scratch)
        with demo._perform(console, documents, scratch / "log", PORT, browses=False):
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
                    take(context.new_page(), title, PAGES[name], 1100 if width > 400 else 850)
                    context.close()


if __name__ == "__main__":
    main()
