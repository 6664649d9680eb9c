"""A server with adapters of every kind: chosen by the model's id, or by a task's file."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig

from server.config import Settings
from server.core.engine.checkpoint import CheckpointError
from server.loading import load_services
from tests.core.engine.model.test_adapters import save_adapter
from tests.live.test_chat import chunks_of, text_of
from tests.live.test_examples import output_of
from tests.servers import LiveServer

OF_LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
CONFIGS: dict[str, Callable[[], Any]] = {
    "poet": lambda: LoraConfig(**OF_LM, r=4, lora_alpha=64, target_modules="all-linear"),
    "clerk": lambda: PromptTuningConfig(**OF_LM, num_virtual_tokens=6),
    "v1.2_x-y": lambda: PrefixTuningConfig(**OF_LM, num_virtual_tokens=9),
}
MESSAGES = [{"role": "user", "content": "今天下雨了"}]
TASKS = """
[weather]
instructions = "What is the weather like?"
[[weather.labels]]
value = "fair"
text = "good"
[[weather.labels]]
value = "foul"
text = "bad"

[weather_poet]
instructions = "What is the weather like?"
adapter = "poet"
labels = [{ value = "fair", text = "good" }, { value = "foul", text = "bad" }]

[weather_clerk]
instructions = "What is the weather like?"
adapter = "clerk"
labels = [{ value = "fair", text = "good" }, { value = "foul", text = "bad" }]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def oracles(tiny_checkpoint: Path, folder: Path) -> dict[str, PeftModel]:
    """peft's models, by the names of the adapters; their folders are made on the way."""
    return {
        name: save_adapter(tiny_checkpoint, make(), folder / name) for name, make in CONFIGS.items()
    }


@pytest.fixture(scope="module")
def server(
    tiny_checkpoint: Path,
    folder: Path,
    oracles: dict[str, PeftModel],
    serve: Callable[[Settings], AbstractContextManager[LiveServer]],
) -> Iterator[LiveServer]:
    (folder / "tasks.toml").write_text(TASKS, encoding="utf-8")
    adapters = tuple(f"{name}={folder / name}" for name in oracles)
    settings = Settings(model=str(tiny_checkpoint), adapter=adapters, tasks=folder / "tasks.toml")
    with serve(settings) as server:
        yield server


def post(server: LiveServer, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.base_url}/{path}", json=body, timeout=60)


def chat(server: LiveServer, name: str = "", **changes: Any) -> httpx.Response:
    """Of an adapter, or of the base model."""
    body = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0, "logprobs": True}
    model = server.model + (f":{name}" if name else "")
    return post(server, "chat/completions", **{**body, "model": model, **changes})


def choice_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def classify(server: LiveServer, task: str, **body: Any) -> httpx.Response:
    return post(server, "classify", **{"input": MESSAGES[0]["content"], "task": task, **body})


