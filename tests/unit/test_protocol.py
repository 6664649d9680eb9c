"""Which requests are valid, and how others are refused: with 400, a sentence and the field."""

import json
import logging
from collections.abc import Mapping
from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params
from pydantic import ValidationError

from server.core.engine.sequence import TokenEvent
from server.core.roles.classification import Classification
from server.core.roles.tasks import Label
from server.errors import InvalidRequestError
from server.protocol import completions, responses
from server.protocol.base import RequestBody, classification, new_id, usage
from server.protocol.chat import UNSUPPORTED, WITHOUT_EFFECT, ChatCompletionRequest
from server.protocol.classify import ClassifyRequest
from server.protocol.completions import (
    DEFAULT_MAX_TOKENS,
    MAX_LOGPROBS,
    MAX_TOTAL_CHOICES,
    CompletionRequest,
    LogprobsWriter,
)
from server.protocol.decisions import DecisionsRequest
from server.protocol.responses import ResponsesRequest, TextOptions
from server.protocol.sampling import MAX_CHOICES, MAX_STOP_STRINGS, MAX_TOP_LOGPROBS
from server.protocol.texts import MAX_INPUTS
from server.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from server.protocol.tools import MAX_TOOLS

HI = [{"role": "user", "content": "Hi"}]
# The required fields of each request.
LEAST: dict[type[RequestBody], dict[str, Any]] = {
    ChatCompletionRequest: {"model": "m", "messages": HI},
    CompletionRequest: {"model": "m", "prompt": "Hi"},
    ResponsesRequest: {"model": "m", "input": "Hi"},
    ClassifyRequest: {"input": "Hi"},
    DecisionsRequest: {
        "model": "m", "input": "Hi", "questions": [{"type": "predicate", "instructions": "True?"}]
    },
    TokenizeRequest: {"prompt": "Hi"},
    DetokenizeRequest: {"tokens": [5]},
}  # fmt: skip


def parse_chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.parse(_json({"model": "m", "messages": HI} | fields))


def parse_classify(**fields: Any) -> ClassifyRequest:
    return ClassifyRequest.parse(_json({"input": "Hi"} | fields))


def refused(kind: type[RequestBody], body: bytes | Mapping[str, Any]) -> InvalidRequestError:
    """The error of a body that must be refused; checks the error's shape."""
    with pytest.raises(InvalidRequestError) as caught:
        kind.parse(body if isinstance(body, bytes) else _json(body))
    error = caught.value
    assert error.status == 400
    assert error.body() == {
        "error": {
            "message": error.message,
            "type": "invalid_request_error",
            "param": error.param,
            "code": error.code,
        }
    }
    assert error.message.endswith(".") and "\n" not in error.message
    json.dumps(error.body(), ensure_ascii=False).encode()
    return error


def refused_chat(**fields: Any) -> InvalidRequestError:
    return refused(ChatCompletionRequest, {"model": "m", "messages": HI} | fields)


def refused_classify(**fields: Any) -> InvalidRequestError:
    return refused(ClassifyRequest, {"input": "Hi"} | fields)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


# --- accepted values ------------------------------------------------------------------


def test_a_minimal_request_has_the_defaults() -> None:
    body = parse_chat()
    assert body.model == "m"
    assert [message.for_template() for message in body.messages] == HI
    assert body.stream is False and body.sentiment is True and body.stop == []
    assert body.stream_options is None
    for name in ("max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed"):
        assert getattr(body, name) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 1),
        ("max_completion_tokens", 10**9),
        ("temperature", 0),
        ("temperature", 2),
        ("temperature", 0.7),
        ("top_p", 1),
        ("top_p", 1e-9),
        ("top_k", -1),
        ("top_k", 0),
        ("top_k", 10**6),
        ("min_p", 0),
        ("min_p", 1),
        ("frequency_penalty", -2),
        ("presence_penalty", 2),
        ("repetition_penalty", 0.01),
        ("repetition_penalty", 2),
        ("logit_bias", {}),
        ("logit_bias", {"0": -100, "151935": 100}),
        ("seed", -(2**63)),
        ("seed", 2**63 - 1),
        ("stream", True),
        ("sentiment", False),
        ("stop", ["a", "b", "c", "d"]),
        ("stop", []),
    ],
)
def test_values_within_their_range_are_kept(name: str, value: Any) -> None:
    body = parse_chat(**{name: value})
    assert getattr(body, name) == value


