"""Drafts the next tokens of a sequence: those that followed the same tokens earlier in it.

This is prompt lookup decoding (https://github.com/apoorvumang/prompt-lookup-decoding). A step of a
few rows takes hardly longer than one of a single row, so checking a draft costs little. Knows token
ids only.
"""

from collections.abc import Iterable

# Number of last tokens that must occur earlier in the sequence.
MIN_MATCH = 3
# Each draft whose first token is wrong raises that number by one, up to this.
MAX_MATCH = 8
_ID_BYTES = 4


class PromptLookup:
    """The tokens of one sequence, searchable."""

    def __init__(self, token_ids: Iterable[int]) -> None:
        self._bytes = bytearray(b"".join(map(_bytes_of, token_ids)))
        self._match = MIN_MATCH

    def append(self, token_id: int) -> None:
        """Appends a token."""
        self._bytes += _bytes_of(token_id)

    def draft(self, max_tokens: int) -> list[int]:
        """The tokens after the most recent earlier occurrence of the last ones; empty if none."""
        needle = self._bytes[-self._match * _ID_BYTES :]
        # A token must follow the match, and the match must begin at a token's first byte.
        at = self._bytes.rfind(needle, 0, -_ID_BYTES)
        while at > 0 and at % _ID_BYTES:
            at = self._bytes.rfind(needle, 0, at + len(needle) - 1)
        if at < 0:
            return []
        begin = at + len(needle)
        found = self._bytes[begin : begin + max_tokens * _ID_BYTES]
        return memoryview(found).cast("I").tolist()

    def learn(self, *, was_right: bool) -> None:
        """Records whether the first token of the last draft was right."""
        self._match = MIN_MATCH if was_right else min(self._match + 1, MAX_MATCH)


def _bytes_of(token_id: int) -> bytes:
    return token_id.to_bytes(_ID_BYTES, "little")
