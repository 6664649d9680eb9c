"""JSON, schemas and calls of tools: the output always fits, whole or streamed."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.contract.strict import assert_is
from tests.contract.test_shapes import SENTIMENT, chat, events
from tests.servers import LiveServer
from tests.unit.core.text.test_grammar import TOO_COMPLEX, schemas

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "北京"]}, "celsius": {"type": "boolean"}},
            "required": ["city", "celsius"],
            "additionalProperties": False,
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "mood": {"enum": ["good", "bad", "差"]},
        "ages": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 99},
            "maxItems": 3,
        },
    },
    "required": ["name", "mood", "ages"],
    "additionalProperties": False,
}
AS_PERSON = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}


NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def function(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    """A tool without description, or a choice that names it."""
    more = {} if parameters is None else {"parameters": parameters}
    return {"type": "function", "function": {"name": name, **more}}


def content_of(chunks: Iterable[dict[str, Any]]) -> str:
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)


# --- formats --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_schema_is_always_fitted(tiny: LiveServer, seed: int, temperature: float) -> None:
    changes = {"seed": seed, "temperature": temperature, "max_tokens": 200}
    [choice] = chat(tiny, response_format=AS_PERSON, **changes).json()["choices"]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), PERSON)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(schema=schemas(), seed=st.integers(0, 1000), is_stream=st.booleans())
def test_any_schema_is_fitted(
    tiny: LiveServer, schema: dict[str, Any], seed: int, is_stream: bool
) -> None:
    # It likes to end strings, lists and itself; else it would write random words for long.
    closing = [tiny.services.tokenizer.encode_text(text)[0] for text in ('"', "}", "]")]
    changes = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
        "logit_bias": {str(token_id): 8 for token_id in (*closing, 2)},
        "max_tokens": 400, "seed": seed, "sentiment": False,
    }  # fmt: skip
    if is_stream:
        chunks = events(chat(tiny, stream=True, **changes))
        text, end = content_of(chunks), chunks[-1]["choices"][0]
    else:
        [end] = chat(tiny, **changes).json()["choices"]
        text = end["message"]["content"]
    assert end["finish_reason"] == "stop"
    jsonschema.validate(json.loads(text), schema)


def test_a_stream_of_a_schema_equals_the_whole_reply(tiny: LiveServer) -> None:
    changes = {"response_format": AS_PERSON, "max_tokens": 200, "temperature": 1.0}
    [choice] = chat(tiny, **changes).json()["choices"]
    assert content_of(events(chat(tiny, stream=True, **changes))) == choice["message"]["content"]


def test_every_one_of_several_choices_fits(tiny: LiveServer) -> None:
    choices = chat(tiny, response_format=AS_PERSON, max_tokens=200, n=4).json()["choices"]
    texts = {choice["message"]["content"] for choice in choices}
    assert len(texts) > 1
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)


def test_a_json_object_that_is_cut_off_says_so(tiny: LiveServer) -> None:
    [choice] = chat(tiny, response_format={"type": "json_object"}, max_tokens=3).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith("{")


def test_plain_text_is_a_format_too(tiny: LiveServer) -> None:
    plain = chat(tiny, response_format={"type": "text"}).json()["choices"]
    assert plain == chat(tiny).json()["choices"]


def test_logprobs_are_sent_with_a_schema(tiny: LiveServer) -> None:
    changes = {"response_format": AS_PERSON, "logprobs": True, "top_logprobs": 20}
    [choice] = chat(tiny, max_tokens=200, **changes).json()["choices"]
    entries = choice["logprobs"]["content"]
    written = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert written.decode() == choice["message"]["content"]
    # What the schema rules out has no probability left.
    assert min(x["logprob"] for e in entries for x in e["top_logprobs"]) == -9999.0


@pytest.mark.parametrize(
    ("changes", "param", "word"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"not": {}}},
                }
            },
            "response_format",
            "not",
        ),
        (
            {"tools": [function("odd", {"not": {}})]},
            "tools",
            "odd",
        ),
    ],
)
def test_a_schema_that_cannot_be_guaranteed_is_refused(
    tiny: LiveServer, changes: dict[str, Any], param: str, word: str
) -> None:
    body = {"model": tiny.model, "messages": [{"role": "user", "content": "hi"}], **changes}
    response = httpx.post(f"{tiny.base_url}/chat/completions", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param and word in error["message"]


def test_a_schema_that_turns_out_too_complex_is_the_clients_to_change(tiny: LiveServer) -> None:
    too_complex = {"type": "json_schema", "json_schema": {"name": "a", "schema": TOO_COMPLEX}}
    body = {"model": tiny.model, "messages": [{"role": "user", "content": "hi"}]}
    url = f"{tiny.base_url}/chat/completions"
    whole = httpx.post(url, json={**body, "response_format": too_complex})
    assert whole.status_code == 400
    error = whole.json()["error"]
    assert error["type"] == "invalid_request_error" and "simpler" in error["message"]
    stream = httpx.post(url, json={**body, "response_format": too_complex, "stream": True})
    assert events(stream)[-1] == {"error": error}


# --- tools ----------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["required", function("get_weather")])
@pytest.mark.parametrize("seed", range(5))
def test_a_required_call_is_made_and_fits(tiny: LiveServer, choice: Any, seed: int) -> None:
    changes = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False}
    response = chat(tiny, max_tokens=200, seed=seed, temperature=1.2, **changes).json()
    assert_is(ChatCompletion, response, SENTIMENT)
    [answer] = response["choices"]
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] is None
    [call] = answer["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    jsonschema.validate(
        json.loads(call["function"]["arguments"]), WEATHER["function"]["parameters"]
    )


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_of_several_tools_only_the_allowed_ones_are_called(tiny: LiveServer, mode: str) -> None:
    allowed = {"mode": mode, "tools": [function("clock"), function("date")]}
    changes: dict[str, Any] = {
        "tools": [function(name, NO_PARAMETERS) for name in ("clock", "date", "weather")],
        "tool_choice": {"type": "allowed_tools", "allowed_tools": allowed},
        # Without an end it goes on to call.
        "logit_bias": {"0": -100, "2": -100},
        "max_tokens": 200,
    }
    response = chat(tiny, **changes).json()
    calls = response["choices"][0]["message"].get("tool_calls", [])
    if mode == "required":
        assert {call["function"]["name"] for call in calls} == {"clock", "date"}
    # The other tools are not in the prompt at all.
    fewer = chat(tiny, tools=changes["tools"][:2], max_tokens=1).json()
    assert response["usage"]["prompt_tokens"] == fewer["usage"]["prompt_tokens"]


def test_a_stream_of_calls_equals_the_whole_reply(tiny: LiveServer) -> None:
    changes = {"tools": [WEATHER, function("clock")], "tool_choice": "required", "max_tokens": 120}
    [whole] = chat(tiny, **changes).json()["choices"]
    chunks = events(chat(tiny, stream=True, **changes))
    for i, chunk in enumerate(chunks):
        assert_is(ChatCompletionChunk, chunk, SENTIMENT if i == 0 else frozenset())
    calls: list[dict[str, str]] = []
    for chunk in chunks:
        for call in chunk["choices"][0]["delta"].get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(calls) and call["type"] == "function"
                calls.append({"name": call["function"]["name"], "arguments": ""})
            calls[call["index"]]["arguments"] += call["function"]["arguments"]
    assert calls == [call["function"] for call in whole["message"]["tool_calls"]]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


@pytest.mark.parametrize("stop", ["<", "call", "city", '"', "}", "\n"])
def test_stop_strings_do_not_cut_a_call(tiny: LiveServer, stop: str) -> None:
    changes = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    [choice] = chat(tiny, max_tokens=200, stop=stop, **changes).json()["choices"]
    [call] = choice["message"]["tool_calls"]
    jsonschema.validate(
        json.loads(call["function"]["arguments"]), WEATHER["function"]["parameters"]
    )
    assert choice["finish_reason"] == "tool_calls"


def test_an_answer_in_json_may_quote_a_call(tiny: LiveServer) -> None:
    quoting = {"const": "a <tool_call> b </tool_call>"}
    changes = {
        "tools": [WEATHER],
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": quoting}},
        # It must be the answer and no call.
        "logit_bias": {str(tiny.services.tokenizer.encode_text('"')[0]): 100},
        "max_tokens": 60,
    }
    [choice] = chat(tiny, **changes).json()["choices"]
    assert json.loads(choice["message"]["content"]) == quoting["const"]
    chunks = events(chat(tiny, stream=True, **changes))
    assert content_of(chunks) == choice["message"]["content"]


def test_a_model_may_answer_with_text_unless_a_call_is_required(tiny: LiveServer) -> None:
    bias = {str(tiny.services.tokenizer.encode_text("<")[0]): -100}
    [choice] = chat(tiny, tools=[WEATHER], logit_bias=bias).json()["choices"]
    assert choice["message"]["content"]
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] in ("stop", "length")


def test_tools_that_must_not_be_called_are_not_in_the_prompt(tiny: LiveServer) -> None:
    with_none = chat(tiny, tools=[WEATHER], tool_choice="none").json()
    assert with_none["choices"] == chat(tiny).json()["choices"]
    with_tools = chat(tiny, tools=[WEATHER]).json()["usage"]["prompt_tokens"]
    assert with_tools > with_none["usage"]["prompt_tokens"] + 50


def test_a_conversation_may_contain_calls_and_their_results(tiny: LiveServer) -> None:
    called = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    response = chat(tiny, tools=[function("clock")], messages=messages).json()
    # The mood is still that of what the user said.
    assert response["sentiment"] == {
        **chat(tiny, messages=messages[:1]).json()["sentiment"],
        "cached": response["sentiment"]["cached"],
    }
    shorter = chat(tiny, tools=[function("clock")], messages=messages[:1]).json()
    assert response["usage"]["prompt_tokens"] > shorter["usage"]["prompt_tokens"] + 20


# --- the client's own helpers ---------------------------------------------------------


class Person(pydantic.BaseModel):
    """What the client parses an answer into."""

    name: str = pydantic.Field(max_length=8)
    is_glad: bool


class Mood(pydantic.BaseModel):
    """What the client parses a call's arguments into."""

    is_glad: bool