@pytest.mark.parametrize(
    ("kind", "field", "items"),
    [
        (DetokenizeRequest, "tokens", [-1] * 1000),
        (ClassifyRequest, "input", [1] * 1000),
        (ResponsesRequest, "include", [1] * 1000),
        (ResponsesRequest, "metadata", dict.fromkeys(range(1000), 1)),
        (ResponsesRequest, "input", [{"role": "user", "content": [1] * 1000}]),
        (ResponsesRequest, "input", [1] * 1000),
        (
            ChatCompletionRequest,
            "tool_choice",
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [1] * 1000}},
        ),
        (
            DecisionsRequest,
            "questions",
            [{"type": "choice", "instructions": "x", "choices": [1] * 200}] * 200,
        ),
        (ChatCompletionRequest, "messages", [1] * 3000),
        (ChatCompletionRequest, "logit_bias", dict.fromkeys(range(5000), "x")),
        (CompletionRequest, "prompt", [1.5] * 5000),
    ],
)
def test_validation_stops_at_the_first_mistake(
    kind: type[RequestBody], field: str, items: Any
) -> None:
    cause = refused(kind, {**LEAST[kind], field: items}).__cause__
    assert isinstance(cause, ValidationError)
    assert cause.error_count() == 1


def test_a_single_stop_string_is_a_list_of_one() -> None:
    assert parse_chat(stop="\n").stop == ["\n"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind, least in LEAST.items()
        for name in sorted(
            ({info.alias or name for name, info in kind.model_fields.items()} - least.keys())
            | kind.known | {"something_new"}
        )
    ],
)  # fmt: skip
def test_null_counts_as_absent(kind: type[RequestBody], name: str) -> None:
    assert kind.parse(_json({**LEAST[kind], name: None})) == kind.parse(_json(LEAST[kind]))


def test_null_counts_as_absent_inside_stream_options() -> None:
    body = parse_chat(stream=True, stream_options={"include_usage": None})
    assert body.stream_options is not None and body.stream_options.include_usage is False


def test_null_counts_as_absent_inside_an_earlier_call() -> None:
    function = {"name": "f", "arguments": "{}"}
    given = {"role": "assistant", "tool_calls": [{"id": None, "type": None, "function": function}]}
    [message] = parse_chat(messages=[given]).messages
    assert message.tool_calls[0].type == "function" and message.tool_calls[0].id == ""


def test_null_counts_as_absent_inside_the_text_options_of_a_response() -> None:
    options = {"format": None, "verbosity": None}
    with_nulls = _json({"model": "m", "input": "Hi", "text": options})
    assert ResponsesRequest.parse(with_nulls).text == TextOptions()


@pytest.mark.parametrize("value", [0, "", [], {}, False, "x", [1, {"a": None}]])
@pytest.mark.parametrize("name", [*WITHOUT_EFFECT, "something_new", "__class__", "", "模型"])
def test_parameters_without_effect_and_unknown_ones_are_accepted_with_any_value(
    name: str, value: Any
) -> None:
    body = parse_chat(**{name: value})
    assert body.messages == parse_chat().messages
    assert body.temperature is None and body.stop == [] and body.model == "m"


# --- parameters that are not supported ------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in UNSUPPORTED.items() for value in values]
)
def test_an_unsupported_parameter_is_accepted_at_its_neutral_value(name: str, value: Any) -> None:
    assert parse_chat(**{name: value}).messages == parse_chat().messages


def not_neutral(name: str) -> list[Any]:
    # In Python False == 0 and True == 1, but not in JSON.
    candidates = [7, -0.5, True, False, 0, 1, "x", ["x"], {"type": "x"}]
    neutral = [(type(x) is bool, x) for x in UNSUPPORTED[name]]
    return [x for x in candidates if (type(x) is bool, x) not in neutral]


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in UNSUPPORTED for value in not_neutral(name)]
)
def test_an_unsupported_parameter_is_refused_at_any_other_value(name: str, value: Any) -> None:
    error = refused_chat(**{name: value})
    assert error.param == name
    assert error.code == "unsupported_parameter"
    assert f"'{name}'" in error.message


@pytest.mark.parametrize(
    ("kind", "written"),
    [
        (ChatCompletionRequest, chat_params.CompletionCreateParamsStreaming),
        (CompletionRequest, completion_params.CompletionCreateParamsStreaming),
        (ResponsesRequest, response_params.ResponseCreateParamsStreaming),
    ],
)
def test_every_parameter_of_the_openai_client_is_known(
    kind: type[RequestBody], written: Any
) -> None:
    fields = {info.alias or name for name, info in kind.model_fields.items()}
    assert get_type_hints(written).keys() <= fields | kind.known
    assert not fields & kind.known


