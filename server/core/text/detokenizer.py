"""Token ids -> text pieces: never half a character, never the start of a stop string."""

import codecs
from collections.abc import Sequence

from server.core.text.markers import find_marker


class Detokenizer:
    """Joins token bytes to text and holds back what might become a stop string.

    Bytes that are no UTF-8 are left out, so a piece never contains a broken character.
    """

    def __init__(
        self, token_bytes: Sequence[bytes], stop: Sequence[str] = (), *, stop_until: str = ""
    ) -> None:
        """token_bytes: by token id; stop: non-empty strings that end the text.

        stop_until: a string from which on nothing ends the text any more; "" for none.
        """
        assert all(stop)
        self.token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._stop = stop
        self._stop_until = [stop_until] if stop_until else []
        self._held = ""
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """The text that became certain. Once `is_stopped`, nothing more comes."""
        if self.is_stopped:
            return ""
        self._held += self._decoder.decode(self.token_bytes[token_id])
        # The marker that is complete first, so that token borders do not matter.
        begin, marker = find_marker(self._held, [*self._stop, *self._stop_until])
        if not marker:
            return self._release(begin)
        if marker in self._stop_until:
            self._stop, self._stop_until = [], []
            return self._release(len(self._held))
        self.is_stopped = True
        return self._release(begin, forget_rest=True)

    def flush(self) -> str:
        """The text held back, for a sequence that has ended without a stop string."""
        return self._release(len(self._held))

    def _release(self, length: int, forget_rest: bool = False) -> str:
        piece, rest = self._held[:length], self._held[length:]
        self._held = "" if forget_rest else rest
        return piece
