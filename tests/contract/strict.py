"""Strict validation against the openai package's own types."""

from collections.abc import Iterator
from typing import Any

import pydantic


def assert_is(kind: Any, value: Any, ours: frozenset[str] = frozenset()) -> None:
    """Asserts that the value has every required field of the type, and no unknown one.

    ours: dotted paths of fields this server adds.
    """
    parsed = pydantic.TypeAdapter(kind).validate_python(value)
    unknown = set(_extras(parsed, ""))
    assert unknown <= ours, f"{kind} does not know {sorted(unknown - ours)}"


def _extras(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, pydantic.BaseModel):
        yield from (f"{path}{name}" for name in value.model_extra or {})
        for name in value.model_fields_set & set(type(value).model_fields):
            yield from _extras(getattr(value, name), f"{path}{name}.")
    elif isinstance(value, list):
        for item in value:
            yield from _extras(item, path)
