"""/v1/responses on the wire. Responses are not stored, so requests cannot refer to earlier ones."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, StrictBool, StrictInt, StrictStr, model_validator

from server.core.text.grammar import OutputFormat
from server.core.text.tools import ToolCall
from server.errors import InvalidRequestError
from server.protocol.base import FIRST_ERROR, TaskNames, WithoutNulls, at_most, refuse_unsupported
from server.protocol.items import Items, conversation
from server.protocol.sampling import MAX_TOP_LOGPROBS, SamplingRequest
from server.protocol.tools import (
    MAX_TOOLS,
    ResponseFormat,
    TextFormat,
    ToolChoice,
    ToolDefinition,
    flat,
    nested,
    output_format,
)

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "moderation": (),
    "prompt": (),
    "reasoning": ({}, {"effort": "none"}),
    "truncation": ("disabled",),
}
# `max_tool_calls` is for tools that run on the server, of which there are none.
WITHOUT_EFFECT = (
    "access_programs", "max_tool_calls", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "safety_identifier", "service_tier", "store", "stream_options",
    "user",
)  # fmt: skip
LOGPROBS = "message.output_text.logprobs"
MAX_METADATA = 16  # as at OpenAI


class TextOptions(WithoutNulls):
    """The format of the text."""

    format: Annotated[ResponseFormat, BeforeValidator(nested)] = TextFormat()
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(SamplingRequest):
    """Body of POST /v1/responses."""

    known = frozenset({*UNSUPPORTED, *WITHOUT_EFFECT})

    input: Items
    instructions: StrictStr | None = None
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    text: TextOptions = TextOptions()
    tools: Annotated[
        list[Annotated[ToolDefinition, BeforeValidator(nested)]],
        Field(max_length=MAX_TOOLS, default_factory=list),
    ]
    tool_choice: Annotated[ToolChoice, BeforeValidator(nested)] = "auto"
    parallel_tool_calls: StrictBool = True
    # Only LOGPROBS has an effect: this server has nothing else to include.
    include: Annotated[list[StrictStr], FIRST_ERROR, Field(default_factory=list)]
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    metadata: Annotated[dict[str, StrictStr], Field(default_factory=dict), at_most(MAX_METADATA)]
    previous_response_id: StrictStr | None = None
    sentiment: StrictBool = True
    tasks: TaskNames

    @property
    def has_logprobs(self) -> bool:
        """Whether tokens come with their log-probabilities."""
        return LOGPROBS in self.include

    def output(self) -> OutputFormat:
        """The format of the answer. Raises as `output_format`."""
        return output_format(
            self.text.format, self.tools, self.tool_choice, self.parallel_tool_calls
        )

    def formats(self) -> dict[str, Any]:
        """`text`, `tools` and `tool_choice`, as the response repeats them."""
        names = {"text", "tools", "tool_choice"}
        given = self.model_dump(include=names, by_alias=True, exclude_none=True)
        return {
            "text": {**given["text"], "format": flat(given["text"]["format"])},
            "tools": [flat(tool) for tool in given["tools"]],
            "tool_choice": flat(given["tool_choice"]),
        }

    def messages(self) -> list[dict[str, Any]]:
        """The conversation in the form that chat templates read."""
        messages = conversation(self.input)
        if self.instructions is None:
            return messages
        return [{"role": "system", "content": self.instructions}, *messages]

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.previous_response_id is not None:
            raise InvalidRequestError(
                "'previous_response_id': this server keeps no responses; send the whole "
                "conversation in 'input'.",
                param="previous_response_id",
                code="unsupported_parameter",
            )
        if self.top_logprobs and not self.has_logprobs:
            raise InvalidRequestError(
                f"'top_logprobs' is only allowed when 'include' has {LOGPROBS!r}.",
                param="top_logprobs",
            )
        refuse_unsupported(self.model_extra, UNSUPPORTED)
        return self


# --- the response ---------------------------------------------------------------------


def text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    """The text of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def message_item(item_id: str, status: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """A message of the answer."""
    return {
        "id": item_id, "type": "message", "role": "assistant", "status": status, "content": parts
    }  # fmt: skip


def call_item(item_id: str, status: str, call: ToolCall, arguments: str) -> dict[str, Any]:
    """A call in the answer."""
    return {
        "id": item_id, "type": "function_call", "status": status, "call_id": call.id,
        "name": call.name, "arguments": arguments,
    }  # fmt: skip
