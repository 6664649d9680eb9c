"""Colours one classified text: its sentences by label, its words by weight."""

from collections.abc import Mapping, Sequence
from typing import Any

from server.ui.texts import Language, name_of

# The value of gr.HighlightedText: pieces of a text, each with a label, a weight or None.
Pieces = list[tuple[str, str | float | None]]


# In the order of a task's labels; those of sentiment are positive, negative, neutral.
COLORS = ("#16a34a", "#dc2626", "#6b7280", "#2563eb", "#d97706", "#9333ea", "#0891b2")


def colors_of(result: Mapping[str, Any], language: Language) -> dict[str, str]:
    """The colour of each label's name that `sentence_pieces` gives."""
    values = [each["value"] for each in result["probabilities"]]
    return {
        name_of(each, language): COLORS[values.index(each["label"]) % len(COLORS)]
        for each in result["sentences"]
    }


def sentence_pieces(text: str, result: Mapping[str, Any], language: Language) -> Pieces:
    """The sentences, each with the name of its label."""
    return _pieces(text, result["sentences"], [name_of(s, language) for s in result["sentences"]])


def word_pieces(text: str, result: Mapping[str, Any]) -> Pieces:
    """The words, each with its weight, scaled so that the largest is 1 or -1."""
    weights = [word["weight"] for word in result["words"]]
    largest = max(map(abs, weights), default=0.0) or 1.0
    return _pieces(text, result["words"], [round(weight / largest, 3) for weight in weights])


def _pieces(
    text: str, spans: Sequence[Mapping[str, Any]], values: Sequence[str | float]
) -> Pieces:  # fmt: skip
    """The whole text: the spans with their values, the gaps between them with None."""
    pieces: Pieces = []
    end = 0
    for span, value in zip(spans, values, strict=True):
        if gap := text[end : span["offset"]]:
            pieces.append((gap, None))
        end = span["offset"] + span["length"]
        pieces.append((text[span["offset"] : end], value))
    return [*pieces, (text[end:], None)] if text[end:] else pieces
