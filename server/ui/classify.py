"""Classifies many texts in batches, so that chats can run between two of them."""

import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from openai import AsyncOpenAI

from server.ui.client import classify
from server.ui.lines import batches, read_file, read_lines, to_csv
from server.ui.texts import Language, name_of

# The engine has one batch at a time; a chat waits for one at most.
BATCH_SIZE = 16
MAX_ROWS = 200
SHOW_INTERVAL_S = 1.0


@dataclass(frozen=True)
class Run:
    """The results of a run so far. is_due: whether to show them now. task: as from `task_of`."""

    texts: Sequence[str]
    results: list[dict[str, Any]]
    is_due: bool
    task: Mapping[str, Any]

    def label_of(self, text: str) -> str:
        """The label that the text got."""
        return str(self.results[self.texts.index(text)]["label"])

    def rows(self, language: Language) -> list[list[str]]:
        """The first MAX_ROWS texts with label and confidence, for the table."""
        pairs = zip(self.texts, self.results[:MAX_ROWS], strict=False)
        return [
            [text, name_of(result, language), f"{result['confidence']:.0%}"]
            for text, result in pairs
        ]

    def distribution(self, language: Language) -> pd.DataFrame:
        """The number of texts with each label, the most frequent label first."""
        counts = Counter(name_of(result, language) for result in self.results)
        return pd.DataFrame(counts.most_common(), columns=["label", "count"])

    def csv(self) -> bytes:
        """All results."""
        return to_csv(self.texts[: len(self.results)], self.results)


def gather_texts(pasted: str, file: str | None) -> list[str]:
    """The texts of the pasted lines, then those of the file."""
    return read_lines(pasted) + (read_file(Path(file)) if file else [])


def task_of(name: str, labels: str, instructions: str) -> dict[str, Any] | None:
    """The fields of a /v1/classify request; None if there is one label only."""
    own = list(dict.fromkeys(read_lines(labels.replace(",", "\n").replace("，", "\n"))))
    if not own:
        return {"task": name}
    if len(own) < 2:
        return None
    prompt = instructions.strip() or f"请判断这段文字属于哪一类，只能回答：{'、'.join(own)}。"
    return {"instructions": prompt, "labels": own}


async def classify_batches(
    client: AsyncOpenAI, texts: Sequence[str], task: Mapping[str, Any]
) -> AsyncIterator[Run]:
    """Classifies the texts in batches; yields the results so far after each batch."""
    results: list[dict[str, Any]] = []
    shown_at = 0.0
    for batch in batches(texts, BATCH_SIZE):
        results += await classify(client, batch, task)
        is_due = time.monotonic() - shown_at > SHOW_INTERVAL_S or len(results) == len(texts)
        shown_at = time.monotonic() if is_due else shown_at
        yield Run(texts, results, is_due, task)
