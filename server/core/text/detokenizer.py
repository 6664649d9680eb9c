"""From token ids to pieces of text, without broken characters or parts of stop strings."""

import codecs
from collections.abc import Sequence

import regex

from server.core.text.markers import find_marker


class Detokenizer:
    """Joins token bytes to text, and holds back what may become a stop string.

    Bytes that are not UTF-8 are left out, so a piece never contains a broken character.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        stop: Sequence[str] = (),
        *,
        stop_until: regex.Pattern[str] | None = None,
    ) -> None:
        """token_bytes: by token id; stop: non-empty strings that end the text.

        stop_until: pattern; stop strings are ignored from its match on.
        """
        assert all(stop)
        self.token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._stop = stop
        self._stop_until = stop_until if stop else None
        self._held = ""
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """Adds a token and returns the text that is final; "" once `is_stopped`."""
        if self.is_stopped:
            return ""
        self._held += self._decoder.decode(self.token_bytes[token_id])
        pattern = self._stop_until
        until = pattern.search(self._held, partial=True) if pattern else None
        # The stop string that is complete first, so that token boundaries do not matter.
        begin, marker = find_marker(self._held, self._stop)
        if until is None:
            return self._stop_at(begin) if marker else self._release(begin)
        if not until.partial and (until.start() <= begin or until.end() <= begin + len(marker)):
            self._stop, self._stop_until = [], None
            return self._release(len(self._held))
        if marker and begin < until.start():
            return self._stop_at(begin)
        # A stop string within a partial match waits until the match is complete or fails.
        return self._release(min(begin, until.start()))

    def flush(self) -> str:
        """Ends the text and returns what was held back, up to a stop string."""
        begin, marker = find_marker(self._held, self._stop)
        return self._stop_at(begin) if marker else self._release(len(self._held))

    def _stop_at(self, length: int) -> str:
        self.is_stopped = True
        piece, self._held = self._held[:length], ""
        return piece

    def _release(self, length: int) -> str:
        piece, self._held = self._held[:length], self._held[length:]
        return piece
