"""/v1/chat/completions on the wire."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import Field, StrictBool, StrictInt, model_validator

from server.core.text.grammar import OutputFormat
from server.core.text.tools import ToolCall
from server.errors import InvalidRequestError
from server.protocol.base import TaskNames, refuse_unsupported
from server.protocol.messages import MAX_MESSAGES, ChatMessage
from server.protocol.sampling import MAX_TOP_LOGPROBS, ChoicesRequest
from server.protocol.tools import (
    MAX_TOOLS,
    ResponseFormat,
    ToolChoice,
    ToolDefinition,
    output_format,
)

# Known parameters that this server does not support, with the values that mean "off". Clients send
# these values by habit. Any other value is refused rather than silently ignored.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Known parameters that cannot change the text of a reply.
WITHOUT_EFFECT = (
    "metadata", "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "user",
)  # fmt: skip


class ChatCompletionRequest(ChoicesRequest):
    """Body of POST /v1/chat/completions."""

    known = frozenset({*UNSUPPORTED, *WITHOUT_EFFECT})

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS, default_factory=list)]
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: StrictBool = True
    sentiment: StrictBool = True
    tasks: TaskNames

    def output(self) -> OutputFormat:
        """The format of the answer. Raises as `output_format`."""
        return output_format(
            self.response_format, self.tools, self.tool_choice, self.parallel_tool_calls
        )

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError(
                "'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs"
            )
        refuse_unsupported(self.model_extra, UNSUPPORTED)
        return self


def message(text: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    """The assistant's message. With calls and no text, its content is null."""
    content = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
    tool_calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in calls
    ]
    return {**content, "tool_calls": tool_calls} if calls else content
