"""A server whose upstream is another server of ours: both give the same answers."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import SecretStr

from server.config import Settings, read_settings
from server.core.engine.checkpoint import BUNDLED_FOLDER, CheckpointError
from server.loading import LOCAL_ENGINE_SETTINGS, load_services
from tests.faults.conftest import endless, text_of
from tests.live.test_clients_at_once import is_idle, until
from tests.remote.scenario import HAPPY, SAD, SCENARIO, chat
from tests.servers import LiveServer, run_live

BOUND_S = 30


def answer_of(server: LiveServer, path: str, body: dict[str, Any]) -> Any:
    response = httpx.post(server.url + path, json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def without(reply: dict[str, Any], *names: str) -> dict[str, Any]:
    """The reply without fields that differ each time, such as the ids of tool calls."""
    kept = {key: value for key, value in reply.items() if key not in ("id", "created", *names)}
    for choice in kept.get("choices", []):
        for call in choice.get("message", {}).get("tool_calls") or []:
            call.pop("id")
    return kept


@pytest.mark.parametrize(
    "name",
    ["plain", "logprobs", "biased", "sampled", "choices", "json", "tool", "extract", "completion"],
)
def test_answers_without_a_mood_equal_those_of_the_upstream(
    mini: LiveServer, front: LiveServer, name: str
) -> None:
    path, body = SCENARIO[name]
    behind = without(answer_of(mini, path, body), "usage")
    before = without(answer_of(front, path, body), "usage")
    assert flat(before) == pytest.approx(flat(behind), abs=1e-5)


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """All numbers, strings and nulls by their paths, so that `approx` can compare them."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        return {path: value}
    return {key: leaf for name, item in items for key, leaf in flat(item, f"{path}/{name}").items()}


async def test_label_scores_equal_those_of_the_upstream(
    mini: LiveServer, front: LiveServer
) -> None:
    encode = mini.services.tokenizer.encode_text
    labels = [encode(text) for text in ("很好", "很不好", "很", "a longer one", "a long one")]
    assert max(map(len, labels)) > 2
    prompt = encode("今天天气很")
    behind = await mini.services.engine.score(prompt, labels)
    before = await front.services.engine.score(prompt, labels)
    assert before.logprobs == pytest.approx(behind.logprobs, abs=1e-4)
    again = await front.services.engine.score(prompt, labels)
    assert again.num_cached is not None and again.num_cached > 0


def test_moods_are_judged_by_label_scores(front: LiveServer) -> None:
    [model, *_] = answer_to_get(front, "/v1/models")["data"]
    assert model["capabilities"]["heads"] is False
    judged_by = {task["name"]: task.get("judged_by") for task in model["tasks"]}
    assert judged_by["sentiment"] == "label_scores"
    for text, label in ((SAD, "negative"), (HAPPY, "positive")):
        assert answer_of(front, *chat(text))["sentiment"]["label"] == label


def answer_to_get(server: LiveServer, path: str) -> Any:
    return httpx.get(server.url + path).json()


def test_the_upstream_itself_has_heads(mini: LiveServer) -> None:
    assert answer_to_get(mini, "/v1/models")["data"][0]["capabilities"]["heads"] is True


def test_a_task_without_a_judge_gets_one_when_it_is_first_used(front: LiveServer) -> None:
    answer = answer_of(front, "/v1/classify", {"input": HAPPY, "task": "emotion"})
    assert answer["data"][0]["label"]
    tasks = answer_to_get(front, "/v1/models")["data"][0]["tasks"]
    assert {"label_scores"} == {task["judged_by"] for task in tasks if task["name"] == "emotion"}


def test_a_stream_has_the_text_of_the_whole_reply(front: LiveServer) -> None:
    path, body = chat(SAD, temperature=0.9, seed=3)
    expected = answer_of(front, path, body)
    streamed = httpx.post(front.url + path, json={**body, "stream": True}, timeout=60)
    assert text_of(streamed) == expected["choices"][0]["message"]["content"]
    first = json.loads(streamed.text.partition("\n\n")[0].removeprefix("data: "))
    assert {**first["sentiment"], "cached": 0} == {**expected["sentiment"], "cached": 0}


