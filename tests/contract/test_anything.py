"""For any request: an answer or a clear refusal, never a 500 and never an invalid body."""

import json
import logging
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.protocol import chat, completions, responses
from server.protocol.base import RequestBody
from server.protocol.chat import UNSUPPORTED, WITHOUT_EFFECT, ChatCompletionRequest
from server.protocol.completions import CompletionRequest
from server.protocol.responses import ResponsesRequest
from tests.servers import LiveServer
from tests.unit.test_protocol import LEAST

TEXT = st.text(max_size=12)
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        # JSON has no infinity.
        st.floats(allow_nan=False, allow_infinity=False),
        TEXT,
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=5,
)
PARAMETERS = sorted(
    {*ChatCompletionRequest.model_fields, *UNSUPPORTED, *WITHOUT_EFFECT, "made_up"}
    - {"model", "messages", "max_tokens", "max_completion_tokens"}
)
# Values that are right, or nearly.
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(-0.5, 2.5),
    "top_p": st.floats(-0.1, 1.1),
    "min_p": st.floats(-0.1, 1.1),
    "top_k": st.integers(-2, 20_000),
    "n": st.integers(-1, 4),
    "seed": st.integers(-(2**65), 2**65),
    "stop": st.one_of(TEXT, st.lists(TEXT, max_size=5)),
    "frequency_penalty": st.floats(-3, 3),
    "presence_penalty": st.floats(-3, 3),
    "repetition_penalty": st.floats(-0.5, 2.5),
    "logit_bias": st.dictionaries(st.integers(-1, 17_000).map(str), st.floats(-120, 120)),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(-1, 22),
    "stream": st.booleans(),
    "sentiment": st.booleans(),
    "response_format": st.sampled_from(
        [{"type": "text"}, {"type": "json_object"}, {"type": "json_schema"}, {}]
    ),
    "tools": st.lists(
        st.builds(lambda name: {"type": "function", "function": {"name": name}}, TEXT), max_size=2
    ),
    "tool_choice": st.sampled_from(["none", "auto", "required", "never", {"type": "function"}]),
}
MESSAGES = st.lists(
    st.one_of(
        st.builds(
            lambda role, content: {"role": role, "content": content},
            st.sampled_from(["system", "developer", "user", "assistant", "tool", "robot"]),
            st.one_of(TEXT, st.none(), st.lists(
                st.builds(lambda text: {"type": "text", "text": text}, TEXT), max_size=2)),
        ),
        JSON,
    ),
    max_size=4,
)  # fmt: skip


@st.composite
def chats(draw: st.DrawFn) -> dict[str, Any]:
    """A chat with a few parameters, most of them nearly right."""
    names = draw(st.lists(st.sampled_from(PARAMETERS), max_size=4, unique=True))
    body = {name: draw(st.one_of(LIKELY.get(name, JSON), JSON)) for name in names}
    user = [{"role": "user", "content": draw(TEXT)}]
    return {**body, "messages": draw(st.one_of(st.just(user), MESSAGES)), "max_tokens": 2}


def assert_sound(response: httpx.Response) -> None:
    assert response.status_code in (200, 400), (response.status_code, response.text)
    if response.status_code == 400:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"] and error["type"] == "invalid_request_error"
    elif response.headers["content-type"].startswith("text/event-stream"):
        *blocks, rest = response.content.decode().split("\n\n")
        assert rest == ""
        for block in blocks:
            data = block.split("data: ", 1)[1]
            assert data == "[DONE]" or "error" not in json.loads(data)
    else:
        assert response.json()["id"]


anything = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@anything
@given(body=chats())
def test_any_chat_is_answered_or_refused(tiny: LiveServer, body: dict[str, Any]) -> None:
    url = f"{tiny.base_url}/chat/completions"
    assert_sound(httpx.post(url, json={"model": tiny.model, **body}, timeout=60))


@anything
@given(
    path=st.sampled_from(
        ["chat/completions", "completions", "responses", "classify", "extract", "decisions"]
    ),
    body=st.one_of(
        JSON,
        st.dictionaries(
            st.sampled_from(["messages", "prompt", "input", "questions", "labels", "task"]), JSON
        ),
    ),
)
def test_any_json_is_answered_or_refused(tiny: LiveServer, path: str, body: Any) -> None:
    if isinstance(body, dict):
        body = {"model": tiny.model, "max_tokens": 2, "max_output_tokens": 2, **body}
    response = httpx.post(f"{tiny.base_url}/{path}", json=body, timeout=60)
    assert response.status_code in (200, 400), (response.status_code, response.text)
    json.loads(response.content)


@anything
@given(body=st.binary(max_size=40))
def test_any_bytes_are_refused(tiny: LiveServer, body: bytes) -> None:
    response = httpx.post(f"{tiny.base_url}/chat/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("kind", "without_effect"),
    [
        (ChatCompletionRequest, chat.WITHOUT_EFFECT),
        (CompletionRequest, completions.WITHOUT_EFFECT),
        (ResponsesRequest, responses.WITHOUT_EFFECT),
    ],
)
def test_unknown_parameters_are_listed_once_and_known_ones_never(
    kind: type[RequestBody], without_effect: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="server"):
        kind.parse(json.dumps({**LEAST[kind], **dict.fromkeys(without_effect, "x")}).encode())
        assert not caplog.records
        kind.parse(json.dumps({**LEAST[kind], "made_up": 1, "made_too": 2}).encode())
    [record] = caplog.records
    assert "made_up" in record.getMessage() and "made_too" in record.getMessage()
