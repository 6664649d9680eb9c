"""Every error: status, OpenAI's format, the field, and the remedy."""

import socket
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from server.config import Settings
from server.protocol.messages import MAX_MESSAGES
from tests.servers import LiveServer

LONG = "word " * 2000

USER = [{"role": "user", "content": "hi"}]


def assert_error(
    response: httpx.Response, status: int, kind: str, param: str | None, code: str | None = None
) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == (kind, param, code)
    message: str = error["message"]
    return message


def chat(live: LiveServer, **changes: Any) -> httpx.Response:
    request = {"model": live.model, "messages": USER, "max_tokens": 4, **changes}
    return httpx.post(f"{live.base_url}/chat/completions", json=request, timeout=60)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": USER * (MAX_MESSAGES + 1)}, "messages"),
        ({"messages": [{"role": "pirate", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"seed": "x"}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop[0]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"sentiment": 0}, "sentiment"),
    ],
)
def test_a_wrong_value_is_named(tiny: LiveServer, changes: dict[str, Any], param: str) -> None:
    message = assert_error(chat(tiny, **changes), 400, "invalid_request_error", param)
    assert param in message


@pytest.mark.parametrize(
    ("path", "param"),
    [("v1/responses", "input"), ("v1/decisions", "input"), ("tokenize", "messages")],
)
def test_too_long_a_conversation_is_refused_at_every_route(
    tiny: LiveServer, path: str, param: str
) -> None:
    body = {
        "model": tiny.model,
        "questions": [{"type": "predicate", "instructions": "Is it long?"}],
        param: USER * (MAX_MESSAGES + 1),
    }
    response = httpx.post(f"{tiny.url}/{path}", json=body)
    message = assert_error(response, 400, "invalid_request_error", param)
    assert str(MAX_MESSAGES) in message


def test_a_known_parameter_that_is_not_honoured_is_refused(tiny: LiveServer) -> None:
    message = assert_error(
        chat(tiny, functions=[{}]),
        400,
        "invalid_request_error",
        "functions",
        "unsupported_parameter",
    )
    assert "functions" in message


def test_neutral_values_odd_fields_and_nulls_are_accepted(tiny: LiveServer) -> None:
    response = chat(
        tiny, n=1, tools=[], logprobs=False, user="me", store=True, stop=None, made_up={"a": 1}
    )
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b"null", b"\xff\xfe\x00", b"{" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(tiny: LiveServer, content: bytes) -> None:
    response = httpx.post(f"{tiny.base_url}/chat/completions", content=content)
    assert_error(response, 400, "invalid_request_error", None)


def test_a_lone_surrogate_is_refused(tiny: LiveServer) -> None:
    content = b'{"model": "\\ud800", "messages": [{"role": "user", "content": "hi"}]}'
    response = httpx.post(f"{tiny.base_url}/chat/completions", content=content)
    assert "surrogate" in assert_error(response, 400, "invalid_request_error", None)


def test_a_missing_field_is_named(tiny: LiveServer) -> None:
    response = httpx.post(f"{tiny.base_url}/chat/completions", json={"model": tiny.model})
    assert_error(response, 400, "invalid_request_error", "messages")


def test_an_unknown_model_is_refused_with_the_known_ones(tiny: LiveServer) -> None:
    message = assert_error(
        chat(tiny, model="gpt-5"), 404, "invalid_request_error", "model", "model_not_found"
    )
    assert tiny.model in message
    response = httpx.get(f"{tiny.base_url}/models/gpt-5")
    assert_error(response, 404, "invalid_request_error", "model", "model_not_found")


