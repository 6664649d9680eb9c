"""Tells lines that say nearly the same, so that what measures is not what was trained on."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

MEASURES = Path(__file__).parent.parent / "benchmarks" / "data"
NEAR = 0.5  # of the pieces of two lines, how many are in both
_NO_LETTERS = re.compile(r"[\W_]+")
_HAN = re.compile(r"[\u3400-\u9fff]")
# So common that they tell nothing of what a line is about.
_FUNCTION = frozenset(
    {"a", "an", "the", "i", "i'm", "im", "my", "me", "we", "our", "you", "your", "he", "she", "it",
     "its", "his", "her", "they", "is", "am", "are", "was", "were", "be", "been", "do", "does",
     "did", "to", "of", "in", "on", "at", "for", "with", "and", "or", "but", "so", "that", "this",
     "just", "have", "has", "had"}
)  # fmt: skip


def bare(text: str) -> str:
    """Letters and digits alone, in lower case."""
    return _NO_LETTERS.sub("", text).lower()


def pieces(text: str) -> frozenset[str]:
    """Pairs of characters of a Chinese line, the telling words of another."""
    if _HAN.search(text):
        line = bare(text)
        return frozenset(line[i : i + 2] for i in range(len(line) - 1)) or frozenset({line})
    words = re.findall(r"[a-z0-9']+", text.lower())
    return frozenset(w for w in words if w not in _FUNCTION) or frozenset(words)


class Lines:
    """Lines that others are compared with."""

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
        """Whether one of them is the same line, or shares NEAR of its pieces."""
        if self.has_same(line):
            return True
        own = pieces(line)
        others = {i for piece in own for i in self._with.get(piece, ())}
        return any(len(own & self._pieces[i]) >= NEAR * len(own | self._pieces[i]) for i in others)


def measured_lines(folder: Path = MEASURES) -> Lines:
    """What users say in the measures of replies."""
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
