"""The page's modules by themselves: files, commands, conversations."""

import ast
import gc
import json
import shlex
import sys
import weakref
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import AsyncGeneratorType
from typing import Any

import httpx2
import pytest
from openai import BadRequestError

from server.ui.chat import Options, chat_body
from server.ui.classify import MAX_ROWS, Run, task_of
from server.ui.client import connect, stream_chat
from server.ui.commands import arguments_of, curl_line, python_lines
from server.ui.conversation import (
    Turn,
    inert,
    plain,
    request_messages,
    shown_messages,
    turn_at,
)
from server.ui.explanation import COLORS, colors_of, sentence_pieces, word_pieces
from server.ui.failures import explain
from server.ui.lines import batches, read_file, read_lines, to_csv
from server.ui.page import build_page
from server.ui.texts import TEXTS, name_of, with_names
from tests.live.test_clients_at_once import until
from tests.servers import LiveServer

NASTY = """it's "quoted" $(rm -rf /) `x` \\ 很好\n<b>&amp;"""
BODY = {
    "model": "qwen-mini",
    "messages": [{"role": "user", "content": NASTY}],
    "stream": True,
    "sentiment": False,
}
SENTIMENT = {"label": "positive", "emoji": "😄", "text": "正面", "confidence": 0.93}
TURNS = [
    Turn(user="a", sentiment=SENTIMENT, answer="b"),
    Turn(user="c", sentiment=None, answer="d"),
    Turn(user="e", sentiment=None, answer=""),
]


def test_the_curl_line_quotes_any_text() -> None:
    words = shlex.split(curl_line("http://x", BODY, has_key=True).replace("\\\n", ""))
    assert words[:3] == ["curl", "-N", "http://x/v1/chat/completions"]
    assert "authorization: Bearer $OPENAI_API_KEY" in words
    assert json.loads(words[-1]) == BODY


def test_the_python_lines_send_the_same_request() -> None:
    tree = ast.parse(python_lines("http://x'y", BODY, has_key=False))
    [call] = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and len(n.keywords) > 2]
    given = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
    assert given.pop("extra_body") == {"sentiment": False}
    assert {**given, "sentiment": False} == BODY


def test_fields_unknown_to_the_openai_client_go_into_extra_body() -> None:
    assert arguments_of({"model": "m", "sentiment": False}) == {
        "model": "m",
        "extra_body": {"sentiment": False},
    }
    both = arguments_of({"model": "m", "sentiment": True, "tasks": ["intent"]})
    assert both["extra_body"] == {"sentiment": True, "tasks": ["intent"]}
    assert arguments_of({"model": "m"}) == {"model": "m"}


def test_a_conversation_is_sent_without_moods_and_empty_answers() -> None:
    messages = request_messages(TURNS, "be kind")
    assert [message["role"] for message in messages] == [
        *("system", "user", "assistant", "user", "assistant", "user")
    ]
    assert [message["content"] for message in messages] == ["be kind", "a", "b", "c", "d", "e"]
    assert request_messages(TURNS, " ")[0]["role"] == "user"


def test_the_index_of_a_shown_message_gives_its_turn() -> None:
    contents = [message["content"] for message in shown_messages(TURNS, "zh")]
    assert contents == ["a\n\u2063😄 正面 93%", "b", "c", "d", "e"]
    assert [turn_at(TURNS, index) for index in range(5)] == [0, 0, 1, 1, 2]
    assert plain(contents[0]) == "a"


def test_each_analysis_has_a_line_below_the_message() -> None:
    analyses = {
        "intent": {"label": "chat", "text": "闲聊", "emoji": "💬", "confidence": 0.9},
        "keywords": ["<b>x</b>", "y"],
        "names": [],
        "emotion": None,
    }
    turn = Turn(user="a <b>x</b>\ny", sentiment=SENTIMENT, analyses=analyses, answer="")
    [shown] = [message["content"] for message in shown_messages([turn], "en")]
    assert shown.replace("\u2060", "").split("\n\u2063")[1:] == [
        "😄 positive 93%",
        "intent: 💬 chat 90%",
        "keywords: <b>x</b> · y",
        "names: –",
        "emotion: –",
    ]
    assert "<b" not in shown and plain(shown) == turn["user"]
    assert "闲聊" in shown_messages([turn], "zh")[0]["content"]


@pytest.mark.parametrize("text", ["<b>", "</b>", "<!--", "&lt;", "&#60;", NASTY])
def test_nothing_in_an_inert_text_is_a_tag_or_an_entity(text: str) -> None:
    for opening in ("<b", "</", "<!", "&l", "&#", "&a"):
        assert opening not in inert(text)
    assert plain(inert(text)) == text


def test_lines_are_read_from_text_and_csv(tmp_path: Path) -> None:
    assert read_lines(" a \n\n b") == ["a", "b"]
    path = tmp_path / "x.csv"
    path.write_text('id,Text\n1,"a, b"\n2,\n3,c\n', encoding="utf-8-sig")
    assert read_file(path) == ["a, b", "c"]
    path.write_bytes("太好了,1\n太差了,2\n".encode("gb18030"))
    assert read_file(path) == ["太好了", "太差了"]
    path.write_text("")
    assert read_file(path) == []