# --- fields out of range --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", 5),
        ("model", ["m"]),
        ("messages", []),
        ("messages", "Hi"),
        ("messages", {"role": "user", "content": "Hi"}),
        ("stream", 1),
        ("stream", "true"),
        ("sentiment", "yes"),
        ("sentiment", 0),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.0),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("max_completion_tokens", 0),
        ("max_completion_tokens", float("inf")),
        ("temperature", -0.1),
        ("temperature", 2.1),
        pytest.param("temperature", 10**400, id="temperature-beyond floats"),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", []),
        ("top_p", 0),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        pytest.param("top_p", 10**400, id="top_p-beyond floats"),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", True),
        ("presence_penalty", 2.1),
        ("presence_penalty", "much"),
        ("repetition_penalty", 0),
        ("repetition_penalty", 2.1),
        ("logit_bias", []),
        ("logit_bias", {"ten": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"٣": 1}),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        pytest.param("seed", 10**400, id="seed-beyond floats"),
        ("seed", 0.5),
        ("seed", "3"),
        ("tools", {}),
        ("tools", [{}] * (MAX_TOOLS + 1)),
        ("tool_choice", "always"),
        ("tool_choice", {"type": "custom", "custom": {"name": "f"}}),
        ("tool_choice", ["auto"]),
        ("parallel_tool_calls", 1),
        ("response_format", "json"),
        ("response_format", {"type": "xml"}),
        ("n", 0),
        ("n", MAX_CHOICES + 1),
        ("n", 1.0),
        ("n", True),
        ("logprobs", 1),
        ("top_logprobs", -1),
        ("top_logprobs", MAX_TOP_LOGPROBS + 1),
        ("top_logprobs", True),
        pytest.param("top_logprobs", 3, id="top_logprobs-without logprobs"),
        ("stop", 5),
        ("stop", {"a": 1}),
        ("stop", ["a"] * (MAX_STOP_STRINGS + 1)),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_field(name: str, value: Any) -> None:
    error = refused_chat(**{name: value})
    assert error.param == name
    assert f"'{name}'" in error.message
    assert error.code is None


@pytest.mark.parametrize("bias", [-101, 100.5, "1", True, None, float("nan")])
def test_a_bias_out_of_range_is_refused_with_its_token(bias: Any) -> None:
    assert refused_chat(logit_bias={"7": bias}).param == "logit_bias.7"


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [None], [3], [["a"]]])
def test_a_wrong_stop_string_is_refused_with_its_place(stop: Any) -> None:
    error = refused_chat(stop=stop)
    assert error.param in {"stop", "stop[0]", "stop[1]"}
    assert f"'{error.param}'" in error.message


@pytest.mark.parametrize("name", ["model", "messages"])
@pytest.mark.parametrize("is_null", [True, False])
def test_a_missing_field_is_required_by_name(name: str, is_null: bool) -> None:
    fields: dict[str, Any] = {"model": "m", "messages": HI}
    if is_null:
        fields[name] = None
    else:
        del fields[name]
    error = refused(ChatCompletionRequest, fields)
    assert error.param == name
    assert error.message == f"'{name}': is required."


# --- tools and formats ----------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f"}}
OTHER_TOOL = {"type": "function", "function": {"name": "g"}}


