"""POST /v1/classify with `sentences` and `explain`."""

from typing import Any

import httpx
import pytest

from server.core.roles.details import MAX_JUDGEMENTS, MAX_WORDS
from tests.live.test_errors import assert_error
from tests.servers import LiveServer

MIXED = "屏幕太好看了，我很喜欢！😄 客服态度太差了，气死我了。"


def post(live: LiveServer, **body: Any) -> httpx.Response:
    return httpx.post(f"{live.base_url}/classify", json=body, timeout=60)


def item_of(live: LiveServer, text: str, **body: Any) -> dict[str, Any]:
    response = post(live, input=text, **body)
    assert response.status_code == 200, response.text
    [item] = response.json()["data"]
    return dict(item)


def piece(text: str, span: dict[str, Any]) -> str:
    return text[span["offset"] : span["offset"] + span["length"]]


def test_each_sentence_has_the_label_it_has_alone(live: LiveServer) -> None:
    text = f"{MIXED} The meeting is on Friday."
    item = item_of(live, text, sentences=True)
    pieces = [piece(text, each) for each in item["sentences"]]
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert len(pieces) >= 3
    for sentence, each in zip(pieces, item["sentences"], strict=True):
        alone = item_of(live, sentence)
        assert alone["cached"]
        assert each["label"] == alone["label"]
        assert each["probabilities"] == alone["probabilities"]


def test_a_text_of_both_poles_is_mixed(mini: LiveServer) -> None:
    item = item_of(mini, MIXED, sentences=True)
    labels = [each["label"] for each in item["sentences"]]
    assert "positive" in labels and "negative" in labels
    assert item["mixed"]
    assert not item_of(mini, "太好看了！我很喜欢。", sentences=True)["mixed"]


def test_a_task_without_poles_is_never_mixed(tiny: LiveServer) -> None:
    item = item_of(tiny, MIXED, task="intent", sentences=True)
    assert "mixed" not in item
    assert item["sentences"]


def test_a_words_weight_is_what_the_label_loses_without_it(live: LiveServer) -> None:
    text = "The food was awful 😡"
    item = item_of(live, text, explain=True)
    assert [each["text"] for each in item["words"]] == ["The", "food", "was", "awful", "😡"]
    for each in item["words"]:
        assert each["text"] == piece(text, each)
        rest = text[: each["offset"]] + text[each["offset"] + each["length"] :]
        probabilities = {p["value"]: p["probability"] for p in item_of(live, rest)["probabilities"]}
        lost = item["confidence"] - probabilities[item["label"]]
        assert each["weight"] == pytest.approx(lost, abs=2e-6)


def test_many_words_are_explained_in_runs(tiny: LiveServer) -> None:
    text = " ".join(f"word{number}" for number in range(MAX_WORDS + 1))
    item = item_of(tiny, text, explain=True)
    assert len(item["words"]) == (MAX_WORDS + 2) // 2
    assert item["words"][0]["text"] == "word0 word1"
    assert item["words"][-1]["text"] == f"word{MAX_WORDS}"


def test_usage_counts_what_was_computed_of_the_parts(tiny: LiveServer) -> None:
    text = "Usage counts this. It counts that, too."
    whole = post(tiny, input=text).json()["usage"]["prompt_tokens"]
    parts = post(tiny, input=text, sentences=True, explain=True).json()["usage"]["prompt_tokens"]
    assert 0 < whole < parts
    again = post(tiny, input=text, sentences=True, explain=True).json()
    assert again["usage"]["total_tokens"] == 0


def test_labels_are_counted_of_texts_and_not_of_their_parts(tiny: LiveServer) -> None:
    counts = tiny.services.classifier.label_counts
    before = counts.total()
    item_of(tiny, "Only this. Not the words.", sentences=True, explain=True)
    assert counts.total() == before + 1


def test_a_text_without_words_has_none(tiny: LiveServer) -> None:
    assert item_of(tiny, "……！", explain=True)["words"] == []


def test_too_many_pieces_are_refused(tiny: LiveServer) -> None:
    texts = ["word " * MAX_WORDS] * 16
    message = assert_error(
        post(tiny, input=texts, explain=True), 400, "invalid_request_error", "input"
    )
    assert f"one request may take {MAX_JUDGEMENTS}" in message


@pytest.mark.parametrize("name", ["sentences", "explain"])
def test_the_switches_are_booleans(tiny: LiveServer, name: str) -> None:
    assert_error(post(tiny, input="good", **{name: "yes"}), 400, "invalid_request_error", name)