def test_a_csv_holds_no_formula() -> None:
    content = to_csv(["=1+1"], [{"label": "@x", "confidence": 0.5}])
    assert content.decode("utf-8-sig").splitlines()[1] == "'=1+1,'@x,0.5"


def test_batches_keep_order_and_lose_nothing() -> None:
    texts = [str(number) for number in range(10_000)]
    parts = list(batches(texts, 16))
    assert [text for part in parts for text in part] == texts
    assert max(map(len, parts)) == 16


def test_own_labels_take_precedence_over_the_task() -> None:
    assert task_of("intent", " ", "x") == {"task": "intent"}
    assert task_of("intent", "a，a", "") is None
    assert task_of("intent", "a, b，a", "x") == {"instructions": "x", "labels": ["a", "b"]}


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Keeps objects alive that only a reference cycle holds."""
    gc.disable()
    yield
    gc.enable()


async def test_an_abandoned_stream_leaves_no_generator_to_the_collector(
    tiny: LiveServer, without_collector: None
) -> None:
    """The collector may run in another thread and close them while the event loop does."""
    begun = weakref.WeakSet[AsyncGeneratorType[Any, Any]]()
    note_of_loop: Any = sys.get_asyncgen_hooks().firstiter

    def note(generator: AsyncGenerator[Any, Any]) -> None:
        assert isinstance(generator, AsyncGeneratorType)
        begun.add(generator)
        note_of_loop(generator)

    sys.set_asyncgen_hooks(firstiter=note)
    async with connect(tiny.url, "") as client:
        body = {**BODY, "model": tiny.model, "max_tokens": 100}
        async with aclosing(stream_chat(client, body)) as pieces:
            await anext(pieces)
            assert len(begun) > 3
    await until(lambda: all(each.ag_frame is None for each in begun))


def test_only_chosen_settings_are_sent() -> None:
    options = Options("", False, 0.5, 16.0, with_sentiment=True, tasks=[], api_key="sk")
    body = chat_body("m", TURNS, options)
    assert not {"temperature", "max_tokens", "tasks"} & set(body)
    assert chat_body("m", TURNS, replace(options, tasks=["intent"]))["tasks"] == ["intent"]
    body = chat_body("m", TURNS, replace(options, has_own_sampling=True))
    assert (body["temperature"], body["max_tokens"]) == (0.5, 16)
    assert "sk" not in json.dumps(body)


def test_an_error_of_the_server_is_shown_without_its_status() -> None:
    response = httpx2.Response(400, request=httpx2.Request("POST", "http://x"))
    error = BadRequestError(
        "Error code: 400 - too long", response=response, body={"message": "too long"}
    )
    assert explain(error, "en") == "too long"


def test_a_table_shows_the_first_rows_and_the_csv_has_all() -> None:
    results = [{"label": "a", "text": "b", "confidence": 0.5}] * (MAX_ROWS + 1)
    run = Run(["x"] * 1000, results, is_due=True, task={"task": "a"})
    assert run.rows("zh") == [["x", "b", "50%"]] * MAX_ROWS
    assert len(run.csv().decode("utf-8-sig").splitlines()) == 1 + len(results)
    assert run.distribution("en").values.tolist() == [["a", len(results)]]


def test_a_label_has_a_name_in_either_language() -> None:
    labels = [{"value": "positive", "text": "正面", "emoji": "😄"}]
    result = {"probabilities": [{"value": "positive", "probability": 1}, {"value": "new"}]}
    known, unknown = with_names(result, labels)["probabilities"]
    assert (name_of(known, "zh"), name_of(known, "en")) == ("😄 正面", "😄 positive")
    assert name_of(unknown, "zh") == "new"


def test_every_text_exists_in_both_languages() -> None:
    assert all(zh and en for zh, en in TEXTS.values())


async def test_the_page_wakes_the_server_at_most_fifty_times_a_second() -> None:
    # Gradio's default interval of 1 ms takes time from the engine, even while no page is open.
    app = build_page()
    async with app.router.lifespan_context(app):
        mount: Any = app.routes[-1]
        queue = mount.app.get_blocks()._queue
        assert not queue.stopped
        assert queue.sleep_when_free >= 0.02
        assert queue.progress_update_sleep_when_free >= 0.1


def test_a_text_in_colours_is_the_whole_text() -> None:
    text = " Good. 坏！ "
    result = {
        "sentences": [
            {"offset": 1, "length": 5, "label": "yes", "text": "好", "emoji": ""},
            {"offset": 7, "length": 2, "label": "no", "text": "坏", "emoji": ""},
        ],
        "words": [
            {"offset": 1, "length": 4, "weight": -0.1},
            {"offset": 7, "length": 1, "weight": 0.2},
        ],
        "probabilities": [{"value": "yes"}, {"value": "no"}],
    }
    assert sentence_pieces(text, result, "en") == [
        (" ", None), ("Good.", "yes"), (" ", None), ("坏！", "no"), (" ", None)
    ]  # fmt: skip
    assert word_pieces(text, result) == [
        (" ", None), ("Good", -0.5), (". ", None), ("坏", 1.0), ("！ ", None)
    ]  # fmt: skip
    assert colors_of(result, "zh") == {"好": COLORS[0], "坏": COLORS[1]}
    assert word_pieces("……", {"words": []}) == [("……", None)]