def allowed(mode: str, *tools: dict[str, Any]) -> dict[str, Any]:
    """A tool choice that allows these tools."""
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        ({"tool_choice": allowed("none", TOOL)}, "tool_choice.allowed_tools.mode"),
        ({"tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools"),
        (
            {"tool_choice": allowed("auto", {"type": "mcp"})},
            "tool_choice.allowed_tools.tools[0].type",
        ),
        ({"tools": [{**TOOL, "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{**TOOL, "function": {"name": ""}}]}, "tools[0].function.name"),
        (
            {"tools": [{**TOOL, "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
    ],
)
def test_a_wrong_tool_or_format_is_refused_with_its_place(
    fields: dict[str, Any], param: str
) -> None:
    assert refused_chat(**fields).param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": TOOL}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": OTHER_TOOL}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": allowed("auto", TOOL, OTHER_TOOL)}, "tool_choice"),
        ({"tool_choice": allowed("auto", TOOL)}, "tool_choice"),
    ],
)
def test_tools_and_their_choice_must_go_together(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_chat(**fields).output()
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("choice", "names", "is_required"),
    [
        ("none", [], False),
        ("auto", ["f", "g"], False),
        ("required", ["f", "g"], True),
        (OTHER_TOOL, ["g"], True),
        (allowed("auto", OTHER_TOOL), ["g"], False),
        (allowed("required", OTHER_TOOL, TOOL), ["f", "g"], True),
    ],
)
def test_the_choice_says_which_tools_may_and_must_be_called(
    choice: Any, names: list[str], is_required: bool
) -> None:
    tools = [TOOL, {**TOOL, "function": {"name": "g", "parameters": {"properties": {}}}}]
    output = parse_chat(tools=tools, tool_choice=choice).output()
    assert [tool.name for tool in output.tools] == names
    assert output.is_call_required == is_required
    assert all(tool.parameters["type"] == "object" for tool in output.tools)


def test_an_unknown_choice_is_refused_with_all_choices() -> None:
    for choice in ("always", {"type": "custom", "custom": {"name": "f"}}):
        message = refused_chat(tool_choice=choice).message
        assert "'none', 'auto', 'required', or an object of type function, allowed_tools" in message


def test_a_call_and_its_result_reach_the_template() -> None:
    body = parse_chat(
        messages=[
            *HI,
            {"role": "assistant", "content": None, "tool_calls": [call("f", '{"a": 1}')]},
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "2"}]},
            {"role": "function", "name": "f", "content": "3"},
            {"role": "function", "name": "f", "content": None},
        ]
    )
    _, called, result, legacy, nothing = [message.for_template() for message in body.messages]
    assert called["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert result == {"role": "tool", "content": "2"}
    assert legacy == {"role": "tool", "content": "3"}
    assert nothing == {"role": "tool", "content": ""}


# --- messages -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "meaning"),
    [
        ('{"a": 1}', {"a": 1}),
        (' {"a": [null]} ', {"a": [None]}),
        ("", {}),
        (" \n", {}),
        ('{"city": "Par', '{"city": "Par'),
        ('{"a": Infinity}', '{"a": Infinity}'),
        ('{"a": -1e999}', '{"a": -1e999}'),
        (r'"\ud800"', r'"\ud800"'),
        ("[" * 500 + "]" * 500, "[" * 500 + "]" * 500),
        ("[[],[]," * 100_000, "[[],[]," * 100_000),
        ("5", 5),
    ],
    ids=range(11),
)
def test_arguments_of_an_earlier_call_are_json_or_the_string_they_are(
    arguments: str, meaning: Any
) -> None:
    given = {"role": "assistant", "tool_calls": [call("f", arguments)]}
    (in_chat,) = parse_chat(messages=[given]).messages
    item = {"type": "function_call", "call_id": "1", "name": "f", "arguments": arguments}
    (as_item,) = ResponsesRequest.parse(_json({"model": "m", "input": [item]})).messages()
    for message in (in_chat.for_template(), as_item):
        assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": meaning}


def call(name: str, arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": "call_1", "type": "function", "function": function}


def one_message(message: Any) -> dict[str, str]:
    (parsed,) = parse_chat(messages=[message]).messages
    return parsed.for_template()


@pytest.mark.parametrize(
    ("role", "template_role"),
    [
        ("system", "system"),
        ("developer", "system"),
        ("user", "user"),
        ("assistant", "assistant"),
    ],
)
def test_every_role_reaches_the_template_and_a_developer_is_the_system(
    role: str, template_role: str
) -> None:
    message = {"role": role, "content": " 你好 <|im_end|>\n"}
    assert one_message(message) == {"role": template_role, "content": " 你好 <|im_end|>\n"}


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
@pytest.mark.parametrize(
    ("parts", "joined"),
    [
        (["Hello"], "Hello"),
        (["Hel", "lo ", "", "😀"], "Hello 😀"),
        (["\n", "\n"], "\n\n"),
        ([], ""),
    ],
)
def test_text_parts_are_joined_to_one_string(role: str, parts: list[str], joined: str) -> None:
    content = [{"type": "text", "text": text} for text in parts]
    assert one_message({"role": role, "content": content})["content"] == joined


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"role": "assistant", "content": None, "refusal": None, "audio": None, "tool_calls": None},
        {"role": "assistant", "content": "", "tool_calls": [], "function_call": None},
        {"role": "assistant", "content": "", "annotations": [], "name": "bot"},
    ],
)
def test_an_assistant_message_of_an_earlier_response_may_be_sent_back(message: Any) -> None:
    assert one_message(message) == {"role": "assistant", "content": ""}


REFUSAL = {"type": "refusal", "refusal": "I can't."}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"content": [REFUSAL]}, "I can't."),
        ({"content": [{"type": "text", "text": "No. "}, REFUSAL]}, "No. I can't."),
        ({"content": None, "refusal": "I can't."}, "I can't."),
        ({"content": "", "refusal": "I can't."}, "I can't."),
        ({"content": "No.", "refusal": "I can't."}, "No."),
    ],
)
def test_an_assistants_refusal_is_its_text(fields: dict[str, Any], text: str) -> None:
    assert one_message({"role": "assistant", **fields}) == {"role": "assistant", "content": text}


@pytest.mark.parametrize("name", ["name", "something_new"])
def test_further_fields_of_a_message_are_ignored(name: str) -> None:
    assert one_message({"role": "user", "content": "Hi", name: "Ann"}) == HI[0]


