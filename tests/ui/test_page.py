"""The page in a real browser, on the bundled model."""

import re
import shutil
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from server.config import Settings
from server.errors import APIError, OverloadedError, UnavailableError
from server.gate import Gate
from tests.faults.conftest import BOUND_S, held
from tests.processes import environment, self_signed, started
from tests.servers import LiveServer
from tests.ui.conftest import ATTACK, PHONE, VisitPage


def test_a_chat_shows_the_mood_and_the_answer(mini: LiveServer, visit: VisitPage) -> None:
    with visit(mini.url, "zh-CN") as page:
        page.say("我失恋了，很难过")
        page.until_answered(1)
        expect(page.bubbles).to_have_count(2)
        expect(page.bubbles.first).to_contain_text("😢 负面")
        page.say("今天的实验终于成功了，太棒了！")
        page.until_answered(2)
        expect(page.bubbles.nth(2)).to_contain_text("😄 正面")
        expect(page.mood).to_contain_text("😄 正面")
        legend = page.page.locator("#mood-plot .role-legend")
        expect(legend).to_have_text(re.compile("😄 正面.*😢 负面.*😐 中性"))
        page.save_screenshot("chat-zh")


def test_the_mood_is_shown_before_the_answer(mini: LiveServer, visit: VisitPage) -> None:
    with visit(mini.url) as page:
        with held(mini.services, answers_only=True):
            page.say("What a lovely morning, I am so happy!")
            expect(page.bubbles.first).to_contain_text("😄 positive")
            expect(page.mood).to_contain_text("😄 positive")
            expect(page.answers).to_have_count(0)
        page.until_answered(1)


def test_an_opener_a_retry_an_undo_and_a_new_conversation(
    mini: LiveServer, visit: VisitPage
) -> None:
    with visit(mini.url) as page:
        page.page.get_by_role("button", name="I finally got the job!").click()
        page.until_answered(1)
        page.page.get_by_role("button", name="Retry").click()
        page.until_answered(1)
        # The same text again: its mood is cached.
        expect(page.mood).to_contain_text("from the cache")
        page.open_new_conversation()
        page.conversations.click()
        page.until_answered(1)
        page.page.get_by_role("button", name="Undo").click()
        expect(page.bubbles).to_have_count(0)
        expect(page.message).to_have_value("I finally got the job!")
        expect(page.conversations).to_have_count(0)


def test_the_browser_keeps_separate_conversations(mini: LiveServer, visit: VisitPage) -> None:
    with visit(mini.url) as page:
        page.say("The first one.")
        page.until_answered(1)
        page.page.reload()
        page.say("The second one.")
        page.until_answered(1)
        page.say("And more of it.")
        page.until_answered(2)
        expect(page.conversations).to_contain_text(["The second one.", "The first one."])
        page.conversations.nth(1).click()
        page.until_answered(1)
        expect(page.bubbles.first).to_contain_text("The first one.")


def test_another_conversation_is_opened_during_an_answer(
    tiny: LiveServer, visit: VisitPage
) -> None:
    with visit(tiny.url) as page:
        page.say("The first one.")
        expect(page.answers).to_have_count(1)
        page.open_new_conversation()
        expect(page.conversations).to_contain_text(["The first one."])
        page.say("The second one.")
        expect(page.answers).to_have_count(1)
        page.conversations.click()
        expect(page.bubbles.first).to_contain_text("The first one.")
        expect(page.conversations).to_contain_text(["The second one.", "The first one."])
        expect(page.conversations.nth(1).locator("input")).to_be_checked()
        assert httpx.get(f"{tiny.url}/ready").json()["requests"] == 0


def test_leaving_an_unanswered_conversation_restores_its_message(
    mini: LiveServer, visit: VisitPage
) -> None:
    with visit(mini.url) as page:
        page.say("The first one.")
        page.until_answered(1)
        page.open_new_conversation()
        page.say("The second one.")
        page.until_answered(1)
        page.conversations.nth(1).click()
        expect(page.bubbles.first).to_contain_text("The first one.")
        with held(mini.services, answers_only=True):
            page.page.get_by_role("button", name="Retry").click()
            expect(page.answers).to_have_count(0)
            page.conversations.nth(0).click()
            expect(page.bubbles.first).to_contain_text("The second one.")
        expect(page.message).to_have_value("The first one.")
        expect(page.conversations).to_contain_text(["The second one."])
        expect(page.conversations.locator("input")).to_be_checked()


