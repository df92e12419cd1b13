"""The book in a real browser: `make test-book` builds it and runs these tests; `make test` leaves them out."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "build" / "book"
BROWSERS = ["chromium", "chromium-browser", "google-chrome"]
# Nothing but the pages is to be fetched: the browser's own services stay off.
QUIET = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    executable = os.environ.get("MVREPRO_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.exit("no Chromium found: on Debian, install the package chromium, or name one in MVREPRO_BROWSER", 1)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=QUIET)
        yield browser
        browser.close()


class Visit:
    """A page in the browser, with all that it complained about and asked for."""

    def __init__(self, page: Page) -> None:
        self.page, self.errors, self.requests = page, [], []
        page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("requestfailed", lambda request: self.errors.append(f"failed: {request.url}"))
        page.on("request", lambda request: self.requests.append(request.url))

    def open(self, path: Path, query: str = "") -> Page:
        """Open a page of the book from the file system and wait until its mathematics is typeset."""
        self.page.goto(path.as_uri() + query)
        self.page.evaluate("(window.MathJax?.startup?.promise ?? Promise.resolve()).then(() => true)")
        return self.page


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(120_000)
    yield Visit(context.new_page())
    context.close()
