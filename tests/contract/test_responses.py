"""/v1/responses: shapes, the order of events, and the client's own helpers."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from tests.contract.strict import assert_is
from tests.servers import LiveServer

OURS = frozenset({"sentiment"})
OURS_IN_EVENTS = frozenset({"response.sentiment"})
CLOCK = {"type": "function", "name": "clock", "parameters": {"additionalProperties": False}}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "is_glad": {"type": "boolean"}},
    "required": ["name", "is_glad"],
    "additionalProperties": False,
}
AS_PERSON = {"format": {"type": "json_schema", "name": "person", "schema": PERSON}}
CALL_CLOCK = {"tools": [CLOCK], "tool_choice": "required", "parallel_tool_calls": False}
ALLOWED_CLOCK = {
    "type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]
}  # fmt: skip

CASES: list[dict[str, Any]] = [
    {},
    {"instructions": "Be brief."},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]},
    {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    {"text": AS_PERSON, "max_output_tokens": 150},
    {"max_output_tokens": 2},
    {**CALL_CLOCK, "max_output_tokens": 100},
    {**CALL_CLOCK, "tool_choice": ALLOWED_CLOCK, "max_output_tokens": 100},
    {"sentiment": False},
    {"metadata": {"a": "b"}, "user": "me", "store": True},
]


def post(live: LiveServer, **changes: Any) -> httpx.Response:
    body = {"model": live.model, "input": "我升职了！", "max_output_tokens": 24, "seed": 3}
    return httpx.post(f"{live.base_url}/responses", json={**body, **changes}, timeout=60)


def respond(live: LiveServer, **changes: Any) -> dict[str, Any]:
    response = post(live, **changes)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


def events_of(live: LiveServer, **changes: Any) -> list[dict[str, Any]]:
    response = post(live, stream=True, **changes)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert b"\r" not in response.content
    *blocks, rest = response.content.decode().split("\n\n")
    assert rest == ""
    events = []
    for block in blocks:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def without_ids(value: Any) -> Any:
    """What two answers to one request have in common."""
    if isinstance(value, dict):
        own = ("id", "call_id", "created_at", "cached", "cached_tokens", "cache_write_tokens")
        return {key: without_ids(item) for key, item in value.items() if key not in own}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


# --- shapes ---------------------------------------------------------------------------


@pytest.mark.parametrize("changes", CASES, ids=lambda c: next(iter(c), "plain"))
def test_a_response_is_valid(tiny: LiveServer, changes: dict[str, Any]) -> None:
    assert_is(Response, respond(tiny, **changes), OURS)


@pytest.mark.parametrize("changes", CASES, ids=lambda c: next(iter(c), "plain"))
def test_the_events_come_in_order_and_end_with_the_whole(
    tiny: LiveServer, changes: dict[str, Any]
) -> None:
    events = events_of(tiny, **changes)
    for event in events:
        assert_is(ResponseStreamEvent, event, OURS_IN_EVENTS)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    last = events[-1]["response"]
    assert kinds[:3] == ["created", "in_progress", "output_item.added"]
    assert kinds[-2:] == ["output_item.done", last["status"]]
    assert without_ids(last) == without_ids(respond(tiny, **changes))
    for index, item in enumerate(last["output"]):
        own = [event for event in events if event.get("output_index") == index]
        inner = [event["type"].removeprefix("response.") for event in own]
        deltas = "".join(event.get("delta", "") for event in own)
        assert own[-1]["item"] == item
        if item["type"] == "message":
            assert inner[:2] == ["output_item.added", "content_part.added"]
            assert inner[-3:] == ["output_text.done", "content_part.done", "output_item.done"]
            assert set(inner[2:-3]) <= {"output_text.delta"}
            assert deltas == item["content"][0]["text"] == own[-3]["text"]
        else:
            assert inner[0] == "output_item.added"
            assert inner[-2:] == ["function_call_arguments.done", "output_item.done"]
            assert set(inner[1:-2]) <= {"function_call_arguments.delta"}
            assert deltas == item["arguments"] == own[-2]["arguments"]


def test_the_sentiment_is_in_the_response_and_precedes_any_text(tiny: LiveServer) -> None:
    response = post(tiny)
    assert response.json()["sentiment"]["label"] == response.headers["x-sentiment"]
    first = events_of(tiny)[0]
    assert first["response"]["sentiment"]["label"] == response.headers["x-sentiment"]
    assert post(tiny, sentiment=False).json()["sentiment"] is None
    assert post(tiny, model=f"{tiny.model}:plain").json()["sentiment"] is None


def test_a_reply_that_is_cut_off_is_incomplete(tiny: LiveServer) -> None:
    response = respond(tiny, max_output_tokens=2)
    assert response["status"] == response["output"][-1]["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["usage"]["output_tokens"] == 2


def test_every_token_of_a_text_has_its_log_probability(tiny: LiveServer) -> None:
    """Also those whose text is held back, for it might begin a call."""
    less_than = tiny.services.tokenizer.encode_text("<")[0]
    tools = [{"type": "function", "name": "f"}]
    response = respond(
        tiny, tools=tools, include=["message.output_text.logprobs"], logit_bias={less_than: 12}
    )
    [part] = response["output"][0]["content"]
    assert "<" in part["text"]
    assert len(part["logprobs"]) == response["usage"]["output_tokens"] == 24
    written = b"".join(bytes(entry["bytes"]) for entry in part["logprobs"])
    assert written.decode(errors="ignore") == part["text"]


def test_instructions_are_the_system_message(tiny: LiveServer) -> None:
    as_item = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    one = respond(tiny, input="Hi", instructions="Be brief.", temperature=0)
    other = respond(tiny, input=as_item, temperature=0)
    assert without_ids(one["output"]) == without_ids(other["output"])


def test_a_schema_is_always_fitted(tiny: LiveServer) -> None:
    response = respond(tiny, text=AS_PERSON, max_output_tokens=150, temperature=1.3)
    [item] = response["output"]
    jsonschema.validate(json.loads(item["content"][0]["text"]), PERSON)


def test_calls_and_their_results_may_be_sent_back(tiny: LiveServer) -> None:
    first = respond(tiny, **CALL_CLOCK, max_output_tokens=100)
    [call] = first["output"]
    assert (call["type"], call["name"], json.loads(call["arguments"])) == (
        "function_call", "clock", {},
    )  # fmt: skip
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "noon"}
    said = [{"role": "user", "content": "What time is it?"}, call, result]
    response = respond(tiny, input=said, tools=[CLOCK], sentiment=False)
    assert response["output"]


@pytest.mark.parametrize(
    "changes",
    [
        {"text": AS_PERSON},
        {"text": {"format": {"type": "json_object"}, "verbosity": "medium"}},
        {"text": {"format": {"type": "text"}}},
        {"tools": [CLOCK, {"type": "function", "name": "f", "description": "d", "strict": True}]},
        {"tools": [CLOCK], "tool_choice": {"type": "function", "name": "clock"}},
        {"tools": [CLOCK], "tool_choice": ALLOWED_CLOCK},
        {"tools": [CLOCK], "tool_choice": "none"},
    ],
)
def test_tools_and_formats_are_repeated_as_they_were_sent(
    tiny: LiveServer, changes: dict[str, Any]
) -> None:
    response = respond(tiny, **changes, max_output_tokens=16)
    assert {name: response[name] for name in changes} == changes


def test_a_call_that_was_cut_may_be_sent_back(tiny: LiveServer) -> None:
    needs_name = {**CLOCK, "parameters": PERSON}
    for max_output_tokens in range(16, 60):
        first = respond(
            tiny, **{**CALL_CLOCK, "tools": [needs_name]}, max_output_tokens=max_output_tokens
        )
        [call] = first["output"]
        if call.get("arguments", "") not in ("", "{"):  # it has begun
            break
    assert first["status"] == call["status"] == "incomplete"
    with pytest.raises(json.JSONDecodeError):
        json.loads(call["arguments"])
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "cut"}
    for arguments in (call["arguments"], ""):
        said = [{"role": "user", "content": "?"}, {**call, "arguments": arguments}, result]
        assert respond(tiny, input=said, tools=[needs_name])["output"]


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"previous_response_id": "resp-1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "reasoning", "id": "r"}]}, "input[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "1"}]}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [CLOCK, {**CLOCK, "name": "a b"}]}, "tools[1].name"),
        ({"tools": [{**CLOCK, "parameters": []}]}, "tools[0].parameters"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tools": [CLOCK], "tool_choice": {**ALLOWED_CLOCK, "mode": "?"}}, "tool_choice.mode"),
        (
            {"tools": [CLOCK], "tool_choice": {**ALLOWED_CLOCK, "tools": [{"type": "function"}]}},
            "tool_choice.tools[0].name",
        ),
        ({"tool_choice": {**ALLOWED_CLOCK, "tools": [5]}}, "tool_choice.tools[0]"),
        ({"tool_choice": {"type": []}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice.tools"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}},
            "text.format",
        ),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"temperature": 3}, "temperature"),
    ],
)
def test_unsupported_fields_are_refused_by_name(
    tiny: LiveServer, changes: dict[str, Any], param: str
) -> None:
    response = post(tiny, **changes)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert f"'{param}'" in error["message"]


@pytest.mark.parametrize(
    "changes",
    [
        {"background": False},
        {"truncation": "disabled"},
        {"reasoning": {"effort": "none"}},
        {"reasoning": {"effort": None, "summary": None}},
        {"text": {"verbosity": "medium"}},
        {"include": ["reasoning.encrypted_content"]},
    ],
)
def test_neutral_values_are_accepted(tiny: LiveServer, changes: dict[str, Any]) -> None:
    assert post(tiny, **changes).status_code == 200


# --- the client's own helpers ---------------------------------------------------------


class Person(pydantic.BaseModel):
    """What the client parses an answer into."""

    is_glad: bool


@pytest.fixture
def client(tiny: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=tiny.base_url, api_key="unused") as client:
        yield client


def test_the_client_reads_text_and_sentiment(tiny: LiveServer, client: openai.OpenAI) -> None:
    response = client.responses.create(model=tiny.model, input="Hi", max_output_tokens=20)
    assert response.output_text
    assert (response.model_extra or {})["sentiment"]["label"]


def test_the_client_parses_a_response(tiny: LiveServer, client: openai.OpenAI) -> None:
    response = client.responses.parse(
        model=tiny.model, input="Hi", text_format=Person, max_output_tokens=50
    )
    assert isinstance(response.output_parsed, Person)


def test_the_client_streams_a_response(tiny: LiveServer, client: openai.OpenAI) -> None:
    with client.responses.stream(
        model=tiny.model, input="Hi", text_format=Person, max_output_tokens=50
    ) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.output_text == text
    assert isinstance(final.output_parsed, Person)
