"""Token ids -> text pieces: never half a character, never the start of a stop string."""

import codecs
from collections.abc import Sequence


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
        markers = [*self._stop, *self._stop_until]
        found = [(at + len(one), at) for one in markers if (at := self._held.find(one)) >= 0]
        if not found:
            return self._release(len(self._held) - num_held_back(self._held, markers))
        # The one that is complete first, so that token borders do not matter.
        end, begin = min(found)
        if self._held[begin:end] in self._stop_until:
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


def num_held_back(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of the markers, but is none yet."""
    longest = max((len(marker) for marker in markers), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0
