"""Finds markers, such as stop strings, in a text that comes in pieces."""

from collections.abc import Sequence


def find_marker(text: str, markers: Sequence[str]) -> tuple[int, str]:
    """The position and the text of the marker that is complete first.

    If there is none: the position where one may begin, or else the end of the text, and "".
    """
    found = [(at + len(each), at, each) for each in markers if (at := text.find(each)) >= 0]
    if found:
        _, begin, marker = min(found)
        return begin, marker
    longest = max((len(marker) for marker in markers), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return len(text) - length, ""
    return len(text), ""