@pytest.mark.parametrize(
    ("message", "param", "reason"),
    [
        ("Hi", "messages[1]", "object"),
        (None, "messages[1]", "object"),
        ([], "messages[1]", "object"),
        ({}, "messages[1]", "'content' is missing"),
        ({"role": "user"}, "messages[1]", "'content' is missing"),
        ({"role": "user", "content": None}, "messages[1]", "'content' is missing"),
        ({"role": "system", "content": None}, "messages[1]", "'content' is missing"),
        ({"content": "Hi"}, "messages[1].role", "required"),
        ({"role": "pirate", "content": "Hi"}, "messages[1].role", "'user'"),
        ({"role": "tool", "content": "Hi"}, "messages[1]", "'tool_call_id'"),
        ({"role": "tool", "tool_call_id": "1"}, "messages[1]", "'content'"),
        ({"role": "User", "content": "Hi"}, "messages[1].role", "'user'"),
        ({"role": None, "content": "Hi"}, "messages[1].role", "required"),
        ({"role": ["user"], "content": "Hi"}, "messages[1].role", "'user'"),
        ({"role": "user", "content": 5}, "messages[1].content", "string"),
        ({"role": "user", "content": {"type": "text"}}, "messages[1].content", "string"),
        ({"role": "user", "content": ["Hi"]}, "messages[1].content", "'Hi'"),
        ({"role": "user", "content": [None]}, "messages[1].content", "None"),
        ({"role": "user", "content": [{"text": "Hi"}]}, "messages[1].content", "None"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content", "'text'"),
        (
            {"role": "user", "content": [{"type": "text", "text": 5}]},
            "messages[1].content",
            "'text'",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]},
            "messages[1].content",
            "'image_url'",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "1"}]},
            "messages[1].tool_calls[0].function",
            "required",
        ),
        (
            {"role": "assistant", "tool_calls": [call("f", {})]},
            "messages[1].tool_calls[0].function.arguments",
            "string",
        ),
        ({"role": "user", "content": "a", "tool_calls": [call("f", "{}")]}, "messages[1]", "only"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "messages[1]", "'tool_calls'"),
        ({"role": "user", "content": [REFUSAL]}, "messages[1].content", "'refusal'"),
        (
            {"role": "assistant", "content": [{"type": "refusal"}]},
            "messages[1].content",
            "'refusal'",
        ),
        ({"role": "assistant", "refusal": 5}, "messages[1].content", "string"),
    ],
)
def test_a_wrong_message_is_refused_with_its_place_and_the_reason(
    message: Any, param: str, reason: str
) -> None:
    error = refused_chat(messages=[*HI, message])
    assert error.param == param
    assert f"'{param}'" in error.message
    assert reason in error.message


def test_the_first_of_several_mistakes_is_named() -> None:
    error = refused_chat(messages=[*HI, {"role": "user", "content": 1}, 5], top_logprobs=99)
    assert error.param == "messages[1].content"


# --- invalid bodies -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ChatCompletionRequest, ClassifyRequest])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"{'model': 'm'}",
        b'{"model": "m",}',
        b'{"model": "m"} trailing',
        b"hello",
        b"\xff\xfe\x00",
        b'{"model": "\xff"}',
        b'{"seed": ' + b"1" * 5000 + b"}",
        b'{"model": "\xed\xa0\x80"}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"model": "m", "messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"model": "m", "messages": ' + b"[" * 201 + b"]" * 201 + b"}",
    ],
    ids=lambda body: repr(body[:20]) if isinstance(body, bytes) else None,
)
def test_a_body_that_is_no_json_is_refused_as_such(kind: type[RequestBody], body: bytes) -> None:
    error = refused(kind, body)
    assert error.message.startswith("The request body is not valid JSON")
    assert error.param is None


@pytest.mark.parametrize("kind", [ChatCompletionRequest, ClassifyRequest])
@pytest.mark.parametrize("body", [b"[]", b"3", b"null", b'"text"', b"true", b"NaN", b"[{}]"])
def test_a_body_that_is_no_object_is_refused_as_such(kind: type[RequestBody], body: bytes) -> None:
    error = refused(kind, body)
    assert error.message == "The request body must be a JSON object."
    assert error.param is None


@pytest.mark.parametrize(
    "body",
    [
        rb'{"model": "m", "messages": [{"role": "user", "content": "\ud800"}]}',
        rb'{"model": "m", "messages": [{"role": "user", "content": "a\udc00b"}]}',
        rb'{"model": "m", "messages": [{"role": "user", "content": "\ude00\ud83d"}]}',
        rb'{"model": "\ud800", "messages": [{"role": "user", "content": "Hi"}]}',
        rb'{"model": "m", "messages": [{"role": "user", "content": "Hi"}], "\ud800": 1}',
        rb'{"model": "m", "messages": [{"role": "user", "content": "Hi"}], "x": ["\ud800"]}',
        rb'{"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stop": "\ud800"}',
    ],
)
def test_a_lone_surrogate_is_refused_wherever_it_stands(body: bytes) -> None:
    error = refused(ChatCompletionRequest, body)
    assert "lone surrogate" in error.message and "\\ud" in error.message


