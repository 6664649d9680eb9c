"""A Chromium browser, if installed. Its pages check the hosts of their requests."""

import csv
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
# Root cannot create a sandbox, and all pages are local. The other flags turn off the browser's own
# requests.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
TIMEOUT_MS = 30_000
SCREENSHOTS_VARIABLE = "QWEN_TEST_SCREENSHOTS"  # a folder; default: a temporary one


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("NO BROWSER TESTS: there is no chromium on the PATH (apt install chromium)")
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page of a server in a browser, with the actions of a user."""

    page: Page
    folder: Path
    errors: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)

    @property
    def bubbles(self) -> Locator:
        return self.page.locator("#chatbot .message-content")

    @property
    def answers(self) -> Locator:
        return self.page.locator("#chatbot [data-testid=bot]")

    @property
    def conversations(self) -> Locator:
        """The kept conversations, the newest first."""
        return self.page.locator("#conversations label")

    @property
    def mood(self) -> Locator:
        return self.page.locator("#mood")

    @property
    def analyses(self) -> Locator:
        """The checkboxes of the analyses."""
        return self.page.locator("#analyses label")

    @property
    def api_key(self) -> Locator:
        return self.page.locator("#api-key input")

    @property
    def message(self) -> Locator:
        return self.page.locator("#message textarea")

    def say(self, text: str) -> None:
        self.message.fill(text)
        self.message.press("Enter")

    def until_answered(self, number: int) -> None:
        """Waits until this number of answers is complete."""
        expect(self.answers).to_have_count(number)
        expect(self.page.locator("#message .submit-button")).to_be_visible()

    def open_new_conversation(self) -> None:
        self.page.get_by_role("button", name="New conversation").click()
        expect(self.bubbles).to_have_count(0)

    def open_chat(self) -> None:
        self.page.get_by_role("tab").nth(0).click()

    def open_classify(self) -> None:
        self.page.get_by_role("tab").nth(1).click()

    def classify(self, file: Path) -> None:
        """Uploads the file and starts a run."""
        self.open_classify()
        self.page.locator("#file input[type=file]").set_input_files(file)
        # Waits for the end of the upload.
        expect(self.page.locator("#file")).to_contain_text(file.stem)
        self.page.locator("#run").click()

    def download(self) -> list[dict[str, str]]:
        """The rows of the CSV."""
        expect(self.page.locator("#download")).to_be_visible()
        with self.page.expect_download() as started:
            self.page.locator("#download").click()
        with Path(started.value.path()).open(encoding="utf-8-sig", newline="") as given:
            return list(csv.DictReader(given))

    def clipboard(self) -> str:
        return str(self.page.evaluate("navigator.clipboard.readText()"))

    def width(self) -> int:
        """The width of the page, in pixels."""
        return int(self.page.evaluate("document.documentElement.scrollWidth"))

    def assert_no_markup_of_the_attack(self) -> None:
        for tag in ("img[src=x]", "own", "b:text('bold')"):
            assert self.page.locator(tag).count() == 0

    def save_screenshot(self, name: str) -> None:
        self.page.screenshot(path=self.folder / f"{name}.png")


# A dialog or any of its tags is a failure.
ATTACK = (
    "<img src=x onerror=alert(1)><script>alert(2)</script> <b>bold</b> <own>tag</own> &lt;p&gt;"
)
VisitPage = Callable[..., AbstractContextManager[Visit]]

PHONE = {
    "viewport": {"width": 390, "height": 844},
    "is_mobile": True,
    "user_agent": "Mozilla/5.0 (Linux; Android 16) Chrome/156.0 Mobile Safari/537.36",
}


@pytest.fixture
def visit(browser: Browser, tmp_path: Path) -> VisitPage:
    """Opens a page; at the end checks that it sent no request elsewhere and had no errors."""
    folder = Path(os.environ.get(SCREENSHOTS_VARIABLE) or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def open_page(url: str, locale: str = "en-US", **options: Any) -> Iterator[Visit]:
        options = {"viewport": {"width": 1280, "height": 800}, **options}
        context = browser.new_context(locale=locale, **options)
        context.set_default_timeout(TIMEOUT_MS)
        visit = Visit(context.new_page(), folder)
        visit.page.on("request", lambda request: visit.urls.append(request.url))
        visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
        visit.page.on("dialog", lambda dialog: visit.errors.append(f"dialog: {dialog.message}"))
        try:
            visit.page.goto(url)
            expect(visit.message).to_be_visible()
            yield visit
        finally:
            context.close()
        assert {_host(url) for url in visit.urls} <= {"127.0.0.1", ""}
        assert visit.errors == []

    return open_page


def _host(url: str) -> str:
    """Empty for URLs of the page itself."""
    return urlsplit(url).hostname or ""
