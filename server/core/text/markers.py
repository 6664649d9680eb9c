"""Finds markers, such as stop strings, in a text that comes in pieces."""

from collections.abc import Sequence


def find_marker(text: str, markers: Sequence[str]) -> tuple[int, str]:
    """Where a marker begins, and which: of several the one that is complete first.

    If there is none, "" and the length of the text before what may become one.
    """
    found = [(at + len(one), at, one) for one in markers if (at := text.find(one)) >= 0]
    if found:
        _, begin, marker = min(found)
        return begin, marker
    longest = max((len(marker) for marker in markers), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return len(text) - length, ""
    return len(text), ""