def test_the_openai_client_gets_usage_with_cached_tokens(front: LiveServer) -> None:
    client = openai.OpenAI(base_url=front.base_url, api_key="unused")
    for _ in range(2):
        reply = client.chat.completions.create(
            model=front.model, messages=[{"role": "user", "content": "cached? " * 9}], max_tokens=4
        )
    assert reply.usage and reply.usage.prompt_tokens_details
    assert 0 < (reply.usage.prompt_tokens_details.cached_tokens or 0) < reply.usage.prompt_tokens


async def test_a_client_disconnect_frees_the_upstreams_slot(
    mini: LiveServer, front: LiveServer
) -> None:
    behind: Any = mini.services.engine
    async with httpx.AsyncClient(timeout=60) as client:
        for stream in (True, False):
            body = endless(front, stream=stream)
            asking = asyncio.create_task(
                client.post(f"{front.base_url}/chat/completions", json=body)
            )
            await until(lambda: behind.num_running == 1 and front.services.engine.num_running == 1)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await until(lambda: is_idle(behind) and front.services.engine.num_running == 0)


def test_a_parameter_that_the_upstream_refuses_is_named(front: LiveServer) -> None:
    path, body = chat("hello", logit_bias={str(i): 1 for i in range(1025)})
    response = httpx.post(front.url + path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "logit_bias"


def test_metrics_have_tokens_but_no_memory(front: LiveServer) -> None:
    answer_of(front, *SCENARIO["plain"])
    text = httpx.get(f"{front.url}/metrics").text
    assert "qwen_kv_tokens" not in text
    assert 'qwen_tokens_total{kind="generated"} 0.0' not in text
    assert "qwen_first_token_seconds_count 0.0" not in text


# --- settings and start ---------------------------------------------------------------


def test_no_weights_are_needed(mini: LiveServer, tmp_path: Path) -> None:
    folder = tmp_path / "qwen-mini"
    shutil.copytree(BUNDLED_FOLDER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with run_live(Settings(model=str(folder), engine=mini.url, ui=False)) as server:
        assert answer_of(server, *SCENARIO["plain"])["choices"]


def test_the_context_is_the_smaller_one(mini: LiveServer, front: LiveServer) -> None:
    assert front.services.max_context == mini.services.max_context
    settings = Settings(model="mini", engine=mini.url, max_context=mini.services.max_context + 1)
    with pytest.raises(CheckpointError, match=r"--max-context .* is more than the"):
        load_services(settings)


@pytest.mark.parametrize("name", LOCAL_ENGINE_SETTINGS)
def test_a_setting_of_the_local_engine_is_refused_with_an_upstream(name: str) -> None:
    values: dict[str, Any] = {"dtype": "int8", "max_draft_tokens": 2}
    settings = Settings(engine="http://127.0.0.1:1", **{name: values.get(name, 8)})
    with pytest.raises(CheckpointError, match=f"--{name.replace('_', '-')} has no effect"):
        load_services(settings)


def test_an_adapter_is_refused_with_an_upstream() -> None:
    settings = Settings(engine="http://127.0.0.1:1", adapter=("a=folder",))
    with pytest.raises(CheckpointError, match="--adapter cannot be used with --engine"):
        load_services(settings)


def test_a_key_without_an_engine_is_refused() -> None:
    with pytest.raises(CheckpointError, match="--engine-key has no effect without --engine"):
        load_services(Settings(model="mini", engine_key=SecretStr("secret")))


def test_another_checkpoint_is_detected_by_its_tokens(mini: LiveServer, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(BUNDLED_FOLDER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(OSError, match="whose tokens are not those of --model"):
        load_services(Settings(model=str(folder), engine=mini.url))


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://10.0.0.1:8000", "http://10.0.0.1:8000"),
        ("http://localhost:8000/v1/", "http://localhost:8000"),
        ("https://host/under/a/path", "https://host/under/a/path"),
    ],
)
def test_the_address_may_be_a_base_url(given: str, url: str) -> None:
    assert read_settings(Settings, ["--engine", given]).engine == url


@pytest.mark.parametrize(
    "given", ["", "vllm", "localhost:8000", "ftp://host", "http://", "http://a b"]
)
def test_an_invalid_address_is_one_sentence(given: str) -> None:
    with pytest.raises(SystemExit, match=f"error: --engine {given!r}: it is not http://HOST:PORT"):
        read_settings(Settings, ["--engine", given])
