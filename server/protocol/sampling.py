"""Shared by all requests for generated text: sampling parameters and log-probabilities."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import (
    BeforeValidator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)

from server.core.engine.sequence import TokenEvent
from server.errors import InvalidRequestError
from server.protocol.base import RequestBody, WithoutNulls, at_most

MAX_STOP_STRINGS = 4
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 4096
# The lowest log-probability in JSON, as in OpenAI's reference.
MIN_LOGPROB = -9999.0
# No vocabulary has a billion tokens, and Python parses no number of more than 4,300 digits.
_TOKEN_ID = re.compile("[0-9]{1,9}")


class StreamOptions(WithoutNulls):
    """What a stream contains besides the text."""

    include_usage: StrictBool = False


def _stop_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class SamplingRequest(RequestBody):
    """Fields of all routes that generate text. None: the checkpoint's own value."""

    model: StrictStr
    stream: StrictBool = False
    temperature: Annotated[StrictFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[StrictFloat, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1)] | None = None
    min_p: Annotated[StrictFloat, Field(ge=0, le=1)] = 0.0
    frequency_penalty: Annotated[StrictFloat, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[StrictFloat, Field(ge=-2, le=2)] = 0.0
    # Logits are divided by it; a smaller value could make them infinite.
    repetition_penalty: Annotated[StrictFloat, Field(ge=0.01, le=2)] | None = None
    logit_bias: Annotated[
        dict[str, Annotated[StrictFloat, Field(ge=-100, le=100)]],
        Field(default_factory=dict),
        at_most(MAX_BIASES),
    ]
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[
        list[Annotated[StrictStr, Field(min_length=1)]],
        Field(max_length=MAX_STOP_STRINGS, default_factory=list),
        BeforeValidator(_stop_list),
    ]

    @field_validator("logit_bias")
    @classmethod
    def _check_token_ids(cls, logit_bias: dict[str, float]) -> dict[str, float]:
        for token_id in logit_bias:
            if not _TOKEN_ID.fullmatch(token_id):
                raise ValueError(f"{token_id[:20]!r} is not a token id")
        return logit_bias


class ChoicesRequest(SamplingRequest):
    """Fields of the routes that answer with choices."""

    stream_options: StreamOptions | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] = 1

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "'stream_options' is only allowed when 'stream' is true.", param="stream_options"
            )
        return self


def finite(logprob: float | None) -> float:
    """A requested log-probability, limited to what JSON can represent."""
    assert logprob is not None
    return max(logprob, MIN_LOGPROB)


def logprobs_content(
    tokens: Sequence[TokenEvent], token_bytes: Sequence[bytes]
) -> list[dict[str, Any]]:
    """`logprobs.content`: the tokens with their log-probabilities and UTF-8 bytes."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        data = token_bytes[token_id]
        return {
            "token": data.decode(errors="replace"),  # a token may be half a character
            "logprob": finite(logprob),
            "bytes": list(data),
        }

    return [
        entry(token.token_id, token.logprob)
        | {"top_logprobs": [entry(*alternative) for alternative in token.top_logprobs]}
        for token in tokens
    ]
