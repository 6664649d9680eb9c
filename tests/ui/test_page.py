"""The page in a real browser, on the bundled model."""

import csv
import shutil
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from server.config import Settings
from server.errors import OverloadedError
from server.gate import Gate
from tests.conftest import LiveServer
from tests.faults.conftest import BOUND_S
from tests.processes import environment, self_signed, started
from tests.ui.conftest import Visit

VisitPage = Callable[..., AbstractContextManager[Visit]]

ATTACK = (
    "<img src=x onerror=alert(1)><script>alert(2)</script> <b>bold</b> <own>tag</own> &lt;p&gt;"
)


def test_a_chat_shows_the_mood_and_the_answer(mini: LiveServer, visit: VisitPage) -> None:
    with visit(mini.url, "zh-CN") as page:
        page.say("我失恋了，很难过")
        page.until_answered(1)
        expect(page.bubbles).to_have_count(2)
        expect(page.bubbles.first).to_contain_text("😢 负面")
        page.say("今天的实验终于成功了，太棒了！")
        page.until_answered(2)
        expect(page.bubbles.nth(2)).to_contain_text("😄 正面")
        expect(page.page.locator("#mood")).to_contain_text("positive")
        page.save_screenshot("chat-zh")


def test_an_opener_a_retry_an_undo_and_a_new_conversation(
    mini: LiveServer, visit: VisitPage
) -> None:
    with visit(mini.url) as page:
        page.page.get_by_role("button", name="I finally got the job!").click()
        page.until_answered(1)
        page.page.get_by_role("button", name="Retry").click()
        page.until_answered(1)
        # The same text again: the mood is known.
        expect(page.page.locator("#mood")).to_contain_text("from the cache")
        page.page.get_by_role("button", name="New conversation").click()
        expect(page.bubbles).to_have_count(0)
        page.page.locator("#conversations label").click()
        page.until_answered(1)
        page.page.get_by_role("button", name="Undo").click()
        expect(page.bubbles).to_have_count(0)
        expect(page.message).to_have_value("I finally got the job!")


def test_an_edited_message_is_answered_anew(mini: LiveServer, visit: VisitPage) -> None:
    with visit(mini.url) as page:
        page.say("I am <b>sad</b>")
        page.until_answered(1)
        page.page.get_by_role("button", name="Edit").first.click()
        page.page.locator("#chatbot textarea").first.fill("I am so happy today, it is wonderful!")
        page.page.get_by_role("button", name="Submit").first.click()
        expect(page.bubbles.first).to_contain_text("so happy today, it is wonderful!")
        expect(page.page.locator("#mood")).to_contain_text("positive")
        page.until_answered(1)


