"""/v1/chat/completions on the wire."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)

from server.core.sequence import TokenEvent
from server.errors import InvalidRequestError
from server.protocol.base import refuse_unsupported
from server.protocol.sampling import MIN_LOGPROB, SamplingRequest

MAX_TOP_LOGPROBS = 20

# Known parameters this server does not implement, with the values that mean "off". Clients
# send those by habit; any other value would be silently ignored, so it is refused.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Known parameters that cannot change the text of a reply.
WITHOUT_EFFECT = (
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)


class TextPart(BaseModel):
    """A part of a message's content. Only text can be read by the model."""

    type: Literal["text"]
    text: StrictStr


class Message(BaseModel):
    """One message of the conversation, its content joined to one string."""

    model_config = ConfigDict(frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str = ""

    @model_validator(mode="before")
    @classmethod
    def _check_kind(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError("a message must be an object with 'role' and 'content'")
        if data.get("tool_calls") or data.get("function_call"):
            raise ValueError("tool calls are not supported")
        role = data.get("role")
        if data.get("content") is None:
            if role != "assistant":
                raise ValueError("'content' is missing: give a string or a list of text parts")
            return {**data, "content": ""}
        return data

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, content: Any) -> Any:
        if isinstance(content, list):
            return "".join(_text_of(part) for part in content)
        if not isinstance(content, str):
            raise ValueError("must be a string or a list of text parts")
        return content

    def for_template(self) -> dict[str, str]:
        """The message as chat templates know it."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content}


class ChatCompletionRequest(SamplingRequest):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    sentiment: StrictBool = True

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError(
                "'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs"
            )
        refuse_unsupported(self.model_extra, UNSUPPORTED)
        return self


def logprobs_content(
    tokens: Sequence[TokenEvent], token_bytes: Sequence[bytes]
) -> list[dict[str, Any]]:
    """`logprobs.content`: the tokens with their log-probabilities and UTF-8 bytes."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        assert logprob is not None
        data = token_bytes[token_id]
        return {
            "token": data.decode(errors="replace"),  # a token may be half a character
            "logprob": max(logprob, MIN_LOGPROB),
            "bytes": list(data),
        }

    return [
        entry(token.token_id, token.logprob)
        | {"top_logprobs": [entry(*alternative) for alternative in token.top_logprobs]}
        for token in tokens
    ]


def _text_of(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else part
        raise ValueError(f"content part {kind!r} is not supported: this model reads text only")
    text = part.get("text")
    if not isinstance(text, str):
        raise ValueError("a text part needs a string 'text'")
    return text