def test_the_models_list_has_every_adapter_with_its_parent(server: LiveServer) -> None:
    models = httpx.get(f"{server.base_url}/models").json()["data"]
    ids = [server.model, *(f"{server.model}:{name}" for name in CONFIGS)]
    assert [model["id"] for model in models] == [
        f"{each}{suffix}" for each in ids for suffix in ("", ":plain")
    ]
    parents = [model["parent"] for model in models]
    assert parents == [None] * 2 + [server.model] * 6
    # Virtual tokens take room.
    room = [512 - model["context_length"] for model in models[::2]]
    assert room == [0, 0, 6, 9]
    assert all(
        httpx.get(f"{server.base_url}/models/{model['id']}").json() == model for model in models
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_chat_is_answered_by_the_adapter_it_names(
    server: LiveServer, oracles: dict[str, PeftModel], name: str
) -> None:
    prompt_ids = server.services.tokenizer.encode_chat(MESSAGES)
    with torch.inference_mode():
        logits = oracles[name](input_ids=torch.tensor([prompt_ids])).logits[0, -1]
    [first, *_] = choice_of(chat(server, f"{name}:plain"))["logprobs"]["content"]
    likeliest = logits[: server.services.tokenizer.vocab_size].log_softmax(-1).max().item()
    assert first["logprob"] == pytest.approx(likeliest, abs=1e-4)
    base = choice_of(chat(server, "plain"))["logprobs"]["content"]
    assert first["logprob"] != pytest.approx(base[0]["logprob"], abs=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_stream_and_whole_reply_of_an_adapter_are_one_text(server: LiveServer, name: str) -> None:
    whole = chat(server, name)
    streamed = chat(server, name, stream=True)
    assert text_of(chunks_of(streamed)) == choice_of(whole)["message"]["content"]
    assert whole.json()["model"] == f"{server.model}:{name}"
    # The mood is judged on the base model.
    assert whole.json()["sentiment"]["score"] == chat(server).json()["sentiment"]["score"]
    assert chat(server, f"{name}:plain").json()["sentiment"] is None


@pytest.mark.parametrize("name", CONFIGS)
def test_the_other_routes_that_write_take_adapters_too(server: LiveServer, name: str) -> None:
    model = f"{server.model}:{name}:plain"
    prompt_ids = server.services.tokenizer.encode_chat(MESSAGES)
    of_chat = choice_of(chat(server, f"{name}:plain"))["message"]["content"]
    raw = post(
        server, "completions", model=model, prompt=prompt_ids, max_tokens=12, temperature=0, n=2
    )
    assert [choice["text"] for choice in raw.json()["choices"]] == [of_chat] * 2
    body = {"input": MESSAGES, "max_output_tokens": 12, "temperature": 0}
    response = post(server, "responses", model=model, **body).json()
    assert response["output"][0]["content"][0]["text"] == of_chat


def test_concurrent_requests_equal_those_alone(server: LiveServer) -> None:
    names = ["plain", *(f"{name}:plain" for name in CONFIGS)]
    tasks = ["weather", "weather_poet", "weather_clerk"]

    def ask(i: int) -> list[float]:
        if i % 5 == 4:
            response = classify(server, tasks[i % 3], input=f"text {i}")
            return [each["probability"] for each in response.json()["data"][0]["probabilities"]]
        messages = [{"role": "user", "content": f"question {i} " * (i + 1)}]
        choice = choice_of(chat(server, names[i % 4], messages=messages, max_tokens=4))
        return [each["logprob"] for each in choice["logprobs"]["content"]]

    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(ask, range(20)))
    for i, found in enumerate(together):
        assert found == pytest.approx(ask(i), abs=1e-3)


def test_a_task_is_judged_with_the_adapter_that_its_file_names(server: LiveServer) -> None:
    tasks = ("weather", "weather_poet", "weather_clerk")
    found = [classify(server, task).json()["data"][0]["confidence"] for task in tasks]
    assert len(set(found)) == 3
    prompts = [
        classify(server, task, input="x" * 50).json()["usage"]["prompt_tokens"] for task in tasks
    ]
    assert len(set(prompts)) == 1  # virtual tokens do not count as input


def test_virtual_tokens_reduce_the_context(server: LiveServer) -> None:
    prompt_ids = [5] * 505
    for name, status in (("poet", 200), ("clerk", 200), ("v1.2_x-y", 400)):
        model = f"{server.model}:{name}"
        response = post(server, "completions", model=model, prompt=prompt_ids, max_tokens=20)
        assert response.status_code == status
    assert "maximum context length is 503" in response.json()["error"]["message"]


def test_the_example_asks_the_model_and_each_adapter(server: LiveServer) -> None:
    output = output_of(server.base_url, "adapters")
    assert output.startswith(f"{server.model} (base model): ")
    for name in CONFIGS:
        assert f"\n{server.model}:{name} (adapter of {server.model}): " in output
    assert ":plain" not in output


@pytest.mark.parametrize("suffix", [":none", ":plain:poet", ":poet:", ":", ":poet:clerk"])
def test_a_missing_adapter_is_an_unknown_model(server: LiveServer, suffix: str) -> None:
    response = chat(server, model=server.model + suffix)
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["code"] == "model_not_found" and f"'{server.model}:poet'" in error["message"]


def test_routes_that_judge_refuse_an_adapter(server: LiveServer) -> None:
    model = f"{server.model}:poet"
    questions = [{"type": "predicate", "instructions": "Is it?"}]
    for response in (
        classify(server, "weather", model=model),
        post(server, "extract", model=model, input="x"),
        post(server, "decisions", model=model, input="x", questions=questions),
    ):
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == "model"


def test_a_task_whose_adapter_is_missing_stops_the_start(
    tiny_checkpoint: Path, folder: Path, server: LiveServer
) -> None:
    settings = Settings(model=str(tiny_checkpoint), tasks=folder / "tasks.toml")
    with pytest.raises(CheckpointError, match=r"names the adapter 'poet'.*--adapter poet=FOLDER"):
        load_services(settings)


def test_virtual_tokens_that_fill_the_context_stop_the_start(
    tiny_checkpoint: Path, folder: Path, server: LiveServer
) -> None:
    adapter = (f"clerk={folder / 'clerk'}",)
    settings = Settings(model=str(tiny_checkpoint), adapter=adapter, max_context=7)
    with pytest.raises(CheckpointError, match="virtual tokens of the adapter 'clerk'"):
        load_services(settings)
