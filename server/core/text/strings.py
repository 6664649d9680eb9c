"""Functions on all strings in a JSON value, at any depth."""

from collections.abc import Callable, Mapping
from typing import Any


def map_strings(value: Any, function: Callable[[str], Any]) -> Any:
    """The value with the function applied to every string and key."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {function(key): map_strings(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, function) for item in value]
    return value


def unused_char(value: Any) -> str | None:
    """A private-use character that does not occur in the value; None: all of them do."""
    used: set[str] = set()
    map_strings(value, used.update)
    return next((char for char in map(chr, range(0xE000, 0xF900)) if char not in used), None)
