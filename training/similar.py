"""Finds similar lines, to keep the lines of the test data out of the training data."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

MEASURES = Path(__file__).parent.parent / "benchmarks" / "data"
NEAR = 0.5  # smallest Jaccard similarity of the pieces of two similar lines
_NO_LETTERS = re.compile(r"[\W_]+")
_HAN = re.compile(r"[\u3400-\u9fff]")
# Function words, which say nothing about the topic of a line.
_FUNCTION = frozenset(
    {"a", "an", "the", "i", "i'm", "im", "my", "me", "we", "our", "you", "your", "he", "she", "it",
     "its", "his", "her", "they", "is", "am", "are", "was", "were", "be", "been", "do", "does",
     "did", "to", "of", "in", "on", "at", "for", "with", "and", "or", "but", "so", "that", "this",
     "just", "have", "has", "had"}
)  # fmt: skip


def bare(text: str) -> str:
    """The letters and digits of a text, in lower case."""
    return _NO_LETTERS.sub("", text).lower()


def pieces(text: str) -> frozenset[str]:
    """The character pairs of a Chinese line; the words of another without function words."""
    if _HAN.search(text):
        line = bare(text)
        return frozenset(line[i : i + 2] for i in range(len(line) - 1)) or frozenset({line})
    words = re.findall(r"[a-z0-9']+", text.lower())
    return frozenset(w for w in words if w not in _FUNCTION) or frozenset(words)


class Lines:
    """An index of lines for similarity search."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._bare: set[str] = set()
        self._pieces: list[frozenset[str]] = []
        self._with: dict[str, list[int]] = defaultdict(list)
        for line in lines:
            self.add(line)

    def add(self, line: str) -> None:
        self._bare.add(bare(line))
        own = pieces(line)
        for piece in own:
            self._with[piece].append(len(self._pieces))
        self._pieces.append(own)

    def has_same(self, line: str) -> bool:
        return bare(line) in self._bare

    def has_near(self, line: str) -> bool:
        """Whether one of the lines is equal or similar."""
        if self.has_same(line):
            return True
        own = pieces(line)
        others = {i for piece in own for i in self._with.get(piece, ())}
        return any(len(own & self._pieces[i]) >= NEAR * len(own | self._pieces[i]) for i in others)


def measured_lines(folder: Path = MEASURES) -> Lines:
    """The users' lines of the test data of replies."""
    lines: list[str] = []
    for name in ("points.jsonl", "openers.jsonl", "abilities.jsonl", "pairs.jsonl"):
        path = folder / name
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            row = json.loads(line)
            lines += (
                row.get("users", ()) or [row["text"]]
                if "text" in row or "users" in row
                else [m["content"] for m in row["messages"] if m["role"] == "user" and m["content"]]
            )
    return Lines(lines)