def test_a_lone_surrogate_is_refused_in_a_text_to_classify() -> None:
    assert "lone surrogate" in refused(ClassifyRequest, rb'{"input": "\ud83d"}').message


def test_a_pair_of_surrogates_is_a_character() -> None:
    body = rb'{"model": "m", "messages": [{"role": "user", "content": "\ud83d\ude00"}]}'
    assert ChatCompletionRequest.parse(body).messages[0].content == "😀"


def test_deep_nesting_below_the_limit_is_refused_with_the_field() -> None:
    deep: Any = "x"
    for _ in range(190):
        deep = [deep]
    assert parse_chat(something_new=deep).messages == parse_chat().messages
    assert refused_chat(messages=deep).param == "messages[0]"
    assert refused_chat(tools=deep).param == "tools[0]"
    assert refused_chat(stop=deep).param == "stop[0]"
    assert refused_classify(input=deep).param == "input[0]"


@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "2" * 400 + ".0"]
)
@pytest.mark.parametrize(
    ("field", "param"),
    [
        ('"temperature": N', "temperature"),
        ('"metadata": N', "metadata"),
        ('"no_such_parameter": {"a": [0, 1.5, [N]]}', "no_such_parameter.a[2][0]"),
        (
            '"tools": [{"type": "function", "name": "f", "parameters": {"maximum": N}}]',
            "tools[0].parameters.maximum",
        ),
        ('"text": {"format": {"x": [{"y": N}]}}', "text.format.x[0].y"),
    ],
    ids=range(5),
)
@pytest.mark.parametrize("kind", LEAST)
def test_a_number_that_is_not_finite_is_refused_with_its_place(
    kind: type[RequestBody], field: str, param: str, number: str
) -> None:  # fmt: skip
    error = refused(kind, f"{{{field.replace('N', number)}}}".encode())
    assert error.message == f"'{param}': must be a finite number."
    assert error.param == param


def test_the_largest_numbers_are_finite() -> None:
    body = b'{"model": "m", "input": "a", "x": [1e308, -1e308, 5e-324, 1e-999, N]}'
    ResponsesRequest.parse(body.replace(b"N", b"9" * 4000))


# --- combinations ---------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"include_usage": True}, {"include_usage": False}])
@pytest.mark.parametrize("more", [{}, {"stream": False}, {"stream": None}])
def test_stream_options_without_stream_are_refused(
    options: dict[str, bool], more: dict[str, Any]
) -> None:
    error = refused_chat(stream_options=options, **more)
    assert error.param == "stream_options"
    assert "'stream'" in error.message


@pytest.mark.parametrize(
    ("options", "include_usage"),
    [
        ({}, False),
        ({"include_usage": True}, True),
        ({"include_usage": False, "include_obfuscation": True}, False),
    ],
)
def test_stream_options_with_stream_are_read(options: dict[str, bool], include_usage: bool) -> None:
    body = parse_chat(stream=True, stream_options=options)
    assert body.stream_options is not None
    assert body.stream_options.include_usage is include_usage


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ("usage", "stream_options"),
        ([], "stream_options"),
        (True, "stream_options"),
        ({"include_usage": 1}, "stream_options.include_usage"),
        ({"include_usage": "true"}, "stream_options.include_usage"),
    ],
)
def test_wrong_stream_options_are_refused_with_the_field(options: Any, param: str) -> None:
    assert refused_chat(stream=True, stream_options=options).param == param


def test_reasons_use_the_terms_of_json() -> None:
    reasons = [
        refused_chat(stream=True, stream_options="x").message,
        refused_chat(messages=[]).message,
        refused_classify(instructions="Spam?", labels=["yes"]).message,
    ]
    assert reasons == [
        "'stream_options': must be an object.",
        "'messages': must have 1 items or more, not 0.",
        "'labels': must have 2 items or more, not 1.",
    ]


# --- classify -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "texts"),
    [("Hi", ["Hi"]), (["Hi"], ["Hi"]), (["a", "b"], ["a", "b"]), (["x"] * MAX_INPUTS, None)],
)
def test_one_text_or_several_are_a_list(given: Any, texts: list[str] | None) -> None:
    assert parse_classify(input=given).texts == (texts or given)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (None, "input"),
        (5, "input"),
        ([], "input"),
        ([5], "input[0]"),
        (["a", ["a"]], "input[1]"),
        ({"text": "a"}, "input"),
        ("", "input"),
        (" \n\u3000", "input"),
        ([""], "input[0]"),
        (["a", "\t"], "input[1]"),
        (["x"] * (MAX_INPUTS + 1), "input"),
    ],
)
def test_inputs_that_are_no_texts_are_refused(given: Any, param: str) -> None:
    error = refused_classify(input=given)
    assert error.param == param
    assert f"'{param}'" in error.message


def test_a_named_task_stands_alone() -> None:
    body = parse_classify(task="intent")
    assert (body.task, body.instructions, body.labels) == ("intent", None, None)


