"""The classify tab in a real browser."""

import asyncio
import csv
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI
from playwright.sync_api import expect

from server.config import Settings
from server.ui.client import classify
from tests.faults.conftest import BOUND_S
from tests.servers import LiveServer
from tests.ui.conftest import ATTACK, PHONE, VisitPage

REVIEWS = "太棒了，我很开心！\n等了两个小时，气死我了。\n" * 20
NUM_LINES = 10_000


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_classified_and_downloaded(
    mini: LiveServer, visit: VisitPage, tmp_path: Path
) -> None:
    with visit(mini.url) as page:
        page.classify(write(tmp_path / "reviews.txt", REVIEWS))
        rows = page.download()
        assert [row["label"] for row in rows] == ["positive", "negative"] * 20
        page.save_screenshot("classify-en")
        expect(page.page.locator("#results")).to_contain_text("😄 positive")


def test_the_results_are_in_the_language_of_the_page(
    mini: LiveServer, visit: VisitPage, tmp_path: Path
) -> None:
    with visit(mini.url, "zh-CN", color_scheme="dark", **PHONE) as page:
        page.classify(write(tmp_path / "reviews.txt", REVIEWS))
        expect(page.page.locator("#results")).to_contain_text("置信度")
        expect(page.page.locator("#results")).to_contain_text("😄 正面")
        page.page.locator("#distribution").scroll_into_view_if_needed()
        page.save_screenshot("classify-phone-dark-zh")
        assert page.width() <= 390
        assert {row["label"] for row in page.download()} == {"positive", "negative"}


def test_ten_thousand_lines_block_neither_the_page_nor_a_chat(
    mini: LiveServer, visit: VisitPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"第{number % 500}次来" for number in range(NUM_LINES - 1)] + ["最后一条"]
    is_answered = threading.Event()

    async def classify_last_when_answered(
        client: AsyncOpenAI, texts: Sequence[str], task: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        if lines[-1] in texts:
            await asyncio.to_thread(is_answered.wait, BOUND_S)
        return await classify(client, texts, task)

    monkeypatch.setattr("server.ui.classify.classify", classify_last_when_answered)
    with visit(mini.url) as page:
        page.classify(write(tmp_path / "many.txt", "\n".join(lines)))
        note = page.page.locator("#note")
        expect(note).to_contain_text(f"of {NUM_LINES} classified")
        page.open_chat()
        page.say("Do you still have time for me?")
        page.until_answered(1)
        page.open_classify()
        assert f"{NUM_LINES} of {NUM_LINES}" not in note.inner_text()
        is_answered.set()
        expect(note).to_contain_text(
            f"{NUM_LINES} of {NUM_LINES} classified; the table shows the first 200"
        )
        rows = page.download()
        assert [row["text"] for row in rows] == lines
        # The table only contains its visible rows.
        scroll = "each => each.querySelectorAll('*').forEach(part => part.scrollTop = 1e6)"
        page.page.locator("#results").evaluate(scroll)
        expect(page.page.locator("#results")).to_contain_text("第199次来")
        expect(page.page.locator("#results")).not_to_contain_text("第200次来")


def test_results_of_a_stopped_run_can_be_downloaded(
    mini: LiveServer, visit: VisitPage, tmp_path: Path
) -> None:
    lines = [f"This is number {number}." for number in range(3_000)]
    with visit(mini.url) as page:
        page.classify(write(tmp_path / "many.txt", "\n".join(lines)))
        expect(page.page.locator("#note")).to_contain_text("of 3000 classified")
        page.page.locator("#stop").click()
        rows = page.download()
        done = re.match(r"(\d+) of 3000 classified", page.page.locator("#note").inner_text())
        assert done is not None
        assert len(rows) == int(done[1]) < 3_000
        assert [row["text"] for row in rows] == lines[: len(rows)]


def test_markup_in_a_file_and_in_labels_stays_text(
    mini: LiveServer, visit: VisitPage, tmp_path: Path
) -> None:
    file = tmp_path / "attack.csv"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([["text"], [ATTACK]])
    with visit(mini.url) as page:
        page.open_classify()
        page.page.locator("#own-labels textarea, #own-labels input").fill("<b>a</b>, <i>b</i>")
        page.classify(file)
        assert len(page.download()) == 1
        expect(page.page.locator("#results")).to_contain_text("<script>alert(2)</script>")
        page.assert_no_markup_of_the_attack()


def test_the_tasks_are_those_of_the_server(
    tiny_checkpoint: Path,
    serve: Callable[[Settings], AbstractContextManager[LiveServer]],
    visit: VisitPage,
    tmp_path: Path,
) -> None:
    tasks = write(
        tmp_path / "tasks.toml",
        '[spam]\ninstructions = "是广告吗？"\n'
        'labels = [{ value = "yes", text = "是" }, { value = "no", text = "否" }]\n',
    )
    with (
        serve(Settings(model=str(tiny_checkpoint), tasks=tasks)) as server,
        visit(server.url) as page,
    ):
        page.open_classify()
        page.page.locator("#task input").click()
        expect(page.page.get_by_role("option")).to_contain_text(["sentiment", "intent", "spam"])
        page.page.get_by_role("option", name="spam").click()
        page.classify(write(tmp_path / "one.txt", "buy now"))
        assert page.download()[0]["label"] in ("yes", "no")


def test_a_row_is_explained_in_colours_and_its_label_corrected(
    mini: LiveServer, visit: VisitPage, tmp_path: Path
) -> None:
    text = "屏幕太好看了！客服态度太差了。"
    with visit(mini.url) as page:
        page.classify(write(tmp_path / "two.txt", f"{text}\n=1+1 真好\n"))
        results = page.page.locator("#results")
        results.get_by_text(text).locator("visible=true").first.click()
        expect(page.page.locator("#sentences")).to_contain_text("😢 negative")
        expect(page.page.locator("#sentences")).to_contain_text("😄 positive")
        expect(page.page.locator("#words")).to_contain_text("屏幕")
        page.page.locator("#correct-label input").click()
        page.page.get_by_role("option", name="neutral").click()
        expect(page.page.locator("#note")).to_contain_text("1 corrected")
        page.save_screenshot("classify-explained-en")
        with page.page.expect_download() as started:
            page.page.locator("#download-corrected").click()
        with Path(started.value.path()).open(encoding="utf-8-sig", newline="") as given:
            assert list(csv.DictReader(given)) == [{"text": text, "label": "neutral"}]


def test_the_explanation_fits_on_a_phone(
    mini: LiveServer, visit: VisitPage, tmp_path: Path
) -> None:
    text = "屏幕太好看了，我很喜欢！可是客服态度太差了，等了两个小时。"
    with visit(mini.url, "zh-CN", **PHONE) as page:
        page.classify(write(tmp_path / "one.txt", text))
        page.page.locator("#results").get_by_text(text).locator("visible=true").first.click()
        expect(page.page.locator("#sentences")).to_contain_text("负面")
        page.page.locator("#correct-label input").click()
        expect(page.page.get_by_role("option")).to_contain_text(["😄 正面", "😢 负面", "😐 中性"])
        page.page.get_by_role("option", name="正面").click()
        expect(page.page.locator("#note")).to_contain_text("已更正 1 条")
        page.page.locator("#words").scroll_into_view_if_needed()
        page.save_screenshot("classify-explained-phone-zh")
        assert page.width() <= 390
