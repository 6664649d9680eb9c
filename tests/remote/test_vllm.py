"""A real vLLM as the upstream: QWEN_VLLM is its URL, QWEN_VLLM_MODEL its model.

    VLLM_CPU_KVCACHE_SPACE=2 benchmarks/cache/vllm/bin/vllm serve DIR \\
        --dtype bfloat16 --enforce-eager --max-model-len 4096 --port 8100
    QWEN_VLLM=http://127.0.0.1:8100 QWEN_VLLM_MODEL=DIR python -m pytest tests/remote/test_vllm.py

`make vllm` sets it up. Without QWEN_VLLM_MODEL it must serve server/models/qwen-mini.
"""

import asyncio
import json
import os
import re
from collections.abc import Iterator

import httpx
import jsonschema
import openai
import pytest

from server.config import Settings
from tests.contract.strict import assert_is
from tests.faults.conftest import endless
from tests.live.test_clients_at_once import until
from tests.remote.scenario import HAPPY, SAD, SCENARIO, SCHEMA
from tests.servers import LiveServer, run_live

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif("QWEN_VLLM" not in os.environ, reason="QWEN_VLLM names no vLLM"),
]
URL = os.environ.get("QWEN_VLLM", "")
BOUND_S = 300


@pytest.fixture(scope="module")
def real_front() -> Iterator[LiveServer]:
    model = os.environ.get("QWEN_VLLM_MODEL", "mini")
    with run_live(Settings(model=model, engine=URL, ui=False)) as server:
        yield server


def ask(server: LiveServer, name: str) -> httpx.Response:
    path, body = SCENARIO[name]
    changes = {"model": server.model} if "model" in body else {}
    return httpx.post(server.url + path, json={**body, **changes}, timeout=BOUND_S)


@pytest.mark.parametrize("name", SCENARIO)
def test_everything_is_answered(real_front: LiveServer, name: str) -> None:
    response = ask(real_front, name)
    assert response.status_code == 200, response.text


def test_moods_are_judged(real_front: LiveServer) -> None:
    labels = [each["label"] for each in ask(real_front, "classify").json()["data"]]
    assert labels[:2] == ["negative", "positive"]


def test_replies_have_openais_shape(real_front: LiveServer) -> None:
    for name in ("sad", "logprobs", "choices", "tool"):
        own = frozenset({"sentiment"})
        assert_is(openai.types.chat.ChatCompletion, ask(real_front, name).json(), own)


def test_formats_are_kept(real_front: LiveServer) -> None:
    [choice] = ask(real_front, "json").json()["choices"]
    if choice["finish_reason"] == "stop":
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    [call] = ask(real_front, "tool").json()["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["word"] in ("left", "right")
    assert ask(real_front, "extract").json()["data"][0]["items"]


def test_a_stream_sends_the_mood_before_the_text(real_front: LiveServer) -> None:
    client = openai.OpenAI(base_url=real_front.base_url, api_key="unused")
    for text, label in ((SAD, "negative"), (HAPPY, "positive")):
        first, *rest = client.chat.completions.create(
            model=real_front.model, messages=[{"role": "user", "content": text}],
            temperature=0, max_tokens=8, stream=True,
        )  # fmt: skip
        assert (first.model_extra or {})["sentiment"]["label"] == label
        assert "".join(chunk.choices[0].delta.content or "" for chunk in rest)


def num_running_there() -> float:
    metrics = httpx.get(f"{URL}/metrics").text
    found = re.search(r"^vllm:num_requests_running\{.*\} (\S+)$", metrics, re.M)
    assert found
    return float(found[1])


@pytest.mark.parametrize("stream", [True, False])
async def test_a_disconnect_ends_the_request_in_vllm(real_front: LiveServer, stream: bool) -> None:
    url = f"{real_front.base_url}/chat/completions"
    async with httpx.AsyncClient(timeout=BOUND_S) as client:
        asking = asyncio.create_task(
            client.post(url, json=endless(real_front, stream=stream, max_tokens=1000))
        )
        await until(lambda: num_running_there() == 1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: num_running_there() == 0)