def test_a_clients_own_task_has_instructions_and_labels() -> None:
    body = parse_classify(instructions="Spam?", labels=["yes", "no"])
    assert (body.task, body.instructions, body.labels) == (None, "Spam?", ["yes", "no"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"instructions": "Spam?"}, "labels"),
        ({"instructions": "Spam?", "labels": None}, "labels"),
        ({"labels": ["yes", "no"]}, "instructions"),
        ({"task": "intent", "instructions": "Spam?"}, "labels"),
        ({"task": "intent", "labels": ["yes", "no"]}, "instructions"),
        ({"task": "intent", "instructions": "Spam?", "labels": ["yes", "no"]}, "task"),
        ({"instructions": "", "labels": ["yes", "no"]}, "instructions"),
        ({"instructions": 5, "labels": ["yes", "no"]}, "instructions"),
        ({"instructions": "Spam?", "labels": []}, "labels"),
        ({"instructions": "Spam?", "labels": ["yes"]}, "labels"),
        ({"instructions": "Spam?", "labels": ["yes", "yes"]}, "labels"),
        ({"instructions": "Spam?", "labels": "yes"}, "labels"),
        ({"instructions": "Spam?", "labels": ["yes", ""]}, "labels[1]"),
        ({"instructions": "Spam?", "labels": [1, "no"]}, "labels[0]"),
        ({"instructions": "Spam?", "labels": ["yes", None]}, "labels[1]"),
        ({"instructions": "Spam?", "labels": [str(i) for i in range(256)]}, "labels"),
        ({"task": 5}, "task"),
        ({"model": 5}, "model"),
    ],
)
def test_a_wrong_description_of_a_task_is_refused_with_the_field(
    fields: dict[str, Any], param: str
) -> None:
    error = refused_classify(**fields)
    assert error.param == param
    assert f"'{param}'" in error.message


def test_255_labels_are_accepted() -> None:
    labels = [str(i) for i in range(255)]
    assert parse_classify(instructions="Which?", labels=labels).labels == labels


def test_unknown_fields_of_a_classify_request_are_accepted() -> None:
    assert parse_classify(something_new=[1], texts=["x"]).texts == ["Hi"]


# --- completions ----------------------------------------------------------------------


def parse_completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.parse(_json({"model": "m", "prompt": "Hi"} | fields))


def refused_completion(**fields: Any) -> InvalidRequestError:
    return refused(CompletionRequest, {"model": "m", "prompt": "Hi"} | fields)


def test_a_minimal_completion_has_openais_defaults() -> None:
    body = parse_completion()
    assert body.max_tokens == DEFAULT_MAX_TOKENS == 16
    assert (body.echo, body.logprobs, body.n, body.stop, body.stream) == (False, None, 1, [], False)


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("Hi", {"prompt": "Hi"}),
        (" \n", {"prompt": " \n"}),
        ([5, 6], {"prompt": [5, 6]}),
        (["a"], {"prompt[0]": "a"}),
        (["a", "b"], {"prompt[0]": "a", "prompt[1]": "b"}),
        ([[5], [6, 7]], {"prompt[0]": [5], "prompt[1]": [6, 7]}),
    ],
)
def test_every_prompt_is_keyed_by_its_field(given: Any, prompts: dict[str, Any]) -> None:
    assert parse_completion(prompt=given).prompts == prompts


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"),
        ("", "prompt"),
        ([], "prompt"),
        ([""], "prompt[0]"),
        (["a", ""], "prompt[1]"),
        ([[5], []], "prompt[1]"),
        (5, "prompt"),
        (True, "prompt"),
        ({"prompt": "Hi"}, "prompt"),
        ([1, "a"], "prompt"),
        ([5, True], "prompt"),
        ([5.0], "prompt"),
        ([[[5]]], "prompt"),
        ([["a"]], "prompt"),
        (["a", None], "prompt"),
        (["a"] * (MAX_TOTAL_CHOICES + 1), "prompt"),
    ],
)
def test_an_invalid_prompt_is_refused_with_its_place(prompt: Any, param: str) -> None:
    error = refused_completion(prompt=prompt)
    assert error.param == param
    assert f"'{param}'" in error.message


@pytest.mark.parametrize("prompts", [["a"] * 100_000, [[5]] * 50_000, ["a", [5]] * 200])
def test_too_many_prompts_are_refused_before_they_are_built(
    monkeypatch: pytest.MonkeyPatch, prompts: Any
) -> None:
    checked: list[Any] = []
    is_prompt = completions._is_prompt

    def noted(prompt: Any) -> bool:
        checked.append(prompt)
        return is_prompt(prompt)

    monkeypatch.setattr(completions, "_is_prompt", noted)
    error = refused_completion(prompt=prompts)
    assert error.message == f"'prompt': must have 256 items or fewer, not {len(prompts)}."
    assert len(checked) <= MAX_TOTAL_CHOICES + 2


