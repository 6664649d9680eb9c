"""Token ids -> text pieces: never half a character, never the start of a stop string."""

import codecs
from collections.abc import Sequence

import regex

from server.core.text.markers import find_marker


class Detokenizer:
    """Joins token bytes to text and holds back what might become a stop string.

    Bytes that are no UTF-8 are left out, so a piece never contains a broken character.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        stop: Sequence[str] = (),
        *,
        stop_until: regex.Pattern[str] | None = None,
    ) -> None:
        """token_bytes: by token id; stop: non-empty strings that end the text.

        stop_until: what no stop string cuts, and what none counts behind.
        """
        assert all(stop)
        self.token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._stop = stop
        self._stop_until = stop_until if stop else None
        self._held = ""
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """The text that became certain. Once `is_stopped`, nothing more comes."""
        if self.is_stopped:
            return ""
        self._held += self._decoder.decode(self.token_bytes[token_id])
        pattern = self._stop_until
        until = pattern.search(self._held, partial=True) if pattern else None
        # The stop string that is complete first, so that token borders do not matter.
        begin, marker = find_marker(self._held, self._stop)
        if until is None:
            return self._stop_at(begin) if marker else self._release(begin)
        if not until.partial and (until.start() <= begin or until.end() <= begin + len(marker)):
            self._stop, self._stop_until = [], None
            return self._release(len(self._held))
        if marker and begin < until.start():
            return self._stop_at(begin)
        # A stop string that is part of it waits.
        return self._release(min(begin, until.start()))

    def flush(self) -> str:
        """The text held back, for a sequence that has ended. It may still hold a stop string."""
        begin, marker = find_marker(self._held, self._stop)
        return self._stop_at(begin) if marker else self._release(len(self._held))

    def _stop_at(self, length: int) -> str:
        self.is_stopped = True
        piece, self._held = self._held[:length], ""
        return piece

    def _release(self, length: int) -> str:
        piece, self._held = self._held[:length], self._held[length:]
        return piece