def test_unknown_routes_and_wrong_methods_are_json_too(tiny: LiveServer) -> None:
    response = httpx.get(f"{tiny.url}/chat/completions")
    message = assert_error(response, 404, "invalid_request_error", None, "unknown_url")
    assert message.endswith("/v1.")  # what a client's base URL lacks
    response = httpx.get(f"{tiny.base_url}/chat/completions")
    assert_error(response, 405, "invalid_request_error", None, "method_not_allowed")
    assert "POST" in response.headers["allow"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(
    tiny: LiveServer, stream: bool
) -> None:
    messages = [{"role": "user", "content": "word " * 2000}]
    response = chat(tiny, messages=messages, stream=stream)
    message = assert_error(
        response, 400, "invalid_request_error", "messages", "context_length_exceeded"
    )
    assert str(tiny.services.max_context) in message


@pytest.mark.parametrize(
    ("given", "param"),
    [(LONG, "input"), ([LONG], "input[0]"), (["ok", LONG], "input[1]")],
    ids=["alone", "first", "second"],
)
def test_a_text_too_long_to_classify_is_refused_by_its_name(
    tiny: LiveServer, given: str | list[str], param: str
) -> None:
    response = httpx.post(f"{tiny.base_url}/classify", json={"input": given})
    error = assert_error(response, 400, "invalid_request_error", param, "context_length_exceeded")
    assert f"shorten {param}." in error


def test_labels_that_do_not_fit_after_the_text_are_refused(tiny: LiveServer) -> None:
    labels = [f"{i} {'a ' * 25}" for i in range(15)]
    body = {"input": "x " * 200, "instructions": "which?", "labels": labels}
    response = httpx.post(f"{tiny.base_url}/classify", json=body)
    assert_error(response, 400, "invalid_request_error", "input", "context_length_exceeded")


def test_a_label_too_long_for_a_step_is_refused(tiny: LiveServer) -> None:
    body = {"input": "x", "instructions": "which?", "labels": ["a " * 100, "b"]}
    response = httpx.post(f"{tiny.base_url}/classify", json=body)
    message = assert_error(response, 400, "invalid_request_error", "labels")
    assert "at most 64" in message


def test_a_text_of_every_private_use_character_is_no_500(tiny: LiveServer) -> None:
    body = {"input": "".join(map(chr, range(0xE000, 0xF900)))}
    response = httpx.post(f"{tiny.base_url}/classify", json=body)
    assert_error(response, 400, "invalid_request_error", "input")


@pytest.mark.parametrize(
    ("request_body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["ok", " "]}, "input[1]"),
        ({"input": 3}, "input"),
        ({"input": "x", "task": "astrology"}, "task"),
        ({"input": "x", "labels": ["a", "b"]}, "instructions"),
        ({"input": "x", "instructions": "say a or b"}, "labels"),
        ({"input": "x", "instructions": "i", "labels": ["a"]}, "labels"),
        ({"input": "x", "instructions": "i", "labels": ["a", "a"]}, "labels"),
        ({"input": "x", "task": "sentiment", "instructions": "i", "labels": ["a", "b"]}, "task"),
    ],
)
def test_wrong_classify_requests_are_named(
    tiny: LiveServer, request_body: dict[str, Any], param: str
) -> None:
    response = httpx.post(f"{tiny.base_url}/classify", json=request_body)
    assert_error(response, 400, "invalid_request_error", param)


@pytest.fixture(scope="module")
def guarded(tiny_checkpoint: Any, serve: Any) -> Any:
    settings = Settings(
        model=str(tiny_checkpoint),
        api_key=(SecretStr("secret-one"), SecretStr("secret-two")),
        max_body_bytes=2000,
    )
    with serve(settings) as server:
        yield server


@pytest.mark.parametrize(
    "value", [None, "Bearer", "Bearer wrong", "Bearer secret", "Basic secret-one", "secret-one"]
)
def test_without_the_right_key_nothing_but_health_answers(
    guarded: LiveServer, value: str | None
) -> None:
    headers = {"authorization": value} if value else {}
    for path in ("/v1/models", "/v1/chat/completions", "/nowhere"):
        response = httpx.get(guarded.url + path, headers=headers)
        assert_error(response, 401, "authentication_error", None, "invalid_api_key")
    assert httpx.get(f"{guarded.url}/health", headers=headers).status_code == 200


@pytest.mark.parametrize("key", ["secret-one", "secret-two"])
def test_every_key_opens_the_api(guarded: LiveServer, key: str) -> None:
    headers = {"authorization": f"Bearer {key}"}
    assert httpx.get(f"{guarded.base_url}/models", headers=headers).status_code == 200


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_over_the_limit_is_refused(guarded: LiveServer, is_announced: bool) -> None:
    content = b"x" * 3000
    response = httpx.post(
        f"{guarded.base_url}/chat/completions",
        headers={"authorization": "Bearer secret-one"},
        content=content if is_announced else iter([content]),
    )
    assert_error(response, 413, "invalid_request_error", None)


def test_a_body_that_is_announced_too_large_is_refused_before_it_arrives(tiny: LiveServer) -> None:
    host, port = tiny.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        length = Settings().max_body_bytes + 1
        head = f"POST /v1/classify HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.makefile("rb").readline().startswith(b"HTTP/1.1 413 ")


def test_an_exception_in_the_engine_is_a_500_that_is_not_retried(tiny: LiveServer) -> None:
    def explode(*args: Any) -> Any:
        raise RuntimeError("broken on purpose")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.engine._runner, "step", explode)
        response = chat(tiny, sentiment=False)
        assert_error(response, 500, "server_error", None)
        assert response.headers["x-should-retry"] == "false"
        assert "on purpose" not in response.text
    assert chat(tiny).status_code == 200


def test_an_exception_in_a_stream_is_an_error_event_and_done(tiny: LiveServer) -> None:
    runner = tiny.engine._runner
    step, calls = runner.step, []

    def explode_later(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("broken on purpose")
        return step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "step", explode_later)
        response = chat(tiny, stream=True, sentiment=False, max_tokens=50)
    events = response.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert '"error"' in events[-2]
    assert "on purpose" not in response.text
    assert chat(tiny).status_code == 200


def test_a_failing_sentiment_pass_does_not_fail_the_chat(tiny: LiveServer) -> None:
    async def explode(*args: Any) -> Any:
        raise RuntimeError("broken on purpose")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.engine, "score", explode)
        response = chat(tiny, messages=[{"role": "user", "content": "a text never judged"}])
    assert response.status_code == 200, response.text
    assert response.json()["sentiment"] is None
