"""Many texts judged: batch after batch, so that chats get their turn in between."""

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

# One batch is in the engine at a time, and no chat waits for more than that.
BATCH_SIZE = 16
MAX_ROWS = 200
SHOW_INTERVAL_S = 1.0


@dataclass(frozen=True)
class Judged:
    """How far a run has come. is_due: whether it is time to show it. task: as `task_of`."""

    texts: Sequence[str]
    results: list[dict[str, Any]]
    is_due: bool
    task: Mapping[str, Any]

    def label_of(self, text: str) -> str:
        """What the text was judged to be."""
        return str(self.results[self.texts.index(text)]["label"])

    def rows(self, language: Language) -> list[list[str]]:
        """The first of them, for a table."""
        pairs = zip(self.texts, self.results[:MAX_ROWS], strict=False)
        return [
            [text, name_of(result, language), f"{result['confidence']:.0%}"]
            for text, result in pairs
        ]

    def distribution(self, language: Language) -> pd.DataFrame:
        """How many texts got each label, the most frequent first."""
        counts = Counter(name_of(result, language) for result in self.results)
        return pd.DataFrame(counts.most_common(), columns=["label", "count"])

    def csv(self) -> bytes:
        """All of them."""
        return to_csv(self.texts[: len(self.results)], self.results)


def gather_texts(pasted: str, file: str | None) -> list[str]:
    """What was pasted, then what is in the file."""
    return read_lines(pasted) + (read_file(Path(file)) if file else [])


def task_of(name: str, labels: str, instructions: str) -> dict[str, Any] | None:
    """The task as /v1/classify reads it; None if there are labels, but not two."""
    own = list(dict.fromkeys(read_lines(labels.replace(",", "\n").replace("，", "\n"))))
    if not own:
        return {"task": name}
    if len(own) < 2:
        return None
    said = instructions.strip() or f"请判断这段文字属于哪一类，只能回答：{'、'.join(own)}。"
    return {"instructions": said, "labels": own}


async def judge(
    client: AsyncOpenAI, texts: Sequence[str], task: Mapping[str, Any]
) -> AsyncIterator[Judged]:
    """Judges the texts in batches, and tells after each how far it has come."""
    results: list[dict[str, Any]] = []
    shown_at = 0.0
    for batch in batches(texts, BATCH_SIZE):
        results += await classify(client, batch, task)
        is_due = time.monotonic() - shown_at > SHOW_INTERVAL_S or len(results) == len(texts)
        shown_at = time.monotonic() if is_due else shown_at
        yield Judged(texts, results, is_due, task)
