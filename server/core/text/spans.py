"""Finds the words and sentences of a text. Knows neither models nor tasks."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import accumulate
from types import ModuleType

from sentencex import get_sentence_boundaries

# Scripts that put no space between words: Han and Kana.
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
# Longer runs of letters are cut.
MAX_WORD_CHARS = 32

_EMOJI = "\u20e3\u2190-\u2bff\ufe0f\U0001f000-\U0001faff"
# White space, controls, punctuation.
_BREAKS = (
    r"\s\x00-/:-@\[-`{-\xbf\xd7\xf7\u2000-\u206f\u3000-\u303f\ufe30-\ufe4f"
    r"\uff00-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
_LETTERS = rf"[^{_BREAKS}{_EMOJI}{UNSPACED}]{{1,{MAX_WORD_CHARS}}}"
# Words in Latin letters may have signs inside: it's, 2.5, e-mail, R&D.
_RUNS = re.compile(
    rf"(?P<unspaced>[{UNSPACED}]+)|[{_EMOJI}]+(?:\u200d[{_EMOJI}]+)*"
    rf"|{_LETTERS}(?:['’.&+-]{_LETTERS}){{0,3}}"
)
# Emoji after a sentence belong to it, not to the next one.
_TRAILING_EMOJI = re.compile(rf"(?:[ \t\u3000]*[{_EMOJI}\u200d]+)*")
_LINES = re.compile("[^\r\n\u2028\u2029]+")


@dataclass(frozen=True)
class Span:
    """A piece of a text, in characters (code points)."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """The offset of the character after the piece."""
        return self.offset + self.length

    def of(self, text: str) -> str:
        """The piece of the text."""
        return text[self.offset : self.end]


def words(text: str) -> list[Span]:
    """The words and emoji of the text, without white space and punctuation.

    Chinese is split by jieba, with its dictionary and its model for unknown words.
    """
    spans = []
    for run in _RUNS.finditer(text):
        parts = _cut(run[0]) if run["unspaced"] else [run[0]]
        offsets = accumulate(map(len, parts), initial=run.start())
        spans += [Span(offset, len(part)) for offset, part in zip(offsets, parts, strict=False)]
    return spans


def sentences(text: str, language: str) -> list[Span]:
    """The sentences of the text, without white space around them. A line break ends a sentence.

    language: ISO 639-1 code; abbreviations of this language do not end a sentence.
    """
    return list(_sentences(text, language))


def _sentences(text: str, language: str) -> Iterator[Span]:
    for line in _LINES.finditer(text):
        start = line.start()
        for found in get_sentence_boundaries(language, line[0]):
            emoji = _TRAILING_EMOJI.match(text, line.start() + found["end_index"], line.end())
            assert emoji is not None  # it may be empty
            end = max(start, emoji.end())
            if sentence := text[start:end].strip():
                num_blanks = len(text[start:end]) - len(text[start:end].lstrip())
                yield Span(start + num_blanks, len(sentence))
            start = end


def _cut(text: str) -> Sequence[str]:
    parts: Sequence[str] = _dictionary().cut(text)
    return parts


@cache
def _dictionary() -> ModuleType:
    # Imported on first use: the dictionary takes 0.2 s to read, and 35 MB.
    return import_module("rjieba")