def test_a_busy_server_says_how_long_to_wait(
    mini: LiveServer, visit: VisitPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enter(gate: Gate) -> None:
        raise OverloadedError("busy")

    with visit(mini.url) as page:
        monkeypatch.setattr(Gate, "enter", enter)
        page.say("hello")
        expect(page.page.get_by_text("try again in 2 seconds")).to_be_visible()
        expect(page.message).to_have_value("hello")


def test_under_the_hood_stands_what_was_sent(mini: LiveServer, visit: VisitPage) -> None:
    with visit(mini.url) as page:
        page.say("It's a good day")
        page.until_answered(1)
        page.page.locator("#hood button").first.click()
        expect(page.page.locator("#hood")).to_contain_text(f"{mini.base_url}/chat/completions")


@pytest.mark.parametrize(
    ("locale", "chat", "placeholder"),
    [("zh-CN", "聊天", "说点什么…"), ("en-GB", "Chat", "Say something…")],
)
def test_the_language_is_the_browsers(
    mini: LiveServer, visit: VisitPage, locale: str, chat: str, placeholder: str
) -> None:
    with visit(mini.url, locale) as page:
        expect(page.page.get_by_role("tab").first).to_have_text(chat)
        expect(page.message).to_have_attribute("placeholder", placeholder)


def test_markup_stays_text_wherever_it_comes_from(
    mini: LiveServer, visit: VisitPage, tmp_path: Path
) -> None:
    file = tmp_path / "attack.csv"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([["text"], [ATTACK]])
    with visit(mini.url) as page:
        page.say(ATTACK)
        page.until_answered(1)
        shown = page.bubbles.first.inner_text().replace("\u2060", "")
        assert shown.splitlines()[0] == ATTACK
        page.open_tab(1)
        page.page.locator("#file input[type=file]").set_input_files(file)
        page.page.locator("#own-labels textarea, #own-labels input").fill("<b>a</b>, <i>b</i>")
        page.page.locator("#run").click()
        expect(page.page.locator("#download")).to_be_visible()
        expect(page.page.locator("#results")).to_contain_text("<script>alert(2)</script>")
        for tag in ("img[src=x]", "own", "b:text('bold')"):
            assert page.page.locator(tag).count() == 0


def test_a_file_is_classified_and_given_back(
    mini: LiveServer, visit: VisitPage, tmp_path: Path
) -> None:
    file = tmp_path / "reviews.txt"
    file.write_text("太棒了，我很开心！\n等了两个小时，气死我了。\n" * 20, encoding="utf-8")
    with visit(mini.url) as page:
        page.open_tab(1)
        page.page.locator("#file input[type=file]").set_input_files(file)
        page.page.locator("#run").click()
        expect(page.page.locator("#download")).to_be_visible()
        page.save_screenshot("classify-en")
        with page.page.expect_download() as started:
            page.page.locator("#download").click()
        with Path(started.value.path()).open(encoding="utf-8-sig", newline="") as given:
            rows = list(csv.DictReader(given))
        assert [row["label"] for row in rows] == ["positive", "negative"] * 20


def test_on_a_phone_nothing_is_wider_than_the_screen(mini: LiveServer, visit: VisitPage) -> None:
    phone = {
        "viewport": {"width": 390, "height": 844},
        "color_scheme": "dark",
        "is_mobile": True,
        "user_agent": "Mozilla/5.0 (Linux; Android 16) Chrome/156.0 Mobile Safari/537.36",
    }
    with visit(mini.url, "zh-CN", **phone) as page:
        page.say("今天好累")
        page.until_answered(1)
        page.save_screenshot("phone-dark-zh")
        width = page.page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390


def test_a_reply_is_stopped_and_what_came_of_it_stays(tiny: LiveServer, visit: VisitPage) -> None:
    with visit(tiny.url) as page:
        page.say("never stop")
        expect(page.page.locator("#chatbot [data-testid=bot]")).to_have_count(1)
        page.page.locator("#message .stop-button").click()
        page.until_answered(1)
        assert httpx.get(f"{tiny.url}/ready").json()["requests"] == 0


def test_a_server_with_keys_asks_for_one(
    tiny_checkpoint: Path,
    serve: Callable[[Settings], AbstractContextManager[LiveServer]],
    visit: VisitPage,
) -> None:
    settings = Settings(model=str(tiny_checkpoint), api_key="sk-right")  # type: ignore[arg-type]
    with serve(settings) as server, visit(server.url) as page:
        page.say("hello")
        expect(page.page.get_by_text("asks for an API key")).to_be_visible()
        expect(page.message).to_have_value("hello")
        page.page.locator("#api-key input").fill("sk-right")
        page.page.locator("#api-key input").blur()
        page.message.press("Enter")
        expect(page.page.locator("#chatbot [data-testid=bot]")).to_have_count(1)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_a_server_with_a_certificate_is_asked_over_https(tmp_path: Path, visit: VisitPage) -> None:
    _, tls_options = self_signed(tmp_path)
    with (
        started(environment(tmp_path), "--model", "mini", "--ui", *tls_options) as server,
        visit(server.url, ignore_https_errors=True) as page,
    ):
        page.say("hello")
        page.until_answered(1)


def test_the_page_has_its_headers_and_the_api_its_errors(mini: LiveServer) -> None:
    page = httpx.get(mini.url)
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["x-frame-options"] == "DENY"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert httpx.get(f"{mini.url}/nowhere").json()["error"]["code"] == "unknown_url"
    assert httpx.get(f"{mini.base_url}/chat/completions").status_code == 405


def test_without_the_page_the_address_is_unknown(
    tiny_checkpoint: Path, serve: Callable[[Settings], AbstractContextManager[LiveServer]]
) -> None:
    with serve(Settings(model=str(tiny_checkpoint), ui=False)) as server:
        assert httpx.get(server.url).status_code == 404


def test_an_open_page_does_not_hold_the_server_back(tmp_path: Path, visit: VisitPage) -> None:
    with (
        started(environment(tmp_path), "--model", "mini", "--ui") as server,
        visit(server.url) as page,
    ):
        page.say("hello")
        page.until_answered(1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(BOUND_S) == 0
        page.say("and now?")
        # What the browser cannot reach, Gradio tells itself.
        expect(page.page.get_by_text("Connection").first).to_be_visible()
    output = "".join(server.output)
    assert "Traceback" not in output
    assert "graceful shutdown exceeded" not in output