def test_an_edited_message_is_answered_again(mini: LiveServer, visit: VisitPage) -> None:
    with visit(mini.url) as page:
        page.say("I am <b>sad</b>")
        page.until_answered(1)
        page.page.get_by_role("button", name="Edit").first.click()
        page.page.locator("#chatbot textarea").first.fill("I am so happy today, it is wonderful!")
        page.page.get_by_role("button", name="Submit").first.click()
        expect(page.bubbles.first).to_contain_text("so happy today, it is wonderful!")
        expect(page.mood).to_contain_text("positive")
        page.until_answered(1)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OverloadedError("busy"), "The server is busy; try again in 2 seconds."),
        (UnavailableError(), "The server is restarting; try again in a moment."),
    ],
)
def test_the_page_shows_why_a_request_is_refused(
    mini: LiveServer,
    visit: VisitPage,
    monkeypatch: pytest.MonkeyPatch,
    error: APIError,
    sentence: str,
) -> None:
    def enter(gate: Gate) -> None:
        raise error

    with visit(mini.url) as page:
        monkeypatch.setattr(Gate, "enter", enter)
        page.say("hello")
        expect(page.page.get_by_text(sentence)).to_be_visible()
        expect(page.message).to_have_value("hello")


def test_under_the_hood_shows_the_request(mini: LiveServer, visit: VisitPage) -> None:
    with visit(mini.url) as page:
        page.say("It's a good day")
        page.until_answered(1)
        hood = page.page.locator("#hood")
        hood.get_by_role("button").first.click()
        expect(hood).to_contain_text(f"{mini.base_url}/chat/completions")
        # Settings that the user did not choose are not sent.
        expect(hood).not_to_contain_text("temperature")
        page.page.locator("#own-sampling input").check()
        page.say("It's a good day")
        page.until_answered(2)
        expect(hood).to_contain_text('"temperature": 0.7, "max_tokens": 512')
        hood.get_by_role("tab", name="Python").click()
        expect(hood).to_contain_text("for chunk in client.chat.completions.create(")
        page.page.locator("#hood").scroll_into_view_if_needed()
        page.save_screenshot("hood-en")


def test_analyses_are_shown_below_the_mood(mini: LiveServer, visit: VisitPage) -> None:
    with visit(mini.url, "zh-CN", permissions=["clipboard-read", "clipboard-write"]) as page:
        expect(page.analyses).to_have_text(["emotion", "intent", "keywords"])
        expect(page.analyses.locator("input:checked")).to_have_count(0)
        for name in ("emotion", "keywords"):
            page.analyses.get_by_text(name).click()
        text = "我的耳机又坏了，气死我了！"
        page.say(text)
        page.until_answered(1)
        message, mood, emotion, keywords = page.bubbles.first.inner_text().splitlines()
        assert mood.endswith("%") and message.replace("\u2060", "") == text
        expected = {
            f"{label.emoji} {label.text}" for label in mini.services.tasks["emotion"].labels
        }
        assert re.sub("^\u2063emotion: | [0-9]+%$", "", emotion) in expected
        found = keywords.removeprefix("\u2063keywords: ").split(" · ")
        assert found and all(item in text for item in found)
        page.page.get_by_role("button", name="Copy").first.click()
        assert page.clipboard() == text
        page.save_screenshot("chat-analyses-zh")
        # They are kept with the conversation, and not requested after a reload.
        page.page.reload()
        page.conversations.click()
        expect(page.bubbles.first).to_contain_text("keywords: ")
        expect(page.analyses.locator("input:checked")).to_have_count(0)
        page.say("谢谢你")
        page.until_answered(2)
        expect(page.bubbles.nth(2)).not_to_contain_text("keywords")


def test_a_copied_message_is_the_users_text(mini: LiveServer, visit: VisitPage) -> None:
    with visit(mini.url, permissions=["clipboard-read", "clipboard-write"]) as page:
        page.say(ATTACK)
        page.until_answered(1)
        page.page.get_by_role("button", name="Copy").first.click()
        assert page.clipboard() == ATTACK
        page.bubbles.first.click(click_count=3)
        page.page.keyboard.press("Control+A")
        page.page.keyboard.press("Control+C")
        assert ATTACK in page.clipboard()
        assert not {"\u2060", "\u2063"} & set(page.clipboard())


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


