"""Messages of a conversation on the wire, and in the form that chat templates read."""

import reprlib
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictStr,
    ValidationInfo,
    model_validator,
)

from server.errors import InvalidRequestError
from server.protocol.base import FIRST_ERROR, WithoutNulls
from server.protocol.json_body import path_to_not_finite, read_json


def _joined(content: Any, info: ValidationInfo) -> Any:
    if isinstance(content, list):
        kinds = ("text", "refusal") if info.data.get("role") == "assistant" else ("text",)
        return "".join(_text_of(part, kinds) for part in content)
    if not isinstance(content, str):
        raise ValueError("must be a string or a list of text parts")
    return content


def _as_value(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        raise ValueError("must be a string")
    try:
        value = read_json(arguments.strip().encode() or b"{}")
    except InvalidRequestError:
        return arguments
    return arguments if path_to_not_finite(value) else value


MAX_MESSAGES = 2048

# A string or text parts, which are joined. An assistant's refusal is text, too.
Text = Annotated[str, BeforeValidator(_joined)]
# The value of the JSON in a string. Invalid JSON, as of a call that was cut off, stays a string.
Arguments = Annotated[Any, BeforeValidator(_as_value)]


class CalledFunction(BaseModel):
    """The function that an earlier answer called, and its arguments."""

    name: Annotated[StrictStr, Field(min_length=1)]
    arguments: Arguments


class CalledTool(WithoutNulls):
    """A call of an earlier answer."""

    id: StrictStr = ""
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """The call for chat templates, which read the arguments as an object."""
        return {"id": self.id, "type": "function", "function": self.function.model_dump()}


class ChatMessage(BaseModel):
    """One message of the conversation, its content joined to one string."""

    model_config = ConfigDict(frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text = ""
    tool_calls: Annotated[list[CalledTool], FIRST_ERROR, Field(default_factory=list)]

    @model_validator(mode="before")
    @classmethod
    def _check_kind(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError("a message must be an object with 'role' and 'content'")
        given = {key: value for key, value in data.items() if value is not None}
        role = given.get("role")
        if given.get("function_call"):
            raise ValueError("'function_call' is not supported; use 'tool_calls'")
        if given.get("tool_calls") and role != "assistant":
            raise ValueError("only the assistant has 'tool_calls'")
        if role == "tool" and not isinstance(given.get("tool_call_id"), str):
            raise ValueError("'tool_call_id' is missing: give the id of the call it answers")
        if "content" not in given and role not in ("assistant", "function"):
            raise ValueError("'content' is missing: give a string or a list of text parts")
        if role == "assistant" and "refusal" in given:
            # A refusal comes in place of the content, or with an empty one.
            return {**given, "content": given.get("content") or given["refusal"]}
        return given

    def for_template(self) -> dict[str, Any]:
        """The message in the form that chat templates read."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        message: dict[str, Any] = {"role": role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message


def _text_of(part: Any, kinds: tuple[str, ...]) -> str:
    kind = part.get("type") if isinstance(part, dict) else part
    if not isinstance(part, dict) or kind not in kinds:
        raise ValueError(
            f"content part {reprlib.repr(kind)} is not supported: this model reads text only"
        )
    text = part.get(kind)
    if not isinstance(text, str):
        raise ValueError(f"a {kind} part needs a string {kind!r}")
    return text
