"""/v1/chat/completions on the wire."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
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
from server.protocol.base import Number, Request

MAX_STOP_STRINGS = 4
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
# What stands in JSON for a probability of zero, as in OpenAI's reference.
MIN_LOGPROB = -9999.0

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


class StreamOptions(BaseModel):
    """What a stream holds beside the text."""

    include_usage: StrictBool = False

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data


def _stop_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class ChatCompletionRequest(Request):
    """Body of POST /v1/chat/completions."""

    model: StrictStr
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=2)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[
        list[Annotated[StrictStr, Field(min_length=1)]],
        Field(max_length=MAX_STOP_STRINGS, default_factory=list),
        BeforeValidator(_stop_list),
    ]
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] = 1
    logprobs: StrictBool = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    sentiment: StrictBool = True

    @field_validator("logit_bias")
    @classmethod
    def _check_token_ids(cls, logit_bias: dict[str, float]) -> dict[str, float]:
        for token_id in logit_bias:
            if not (token_id.isascii() and token_id.isdigit()):
                raise ValueError(f"{token_id!r} is no token id")
        return logit_bias

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "'stream_options' is only allowed when 'stream' is true.", param="stream_options"
            )
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError(
                "'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs"
            )
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and not _is_neutral(value, UNSUPPORTED[name]):
                raise InvalidRequestError(
                    f"'{name}' is not supported by this server; leave it out.",
                    param=name,
                    code="unsupported_parameter",
                )
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


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    # False == 0 in Python; a client that sends the one for the other is wrong all the same.
    return any(value == x and isinstance(value, bool) == isinstance(x, bool) for x in neutral)