def test_markup_stays_text(mini: LiveServer, visit: VisitPage) -> None:
    with visit(mini.url) as page:
        page.say(ATTACK)
        page.until_answered(1)
        shown = page.bubbles.first.inner_text().replace("\u2060", "")
        assert shown.splitlines()[0] == ATTACK
        page.assert_no_markup_of_the_attack()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_or_dark_is_the_browsers_choice(
    mini: LiveServer, visit: VisitPage, scheme: str
) -> None:
    with visit(mini.url, color_scheme=scheme) as page:
        page.say("I finally got the job!")
        page.until_answered(1)
        page.say("But my cat is ill.")
        page.until_answered(2)
        page.save_screenshot(f"chat-{scheme}-en")
        colour = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
        lightness = sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
        assert (lightness > 128) == (scheme == "light")


def test_on_a_phone_nothing_is_wider_than_the_screen(mini: LiveServer, visit: VisitPage) -> None:
    with visit(mini.url, "zh-CN", color_scheme="dark", **PHONE) as page:
        page.say("今天好累")
        page.until_answered(1)
        page.save_screenshot("phone-dark-zh")
        assert page.width() <= 390


def test_the_text_of_a_stopped_reply_stays(tiny: LiveServer, visit: VisitPage) -> None:
    with visit(tiny.url) as page:
        page.say("never stop")
        expect(page.answers).to_have_count(1)
        page.page.locator("#message .stop-button").click()
        page.until_answered(1)
        assert httpx.get(f"{tiny.url}/ready").json()["requests"] == 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_the_page_calls_a_server_with_a_certificate_over_https(
    tmp_path: Path, visit: VisitPage
) -> None:
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


def test_without_the_page_its_path_is_not_found(
    tiny_checkpoint: Path, serve: Callable[[Settings], AbstractContextManager[LiveServer]]
) -> None:
    with serve(Settings(model=str(tiny_checkpoint), ui=False)) as server:
        assert httpx.get(server.url).status_code == 404


def test_without_the_extra_the_server_says_how_to_install_the_page(tmp_path: Path) -> None:
    # Simulates a missing Gradio: Python imports this file at its start.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['gradio'] = None\n")
    env = {**environment(tmp_path), "PYTHONPATH": str(tmp_path)}
    with started(env, "--model", "mini", "--ui") as server:
        assert server.get("/").status_code == 404
        assert server.get("/v1/models").status_code == 200
    assert "page              pip install 'qwen-all-in-one[ui]'" in "".join(server.output)


def test_an_open_page_does_not_delay_shutdown(tmp_path: Path, visit: VisitPage) -> None:
    folder, file = tmp_path / "gradio", tmp_path / "one.txt"
    file.write_text("fine", encoding="utf-8")
    env = {**environment(tmp_path), "GRADIO_TEMP_DIR": str(folder)}
    with started(env, "--model", "mini", "--ui") as server, visit(server.url) as page:
        page.classify(file)
        assert len(page.download()) == 1
        page.open_chat()
        page.say("hello")
        page.until_answered(1)
        expect(page.conversations).to_have_count(1)  # the page is completely loaded
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(BOUND_S) == 0
        page.say("and now?")
        expect(page.page.get_by_text("The server is restarting")).to_be_visible()
    output = "".join(server.output)
    assert "Traceback" not in output
    assert "graceful shutdown exceeded" not in output
    # Uploads and downloads are deleted; of an upload an empty file remains.
    assert not any(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("width", "is_open"), [(390, False), (1280, True)])
def test_the_sidebar_opens_only_in_a_wide_window(
    mini: LiveServer, visit: VisitPage, width: int, is_open: bool
) -> None:
    with visit(mini.url, viewport={"width": width, "height": 844}) as page:
        new = page.page.get_by_role("button", name="New conversation")
        if is_open:
            expect(new).to_be_in_viewport()
        page.say("Hello!")
        page.until_answered(1)
        page.save_screenshot(f"chat-{width}")
        if not is_open:
            expect(new).not_to_be_in_viewport()
