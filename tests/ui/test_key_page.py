"""A server with API keys: the page asks for one, and keeps it as long as its tab is open."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from playwright.sync_api import expect
from pydantic import SecretStr

from server.config import Settings
from tests.servers import LiveServer
from tests.ui.conftest import Visit, VisitPage

KEY = "sk-right-0123456789"


@pytest.fixture(scope="module")
def locked(
    tiny_checkpoint: Path, serve: Callable[[Settings], AbstractContextManager[LiveServer]]
) -> Iterator[LiveServer]:
    settings = Settings(model=str(tiny_checkpoint), api_key=(SecretStr(KEY),))
    with serve(settings) as server:
        yield server


def be_refused(page: Visit) -> None:
    expect(page.api_key).to_have_count(0)
    page.say("hello")
    expect(page.page.get_by_text("requires an API key")).to_be_visible()
    expect(page.message).to_have_value("hello")


def test_the_key_is_asked_for_once_and_kept_only_in_its_tab(
    locked: LiveServer, visit: VisitPage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with visit(locked.url) as page:
        be_refused(page)
        expect(page.api_key).to_be_focused()
        page.save_screenshot("key-en")
        page.page.keyboard.type(KEY)
        page.message.press("Enter")
        expect(page.answers).to_have_count(1)
        page.page.reload()
        page.say("hello again")
        expect(page.answers).to_have_count(1)
        expect(page.api_key).to_have_count(0)
        assert KEY in page.page.evaluate("JSON.stringify({...sessionStorage})")
        assert KEY not in page.page.evaluate("JSON.stringify({...localStorage})")
        assert not any(KEY in url for url in page.urls)
    assert KEY not in caplog.text
    with visit(locked.url) as page:
        be_refused(page)


def test_the_classify_tab_asks_for_the_key_too(locked: LiveServer, visit: VisitPage) -> None:
    with visit(locked.url) as page:
        page.open_classify()
        page.page.locator("#lines textarea").fill("fine")
        page.page.locator("#run").click()
        expect(page.page.get_by_text("requires an API key")).to_be_visible()
        page.api_key.fill("sk-wrong")
        page.page.locator("#run").click()
        expect(page.page.get_by_text("requires an API key")).to_have_count(2)
        page.api_key.fill(KEY)
        page.page.locator("#run").click()
        assert len(page.download()) == 1
