"""POST /v1/classify, /v1/models and /health."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest

from server.config import Settings
from tests.live.test_errors import assert_error
from tests.servers import LiveServer


def classify(live: LiveServer, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{live.base_url}/classify", json=body, timeout=60)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


def results(content: dict[str, Any]) -> list[tuple[str, float]]:
    return [(item["label"], item["confidence"]) for item in content["data"]]


def test_one_text_has_one_result_in_the_documented_shape(live: LiveServer) -> None:
    content = classify(live, input="真好看")
    assert set(content) == {"id", "object", "created", "model", "data", "usage"}
    assert content["object"] == "list"
    assert content["id"].startswith("classify-")
    [item] = content["data"]
    assert list(item) == [
        "index",
        "label",
        "text",
        "emoji",
        "confidence",
        "probabilities",
        "score",
        "cached",
    ]
    probabilities = {p["value"]: p["probability"] for p in item["probabilities"]}
    assert item["confidence"] == probabilities[item["label"]]


def test_the_likeliest_label_wins_if_the_model_is_sure(mini: LiveServer) -> None:
    for item in classify(mini, input=["太好吃了！", "难吃死了", "I love it", "awful"])["data"]:
        assert item["confidence"] == max(p["probability"] for p in item["probabilities"])


def test_a_batch_equals_its_texts_alone(live: LiveServer) -> None:
    texts = [f"第{i}次来，味道{word}" for i, word in enumerate(["不错", "太差", "一般"] * 5)]
    batch = classify(live, input=texts)
    assert [item["index"] for item in batch["data"]] == list(range(15))
    with_spaces = [classify(live, input=f" {text}!") for text in texts]
    fresh = classify(live, input=[f"{text}!" for text in texts])
    assert [r for c in with_spaces for r in results(c)] == results(fresh)


def test_results_do_not_depend_on_the_batch(tiny_checkpoint: Path, serve: Any) -> None:
    texts = [f"number {i} is {'fine' if i % 2 else 'awful'}" for i in range(12)]
    settings = Settings(model=str(tiny_checkpoint), sentiment_cache_size=0)
    with serve(settings) as server:
        together = classify(server, input=texts)
        alone = [classify(server, input=text) for text in texts]
    assert not any(item["cached"] for item in together["data"])
    for (label, confidence), content in zip(results(together), alone, strict=True):
        [(alone_label, alone_confidence)] = results(content)
        assert alone_label == label
        assert alone_confidence == pytest.approx(confidence, abs=1e-4)


def test_white_space_and_unicode_forms_do_not_change_the_result(live: LiveServer) -> None:
    plain = classify(live, input="caf\u00e9 is great")["data"][0]
    odd = classify(live, input="  cafe\u0301  is\n great ")["data"][0]
    assert odd["cached"]
    assert odd["probabilities"] == plain["probabilities"]


def test_own_labels_are_scored(live: LiveServer) -> None:
    labels = ["加急", "普通", "可以等"]
    content = classify(live, input="请马上处理", instructions="判断紧急程度。", labels=labels)
    [item] = content["data"]
    assert [p["value"] for p in item["probabilities"]] == labels
    assert item["label"] in labels
    assert sum(p["probability"] for p in item["probabilities"]) == pytest.approx(1, abs=1e-4)


def test_labels_of_many_tokens_are_scored_and_of_too_many_refused(live: LiveServer) -> None:
    def of(num_words: int) -> dict[str, Any]:
        return {"instructions": "Which?", "labels": [f"{x} " * num_words + "x" for x in "abc"]}

    [item] = classify(live, input="text", **of(60))["data"]
    assert item["label"] in of(60)["labels"]
    response = httpx.post(
        f"{live.base_url}/classify", json={"input": "text", **of(1000)}, timeout=60
    )
    assert "at most 1024 are" in assert_error(response, 400, "invalid_request_error", "labels")


def test_the_intent_task_is_built_in(live: LiveServer) -> None:
    [item] = classify(live, input="几点开门？", task="intent")["data"]
    assert item["label"] in ("question", "request", "complaint", "chat")


def test_usage_counts_only_what_was_computed(live: LiveServer) -> None:
    text = f"counted once on {live.model}"
    first, second = (classify(live, input=text)["usage"]["prompt_tokens"] for _ in range(2))
    assert (first > 0, second) == (True, 0)


def test_a_task_file_adds_and_replaces_tasks(
    tiny_checkpoint: Path, tmp_path: Path, serve: Any
) -> None:
    task_file = tmp_path / "tasks.toml"
    task_file.write_text(
        """
        [sentiment]
        instructions = "Good or bad?"
        labels = [{value = "good", text = "good"}, {value = "bad", text = "bad"}]
        fallback = "bad"
        min_confidence = 1.0

        [language]
        instructions = "Which language is this?"
        labels = [{value = "zh", text = "中文"}, {value = "en", text = "英文"}]
        """
    )
    with serve(Settings(model=str(tiny_checkpoint), tasks=task_file)) as server:
        assert classify(server, input="x", task="language")["data"][0]["label"] in ("zh", "en")
        # No label reaches a confidence of 1, so the fallback answers.
        assert classify(server, input="fine")["data"][0]["label"] == "bad"
        assert classify(server, input="x", task="intent")


def test_values_that_no_header_can_hold_are_percent_encoded(
    tiny_checkpoint: Path, serve: Any, tmp_path: Path
) -> None:
    task = """
[sentiment]
instructions = "情绪？"
labels = [{value = "好 100%", text = "好"}, {value = "坏\\n", text = "坏"}]
"""
    file = tmp_path / "tasks.toml"
    file.write_text(task, encoding="utf-8")
    with serve(Settings(model=str(tiny_checkpoint), tasks=file)) as server:
        for stream in (False, True):
            for path, said in (
                ("chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
                ("responses", {"input": "hi"}),
            ):
                body = {"model": server.model, "stream": stream, **said}
                response = httpx.post(f"{server.base_url}/{path}", json=body, timeout=60)
                assert response.status_code == 200, response.text
                value = unquote(response.headers["x-sentiment"])
                assert value in ("好 100%", "坏\n")
                assert json.dumps(value, ensure_ascii=False) in response.text


def test_health_reports_the_model_and_counts_the_cache(live: LiveServer) -> None:
    before = httpx.get(f"{live.url}/health").json()
    text = f"health counts this on {live.model}"
    for _ in range(3):
        classify(live, input=text)
    after = httpx.get(f"{live.url}/health").json()
    assert after["status"] == "ok"
    assert (after["model"], after["warning"]) == (live.model, None)
    assert after["sentiment_cache"]["misses"] == before["sentiment_cache"]["misses"] + 1
    assert after["sentiment_cache"]["hits"] == before["sentiment_cache"]["hits"] + 2


def test_health_turns_503_when_the_engine_is_gone(tiny_checkpoint: Path, serve: Any) -> None:
    with serve(Settings(model=str(tiny_checkpoint))) as server:
        server.services.engine.close()
        response = httpx.get(f"{server.url}/health")
        assert (response.status_code, response.json()["status"]) == (503, "stopped")
        body = {"model": server.model, "messages": [{"role": "user", "content": "hi"}]}
        response = httpx.post(f"{server.base_url}/chat/completions", json=body)
        assert response.status_code == 503
        assert response.headers["retry-after"]
        assert response.json()["error"]["type"] == "server_error"
