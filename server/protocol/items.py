"""Input items: what conversations are made of at /v1/responses and /v1/decisions."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    StrictStr,
    Tag,
)

from server.protocol.base import branch, of_type
from server.protocol.messages import MAX_MESSAGES


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class TextPart(_Frozen):
    """Text that a user, the developer or a tool wrote."""

    type: Literal["input_text"]
    text: StrictStr

    def as_text(self) -> str:
        return self.text


class JSONPart(_Frozen):
    """An object, or several, which the model reads as JSON."""

    type: Literal["input_json"]
    data: dict[str, Any] | list[dict[str, Any]]

    def as_text(self) -> str:
        return json.dumps(self.data, ensure_ascii=False)


class OutputTextPart(_Frozen):
    """Text that an assistant wrote."""

    type: Literal["output_text"]
    text: StrictStr

    def as_text(self) -> str:
        return self.text


class RefusalPart(_Frozen):
    """What an assistant said in place of an answer."""

    type: Literal["refusal"]
    refusal: StrictStr

    def as_text(self) -> str:
        return self.refusal


Part = Annotated[
    Annotated[TextPart, Tag(branch("input_text"))]
    | Annotated[JSONPart, Tag(branch("input_json"))]
    | Annotated[OutputTextPart, Tag(branch("output_text"))]
    | Annotated[RefusalPart, Tag(branch("refusal"))],
    of_type(
        "input_text", "input_json", "output_text", "refusal", hint="; this model reads text only"
    ),
]


def _as_parts(content: Any) -> Any:
    if isinstance(content, str):
        return [{"type": "input_text", "text": content}]
    if not isinstance(content, list):
        raise ValueError("must be a string or a list of parts")
    return content


Content = Annotated[list[Part], BeforeValidator(_as_parts)]


def text_of(content: Sequence[Part]) -> str:
    """The parts as one text."""
    return "\n".join(part.as_text() for part in content)


class Message(_Frozen):
    """What somebody said."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content

    def for_template(self) -> dict[str, Any]:
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text_of(self.content)}


class FunctionCall(_Frozen):
    """An assistant's call of a function."""

    type: Literal["function_call"]
    call_id: StrictStr
    name: StrictStr
    arguments: Json[Any]

    def for_template(self) -> dict[str, Any]:
        return _call(self.name, self.arguments)


class CustomToolCall(_Frozen):
    """An assistant's call of a tool that takes plain text."""

    type: Literal["custom_tool_call"]
    call_id: StrictStr
    name: StrictStr
    input: StrictStr

    def for_template(self) -> dict[str, Any]:
        return _call(self.name, {"input": self.input})


class CallOutput(_Frozen):
    """What a function or tool returned."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: StrictStr
    output: Content

    def for_template(self) -> dict[str, Any]:
        return {"role": "tool", "content": text_of(self.output)}


def _call(name: str, arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    call = {"type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


Item = Annotated[
    Annotated[Message, Tag(branch("message"))]
    | Annotated[FunctionCall, Tag(branch("function_call"))]
    | Annotated[CustomToolCall, Tag(branch("custom_tool_call"))]
    | Annotated[CallOutput, Tag(branch("function_call_output"))]
    | Annotated[CallOutput, Tag(branch("custom_tool_call_output"))],
    of_type(
        "message",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
        default="message",
    ),
]


def _as_items(value: Any) -> Any:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of messages")
    return value


def _check_not_empty(items: list[Item]) -> list[Item]:
    if all(isinstance(item, Message) and not text_of(item.content).strip() for item in items):
        raise ValueError("is empty")
    return items


def _check_calls(items: list[Item]) -> list[Item]:
    called = set()
    for item in items:
        if isinstance(item, CallOutput):
            kind = item.type.removesuffix("_output")
            if (kind, item.call_id) not in called:
                raise ValueError(
                    f"there is no {kind} {item.call_id!r} before the output that names it"
                )
        elif not isinstance(item, Message):
            called.add((item.type, item.call_id))
    return items


# A string, which the user said, or a conversation.
Items = Annotated[
    list[Item],
    Field(min_length=1, max_length=MAX_MESSAGES),
    BeforeValidator(_as_items),
    AfterValidator(_check_not_empty),
    AfterValidator(_check_calls),
]


def conversation(items: Sequence[Item]) -> list[dict[str, Any]]:
    """The items as chat templates know them: calls belong to the answer before them."""
    messages: list[dict[str, Any]] = []
    for item in items:
        message = item.for_template()
        if "tool_calls" in message and messages and messages[-1]["role"] == "assistant":
            last = messages[-1]
            calls = [*last.get("tool_calls", []), *message["tool_calls"]]
            messages[-1] = {**last, "tool_calls": calls}
        else:
            messages.append(message)
    return messages
