"""Parses JSON within bounds, so that no body of a few megabytes blocks the event loop for long.

Parsing holds Python's global lock, on any thread. Its duration depends on the number of values
rather than bytes, so the values are counted first.
"""

import codecs
import math
import re
from typing import Any

from pydantic_core import from_json

from server.errors import InvalidRequestError

# A unit takes about 60 ns. A list, an object and each field count four units, other values one.
MAX_UNITS = 2**19
UNITS_PER_NESTED = 4
_MAX_SPLITS = 2**18
# Any escape in a string; the group matches a lone surrogate.
_ESCAPE = re.compile(rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F]..)|.)", re.DOTALL)


def read_json(body: bytes) -> Any:
    """The parsed JSON. NaN, Infinity and numbers beyond a float's range become floats.

    Raises:
        InvalidRequestError: the body is not JSON, or holds too many values.
    """
    if _num_units(body) > MAX_UNITS and _num_units(_without_strings(body)) > MAX_UNITS:
        raise InvalidRequestError(
            "The request holds too many values: at most "
            f"{MAX_UNITS // UNITS_PER_NESTED} lists, objects and fields, or {MAX_UNITS} numbers. "
            "Send more in several requests."
        )
    try:
        return from_json(body.removeprefix(codecs.BOM_UTF8), cache_strings="none")
    except ValueError as error:
        lone = next((escape[1] for escape in _ESCAPE.finditer(body) if escape[1]), None)
        if lone is not None:
            raise InvalidRequestError(
                f"The request holds a lone surrogate, '\\{lone.decode(errors='replace')}', "
                "which is not a character; send whole characters."
            ) from error
        raise InvalidRequestError(f"The request body is not valid JSON: {error}.") from error


def path_to_not_finite(value: Any) -> list[str | int] | None:
    """The keys and indexes of the first number that is NaN or infinite; None: there is none."""
    if not isinstance(value, list | dict):
        return None
    values = value.values() if isinstance(value, dict) else value
    # Mostly in C, for there may be half a million values.
    kinds = set(map(type, values))
    if kinds.isdisjoint((list, dict)) and (
        float not in kinds or all(map(math.isfinite, [v for v in values if type(v) is float]))
    ):
        return None
    keys = value if isinstance(value, dict) else range(len(value))
    for key, item in zip(keys, values, strict=True):
        if type(item) is float and not math.isfinite(item):
            return [key]
        if (path := path_to_not_finite(item)) is not None:
            return [key, *path]
    return None


def _num_units(text: bytes) -> int:
    num_nested = text.count(b"[") + text.count(b"{") + text.count(b":")
    return text.count(b",") + text.count(b'"') // 2 + UNITS_PER_NESTED * num_nested


def _without_strings(body: bytes) -> bytes:
    """The JSON with its strings emptied, but unchanged after _MAX_SPLITS quotes."""
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    return b'""'.join(bare.split(b'"', _MAX_SPLITS)[::2])