def test_the_choices_of_all_prompts_are_bounded_together() -> None:
    fits = ["a"] * (MAX_TOTAL_CHOICES // 2)
    assert len(parse_completion(prompt=fits, n=2).prompts) == MAX_TOTAL_CHOICES // 2
    assert refused_completion(prompt=[*fits, "a"], n=2).param == "prompt"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("echo", 1),
        ("logprobs", -1),
        ("logprobs", MAX_LOGPROBS + 1),
        ("logprobs", True),
        ("temperature", 2.1),
        ("n", MAX_CHOICES + 1),
        ("stop", ["a"] * (MAX_STOP_STRINGS + 1)),
        ("logit_bias", {"ten": 1}),
        ("stream_options", {"include_usage": True}),
    ],
)
def test_a_value_out_of_range_of_a_completion_is_refused_with_the_field(
    name: str, value: Any
) -> None:
    error = refused_completion(**{name: value})
    assert error.param == name
    assert f"'{name}'" in error.message


@pytest.mark.parametrize("logprobs", [0, 5])
def test_an_echo_with_logprobs_is_refused_with_the_reason(logprobs: int) -> None:
    error = refused_completion(echo=True, logprobs=logprobs)
    assert error.param == "echo"
    assert "prompt are not computed" in error.message
    assert parse_completion(echo=False, logprobs=logprobs).logprobs == logprobs


@pytest.mark.parametrize(
    "fields", [{"suffix": "x"}, {"best_of": 3}, {"best_of": 3, "n": 2}, {"best_of": True}]
)
def test_unsupported_values_of_a_completion_are_refused(fields: dict[str, Any]) -> None:
    error = refused_completion(**fields)
    assert error.param == next(iter(fields))
    assert error.code == "unsupported_parameter"


@pytest.mark.parametrize(
    "fields", [{"suffix": ""}, {"best_of": 1}, {"best_of": 2, "n": 2}, {"user": "me", "new": [1]}]
)
def test_values_without_effect_in_a_completion_are_accepted(fields: dict[str, Any]) -> None:
    assert parse_completion(**fields).prompts == {"prompt": "Hi"}


def write_logprobs(*pieces: list[TokenEvent]) -> list[dict[str, list[Any]]]:
    """The logprobs of each piece; the tokens are a, 你, two halves of 你 and a special one."""
    token_bytes = [b"a", "你".encode(), "你".encode()[:2], "你".encode()[2:], b""]
    writer = LogprobsWriter(token_bytes, lambda token_ids: f"<|{token_ids[0]}|>")
    return [writer.write(tokens) for tokens in pieces]


def test_logprobs_are_columns_that_continue_across_pieces() -> None:
    first, second = write_logprobs(
        [TokenEvent(1, -0.5, ((1, -0.5), (4, -2.0))), TokenEvent(2, -1.0, ((0, -0.25),))],
        [TokenEvent(3, -0.125), TokenEvent(0, -float("inf"))],
    )
    assert first == {
        "tokens": ["你", r"bytes:\xe4\xbd"],
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{"你": -0.5, "<|4|>": -2.0}, {"a": -0.25, r"bytes:\xe4\xbd": -1.0}],
        "text_offset": [0, 1],
    }
    assert second == {
        "tokens": [r"bytes:\xa0", "a"],
        "token_logprobs": [-0.125, -9999.0],
        "top_logprobs": [{r"bytes:\xa0": -0.125}, {"a": -9999.0}],
        "text_offset": [1, 2],
    }


# --- responses ------------------------------------------------------------------------


def test_a_classification_is_an_object_of_its_label_and_all_probabilities() -> None:
    up, down = Label(value="up", text="good", emoji="😄"), Label(value="down", text="bad")
    result = Classification(up, 2 / 3, ((up, 2 / 3), (down, 1 / 3)), 9, 4, is_cached=True)
    assert classification(result) == {
        "label": "up",
        "text": "good",
        "emoji": "😄",
        "confidence": 0.666667,
        "probabilities": [
            {"value": "up", "probability": 0.666667},
            {"value": "down", "probability": 0.333333},
        ],
        "cached": True,
    }


def test_no_classification_is_null() -> None:
    assert classification(None) is None


def test_usage_adds_up() -> None:
    assert usage(5, 7, 4) == {
        "prompt_tokens": 5,
        "completion_tokens": 7,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_ids_have_their_prefix_and_are_unique() -> None:
    ids = {new_id("chatcmpl") for _ in range(100)}
    assert len(ids) == 100
    assert all(response_id.startswith("chatcmpl-") for response_id in ids)


@pytest.mark.parametrize(
    ("kind", "without_effect"),
    [
        (ChatCompletionRequest, WITHOUT_EFFECT),
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
