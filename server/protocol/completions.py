"""/v1/completions on the wire: OpenAI's older route, which continues raw text."""

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)

from server.core.engine.sequence import TokenEvent
from server.errors import InvalidRequestError
from server.protocol.base import FIRST_ERROR, refuse_unsupported
from server.protocol.sampling import ChoicesRequest, finite

DEFAULT_MAX_TOKENS = 16
# vLLM's limits; OpenAI's are 5 and 0.
MAX_LOGPROBS, MAX_LOGPROB_TOKEN_IDS = 20, 128
MAX_STOP_TOKEN_IDS = 128
# Choices of one request, over all its prompts.
MAX_TOTAL_CHOICES = 256
# Known parameters that this server does not support, with the values that mean "off".
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),  # or equal to `n`
    "suffix": ("",),
}
# Known parameters that cannot change the text.
WITHOUT_EFFECT = ("user",)


def _is_prompt(value: Any) -> bool:
    # bool is an int to Python, but not to JSON.
    return isinstance(value, str) or (isinstance(value, list) and set(map(type, value)) <= {int})


def _by_param(prompt: Any) -> dict[str, str | list[int]]:
    if _is_prompt(prompt):
        return {"prompt": prompt}
    if isinstance(prompt, list) and all(map(_is_prompt, prompt[: MAX_TOTAL_CHOICES + 1])):
        if len(prompt) > MAX_TOTAL_CHOICES:
            raise ValueError(f"must have {MAX_TOTAL_CHOICES} items or fewer, not {len(prompt)}")
        return {f"prompt[{i}]": one for i, one in enumerate(prompt)}
    raise ValueError("must be a string, a list of token ids, or a list of either kind")


class StructuredOutputs(BaseModel):
    """The format of each completion, as in vLLM's API. Exactly one field is given.

    json_schema: of the JSON that the completion must be. grammar: in llguidance's Lark syntax.
    """

    model_config = ConfigDict(extra="forbid")

    json_schema: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    grammar: Annotated[StrictStr, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check_number(self) -> Self:
        if (self.json_schema is None) == (self.grammar is None):
            raise ValueError("must have either 'json' or 'grammar'")
        return self


class CompletionRequest(ChoicesRequest):
    """Body of POST /v1/completions.

    prompts: texts and token ids to continue, by their field in the request.
    Fields that OpenAI does not have are vLLM's, so that this server can be another one's --engine.
    """

    known = frozenset({*UNSUPPORTED, *WITHOUT_EFFECT})

    prompts: Annotated[dict[str, str | list[int]], Field(alias="prompt"), PlainValidator(_by_param)]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = DEFAULT_MAX_TOKENS
    echo: StrictBool = False
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    logprob_token_ids: Annotated[
        list[StrictInt], FIRST_ERROR, Field(max_length=MAX_LOGPROB_TOKEN_IDS, default_factory=list)
    ]
    return_token_ids: StrictBool = False
    return_tokens_as_token_ids: StrictBool = False
    stop_token_ids: Annotated[
        list[StrictInt], FIRST_ERROR, Field(max_length=MAX_STOP_TOKEN_IDS, default_factory=list)
    ]
    ignore_eos: StrictBool = False
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _check_prompts(self) -> Self:
        for param, prompt in self.prompts.items():
            if not prompt:
                raise InvalidRequestError(
                    f"'{param}' is empty; give something for the model to continue.", param=param
                )
        if len(self.prompts) * self.n > MAX_TOTAL_CHOICES:
            raise InvalidRequestError(
                f"'prompt': {len(self.prompts)} prompts, each continued 'n' = {self.n} times, are "
                f"more than the {MAX_TOTAL_CHOICES} choices one request may have; send more in "
                "several requests.",
                param="prompt",
            )
        return self

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise InvalidRequestError(
                "'echo' is not allowed with 'logprobs': the log-probabilities of the prompt are "
                "not computed. Leave one of them out.",
                param="echo",
            )
        if self.logprob_token_ids and self.logprobs is None:
            raise InvalidRequestError(
                "'logprob_token_ids' is only allowed with 'logprobs'.", param="logprob_token_ids"
            )
        refuse_unsupported(self.model_extra, {**UNSUPPORTED, "best_of": (1, self.n)})
        return self


class LogprobsWriter:
    """Writes the `logprobs` of one choice, all at once or piece by piece."""

    def __init__(
        self, token_bytes: Sequence[bytes], decode: Callable[[Sequence[int]], str], *,
        is_by_id: bool = False,
    ) -> None:  # fmt: skip
        """token_bytes: UTF-8 by token id, empty for special tokens. decode: also decodes these.

        is_by_id: whether tokens are named by their ids.
        """
        self._token_bytes, self._decode, self._is_by_id = token_bytes, decode, is_by_id
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._num_chars = 0

    def write(self, tokens: Sequence[TokenEvent]) -> dict[str, list[Any]]:
        """The object for the next tokens."""
        return {
            "tokens": [self._name(token.token_id) for token in tokens],
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [self._likeliest(token) for token in tokens],
            "text_offset": [self._offset(token.token_id) for token in tokens],
        }

    def _likeliest(self, token: TokenEvent) -> dict[str, float]:
        """The log-probabilities of the likeliest tokens, and of the one that was sampled."""
        entries = [*token.top_logprobs, (token.token_id, token.logprob)]
        return {self._name(token_id): finite(logprob) for token_id, logprob in entries}

    def _offset(self, token_id: int) -> int:
        """Where the token begins, in characters of the text."""
        offset = self._num_chars
        self._num_chars += len(self._decoder.decode(self._token_bytes[token_id]))
        return offset

    def _name(self, token_id: int) -> str:
        """The token's text; if it is not UTF-8, its bytes in OpenAI's notation.

        Names are keys of `top_logprobs`, so they must be unique.
        """
        if self._is_by_id:
            return f"token_id:{token_id}"
        data = self._token_bytes[token_id]
        if not data:
            return self._decode([token_id])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
