"""Every response and every chunk against the openai package's types."""

import json
from typing import Any

import httpx
import pytest
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.contract.strict import assert_is
from tests.servers import LiveServer

SENTIMENT = frozenset({"sentiment"})
USER = [{"role": "user", "content": "我今天考试通过了！"}]

CHATS: list[dict[str, Any]] = [
    {},
    {"n": 3},
    {"logprobs": True, "top_logprobs": 2},
    {"stop": ["的", "a"]},
    {"sentiment": False},
    {"messages": [*USER, {"role": "assistant", "content": "Well, "}]},
]


def post(live: LiveServer, path: str, **body: Any) -> httpx.Response:
    response = httpx.post(f"{live.base_url}{path}", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response


def chat(live: LiveServer, **changes: Any) -> httpx.Response:
    body = {"model": live.model, "messages": USER, "max_tokens": 24, "seed": 5, **changes}
    return post(live, "/chat/completions", **body)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The contents of the events; the last event is [DONE]."""
    *blocks, rest = response.content.decode().split("\n\n")
    assert rest == ""
    data = [block.removeprefix("data: ") for block in blocks]
    assert data.pop() == "[DONE]"
    return [json.loads(line) for line in data]


@pytest.mark.parametrize("changes", CHATS, ids=lambda c: next(iter(c), "plain"))
def test_a_chat_completion_is_valid(tiny: LiveServer, changes: dict[str, Any]) -> None:
    assert_is(ChatCompletion, chat(tiny, **changes).json(), SENTIMENT)


@pytest.mark.parametrize("changes", CHATS, ids=lambda c: next(iter(c), "plain"))
def test_every_chunk_of_a_chat_is_valid(tiny: LiveServer, changes: dict[str, Any]) -> None:
    chunks = events(chat(tiny, stream=True, stream_options={"include_usage": True}, **changes))
    assert len(chunks) > 3
    for i, chunk in enumerate(chunks):
        assert_is(ChatCompletionChunk, chunk, SENTIMENT if i == 0 else frozenset())


def test_a_model_is_valid(tiny: LiveServer) -> None:
    listed = httpx.get(f"{tiny.base_url}/models").json()
    assert set(listed) == {"object", "data"}
    for model in listed["data"]:
        assert_is(Model, model, frozenset({"parent", "context_length", "capabilities", "tasks"}))
