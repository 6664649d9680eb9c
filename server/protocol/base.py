"""What all wire types share: how a request is read, and what every response repeats.

Knows JSON and its rules, nothing of HTTP or the model. Response fields beyond OpenAI's
(`sentiment`, `context_length`) are top-level, where the openai client keeps them.
"""

import json
import logging
import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self
from urllib.parse import quote

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    ValidationError,
    model_validator,
)

from server.core.roles.classifier import Classification
from server.errors import InvalidRequestError

logger = logging.getLogger(__name__)

_PRINTABLE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
# What pydantic says in terms of Python.
_REASONS = {
    "missing": "is required",
    "model_type": "must be an object",
    "dict_type": "must be an object",
    "too_short": "must have {min_length} items or more, not {actual_length}",
    "too_long": "must have {max_length} items or fewer, not {actual_length}",
}


def _to_float(value: Any) -> float:
    # bool is an int to Python, but not to JSON.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError("is too large") from error


# For lists of any length: a message per item, for a million items, takes seconds and gigabytes.
FIRST_ERROR = Field(fail_fast=True)

Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_to_float)]


class Options(BaseModel):
    """Base of objects inside a request in which explicit null counts as absent."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data


class Request(BaseModel):
    """Base of all requests: explicit null counts as absent, unknown fields are accepted."""

    model_config = ConfigDict(extra="allow", frozen=True)

    # Parameters that are no fields, but known: refused, or without effect.
    known: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError("the request body must be a JSON object")
        return {key: value for key, value in data.items() if value is not None}

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Reads a JSON body.

        Raises:
            InvalidRequestError: it is no JSON, or a field is wrong; names the field.
        """
        try:
            data = json.loads(body)
            # A lone surrogate survives JSON's escapes but is no character.
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"The request holds a lone surrogate, {error.object[error.start]!a}, "
                "which is no character; send whole characters."
            ) from error
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"The request body is not valid JSON: {error}.") from error
        try:
            request = cls.model_validate(data)
        except ValidationError as error:
            raise _as_invalid_request(error) from error
        if unknown := sorted(set(request.model_extra or ()) - cls.known):
            logger.debug("%s: unknown parameters are ignored: %s", cls.__name__, unknown)
        return request


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


def usage(
    num_prompt_tokens: int, num_completion_tokens: int, num_cached_tokens: int
) -> dict[str, Any]:
    """The usage object of a response."""
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_completion_tokens,
        total_tokens=num_prompt_tokens + num_completion_tokens,
        prompt_tokens_details={"cached_tokens": num_cached_tokens},
    ).model_dump()


def classification(result: Classification | None) -> dict[str, Any] | None:
    """The result object, the same in chats, streams and /v1/classify."""
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


def sentiment_headers(result: Classification | None) -> dict[str, str]:
    """The label's value as a header; what a header cannot hold is percent-encoded UTF-8."""
    return {"x-sentiment": quote(result.label.value, safe=_PRINTABLE)} if result else {}


def new_id(prefix: str) -> str:
    """A fresh response id such as `chatcmpl-1f…`."""
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    """`created`: seconds since the epoch."""
    return int(time.time())


def branch(name: str) -> str:
    """A tag for one branch of a union, which is then not taken for a field in errors."""
    return f"({name})"


def of_type(
    *expected: str, words: tuple[str, ...] = (), default: str | None = None, hint: str = ""
) -> Discriminator:
    """Chooses among objects by their field `type`, and the branch `word` for one of the words."""

    def tag(value: Any) -> str | None:
        if isinstance(value, str):
            return branch("word") if value in words else None
        is_json = isinstance(value, dict)
        # A model where it is written rather than read.
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
    """The first thing wrong with a request, as a sentence that names the field."""
    first = error.errors(include_url=False)[0]
    param = ""
    for part in first["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part in ("str", "list[str]", "float", "int") or "[" in str(part):
            break  # a branch of a union, not a field
        elif part != branch(part[1:-1]):
            param += f".{part}" if param else str(part)
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] in _REASONS:
        reason = _REASONS[first["type"]].format(**first.get("ctx", {}))
    if not param:
        return InvalidRequestError(f"{reason[0].upper()}{reason[1:]}.")
    return InvalidRequestError(f"'{param}': {reason}.", param=param)


def refuse_unsupported(
    given: Mapping[str, Any] | None, unsupported: Mapping[str, tuple[Any, ...]]
) -> None:
    """Refuses parameters that would be ignored, unless they stand at a value that means "off".

    Raises:
        InvalidRequestError: one does not; names it.
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
    # False == 0 in Python; a client that sends the one for the other is wrong all the same.
    return any(value == x and isinstance(value, bool) == isinstance(x, bool) for x in neutral)