@pytest.fixture
def client(tiny: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=tiny.base_url, api_key="unused") as client:
        yield client


def test_the_client_parses_an_answer_into_a_model(tiny: LiveServer, client: openai.OpenAI) -> None:
    completion = client.chat.completions.parse(
        model=tiny.model, messages=[{"role": "user", "content": "Who?"}], max_tokens=200,
        response_format=Person, seed=1,
    )  # fmt: skip
    assert isinstance(completion.choices[0].message.parsed, Person)


def test_the_client_streams_an_answer_into_a_model(tiny: LiveServer, client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=tiny.model, messages=[{"role": "user", "content": "Who?"}], max_tokens=200,
        response_format=Person, seed=1,
    ) as stream:  # fmt: skip
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in kinds and kinds[-1] == "content.done"
    assert isinstance(final.choices[0].message.parsed, Person)
    assert (final.model_extra or {})["sentiment"]["label"]


def test_the_client_streams_calls(tiny: LiveServer, client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=tiny.model, messages=[{"role": "user", "content": "Weather?"}], max_tokens=200,
        tools=[openai.pydantic_function_tool(Mood)], tool_choice="required",
        parallel_tool_calls=False, seed=1,
    ) as stream:  # fmt: skip
        kinds = {event.type for event in stream}
        [call] = stream.get_final_completion().choices[0].message.tool_calls or []
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert isinstance(call.function.parsed_arguments, Mood)
