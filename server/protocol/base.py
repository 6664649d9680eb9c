"""Shared by all wire types: the parsing of requests, and common parts of responses.

Knows JSON and its validation, but neither HTTP nor the model. Response fields beyond OpenAI's
(`sentiment`, `context_length`) are top-level, where the openai client keeps them.
"""

import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self
from urllib.parse import quote

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictStr,
    ValidationError,
    model_validator,
)

from server.core.roles.classification import Classification
from server.errors import InvalidRequestError
from server.protocol.json_body import path_to_not_finite, read_json

logger = logging.getLogger(__name__)

_PRINTABLE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
# In place of pydantic's messages, which use the terms of Python.
_REASONS = {
    "missing": "is required",
    "model_type": "must be an object",
    "dict_type": "must be an object",
    "too_short": "must have {min_length} items or more, not {actual_length}",
    "too_long": "must have {max_length} items or fewer, not {actual_length}",
}


# For lists of any length: an error for each of a million items would take seconds and gigabytes.
FIRST_ERROR = Field(fail_fast=True)

# Further tasks to run on the last user message.
MAX_TASKS = 16
TaskNames = Annotated[
    list[StrictStr], FIRST_ERROR, Field(max_length=MAX_TASKS, default_factory=list)
]


def at_most(number: int) -> BeforeValidator:
    """Refuses a larger dict before its items are validated."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > number:
            raise ValueError(f"must have {number} items or fewer, not {len(value)}")
        return value

    return BeforeValidator(check)


class WithoutNulls(BaseModel):
    """Base of objects inside a request where explicit null counts as absent."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data


class RequestBody(WithoutNulls):
    """Base of all requests: explicit null counts as absent, unknown fields are accepted."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: StrictStr | None = None

    # Known parameters that are not fields: refused, or without effect.
    known: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Parses a JSON body. May take a tenth of a second for a body of megabytes.

        Raises:
            InvalidRequestError: the body is not JSON, or a field is invalid.
        """
        data = read_json(body)
        if not isinstance(data, dict):
            raise InvalidRequestError("The request body must be a JSON object.")
        if (path := path_to_not_finite(data)) is not None:
            raise _invalid(path, "must be a finite number")
        fields = {field.alias or name for name, field in cls.model_fields.items()}
        if unknown := data.keys() - fields - cls.known:
            logger.debug("%s: unknown parameters are ignored: %s", cls.__name__, unknown)
        given = {name: value for name, value in data.items() if name not in unknown}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise _as_invalid_request(error) from error


def usage(
    num_prompt_tokens: int, num_completion_tokens: int, num_cached_tokens: int
) -> dict[str, Any]:
    """The usage object of a response."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }


def input_usage(
    num_input: int, *, num_cached: int, num_kept: int, num_output: int
) -> dict[str, Any]:
    """The usage object of newer routes. num_kept: computed tokens that later prompts can reuse."""
    return {
        "input_tokens": num_input,
        "input_tokens_details": {"cached_tokens": num_cached, "cache_write_tokens": num_kept},
        "output_tokens": num_output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_input + num_output,
    }


def classification(result: Classification | None) -> dict[str, Any] | None:
    """The result object of chats, streams and /v1/classify."""
    if result is None:
        return None
    return {
        "label": result.label.value,
        "text": result.label.text,
        "emoji": result.label.emoji,
        "confidence": round(result.confidence, 6),
        "probabilities": [
            {"value": label.value, "probability": round(probability, 6)}
            for label, probability in result.probabilities
        ],
        **({} if result.score is None else {"score": round(result.score, 6)}),
        "cached": result.is_cached,
    }


def findings(
    sentiment: Classification | None,
    analyses: Mapping[str, Classification | list[str] | None],
) -> dict[str, Any]:
    """The response's fields about the last user message. analyses: results by task name."""
    fields: dict[str, Any] = {"sentiment": classification(sentiment)}
    if analyses:
        fields["analyses"] = {
            name: result if isinstance(result, list) else classification(result)
            for name, result in analyses.items()
        }
    return fields


def sentiment_headers(result: Classification | None) -> dict[str, str]:
    """The label's value as a header; all but printable ASCII is percent-encoded UTF-8."""
    return {"x-sentiment": quote(result.label.value, safe=_PRINTABLE)} if result else {}


def new_id(prefix: str) -> str:
    """A new response id such as `chatcmpl-1f…`."""
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    """`created`: seconds since the epoch."""
    return int(time.time())


def branch(name: str) -> str:
    """A tag for one branch of a union, in a form that errors do not show as a field."""
    return f"({name})"


def of_type(
    *expected: str, words: tuple[str, ...] = (), default: str | None = None, hint: str = ""
) -> Discriminator:
    """Discriminates objects by their field `type`; a string in `words` has the branch `word`."""

    def tag(value: Any) -> str | None:
        if isinstance(value, str):
            return branch("word") if value in words else None
        is_json = isinstance(value, dict)
        # When a request is dumped, the value is a model.
        kind = value.get("type", default) if is_json else getattr(value, "type", None)
        return branch(kind) if kind in expected else None

    return Discriminator(
        tag,
        custom_error_type="type",
        custom_error_message=(
            f"must be {''.join(f'{word!r}, ' for word in words)}{'or ' if words else ''}"
            f"an object of type {', '.join(expected)}{hint}"
        ),
    )


def _as_invalid_request(error: ValidationError) -> InvalidRequestError:
    """The first validation error, as a sentence that names the field."""
    first = error.errors(include_url=False, include_input=False)[0]
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] in _REASONS:
        reason = _REASONS[first["type"]].format(**first.get("ctx", {}))
    return _invalid(first["loc"], reason)


def _invalid(path: Sequence[str | int], reason: str) -> InvalidRequestError:
    """path: of the field. reason: what is wrong with its value, without a full stop."""
    param = ""
    for part in path:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part in ("str", "list[str]", "float", "int") or "[" in str(part):
            break  # a branch of a union, not a field
        elif part != branch(part[1:-1]):
            param += f".{part}" if param else str(part)
    if not param:
        return InvalidRequestError(f"{reason[0].upper()}{reason[1:]}.")
    return InvalidRequestError(f"'{param}': {reason}.", param=param)


def refuse_unsupported(
    given: Mapping[str, Any] | None, unsupported: Mapping[str, tuple[Any, ...]]
) -> None:
    """Refuses parameters that would be ignored, unless their value means "off".

    Raises:
        InvalidRequestError: a parameter has another value.
    """
    for name, value in (given or {}).items():
        if name in unsupported and not _is_neutral(value, unsupported[name]):
            raise InvalidRequestError(
                f"'{name}' is not supported by this server; leave it out.",
                param=name,
                code="unsupported_parameter",
            )


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if item is not None}
    # False == 0 in Python, but not in JSON.
    return any(value == x and isinstance(value, bool) == isinstance(x, bool) for x in neutral)
