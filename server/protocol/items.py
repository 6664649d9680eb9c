"""Input items, the parts of a conversation at /v1/responses and /v1/decisions."""

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, StrictStr, Tag

from server.protocol.base import FIRST_ERROR, branch, of_type
from server.protocol.messages import MAX_MESSAGES, Arguments


class TextPart(BaseModel):
    """Text of a message; `output_text` is an assistant's."""

    type: Literal["input_text", "output_text"]
    text: StrictStr


class JSONPart(BaseModel):
    """One or more objects, which the model reads as JSON."""

    type: Literal["input_json"]
    data: dict[str, Any] | list[dict[str, Any]]


class RefusalPart(BaseModel):
    """An assistant's refusal to answer."""

    type: Literal["refusal"]
    refusal: StrictStr


Part = Annotated[
    Annotated[TextPart, Tag(branch("input_text"))]
    | Annotated[JSONPart, Tag(branch("input_json"))]
    | Annotated[TextPart, Tag(branch("output_text"))]
    | Annotated[RefusalPart, Tag(branch("refusal"))],
    of_type(
        "input_text", "input_json", "output_text", "refusal", hint="; this model reads text only"
    ),
]


def _list_of(what: str, wrap: Callable[[str], Any]) -> BeforeValidator:
    """Reads a list, or a string as a list of one item. what: the items' name in errors."""

    def read(value: Any) -> Any:
        if not isinstance(value, str | list):
            raise ValueError(f"must be a string or a list of {what}")
        return [wrap(value)] if isinstance(value, str) else value

    return BeforeValidator(read)


Content = Annotated[
    list[Part], FIRST_ERROR, _list_of("parts", lambda text: {"type": "input_text", "text": text})
]


def text_of(content: Sequence[Part]) -> str:
    """The parts as one text."""

    def text(part: Part) -> str:
        if isinstance(part, JSONPart):
            return json.dumps(part.data, ensure_ascii=False)
        return part.refusal if isinstance(part, RefusalPart) else part.text

    return "\n".join(map(text, content))


class InputMessage(BaseModel):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content

    def for_template(self) -> dict[str, Any]:
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text_of(self.content)}


class FunctionCall(BaseModel):
    """An assistant's call of a function."""

    type: Literal["function_call"]
    call_id: StrictStr
    name: StrictStr
    arguments: Arguments

    def for_template(self) -> dict[str, Any]:
        return _call(self.name, self.arguments)


class CustomToolCall(BaseModel):
    """An assistant's call of a tool that takes plain text."""

    type: Literal["custom_tool_call"]
    call_id: StrictStr
    name: StrictStr
    input: StrictStr

    def for_template(self) -> dict[str, Any]:
        return _call(self.name, {"input": self.input})


class CallOutput(BaseModel):
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
    Annotated[InputMessage, Tag(branch("message"))]
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


def _check_not_empty(items: list[Item]) -> list[Item]:
    if all(isinstance(item, InputMessage) and not text_of(item.content).strip() for item in items):
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
        elif not isinstance(item, InputMessage):
            called.add((item.type, item.call_id))
    return items


# A string, which is the user's message, or a conversation.
Items = Annotated[
    list[Item],
    FIRST_ERROR,
    Field(min_length=1, max_length=MAX_MESSAGES),
    _list_of("messages", lambda text: {"role": "user", "content": text}),
    AfterValidator(_check_not_empty),
    AfterValidator(_check_calls),
]


def conversation(items: Sequence[Item]) -> list[dict[str, Any]]:
    """The items as messages for chat templates; calls belong to the answer before them."""
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
