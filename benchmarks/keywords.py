"""Recall and precision of a model's keywords, compared with a person's choice.

    python -m benchmarks.keywords --model DIR

data/keywords.jsonl has twenty sentences per language. Their keywords were chosen before any model
was run. Recall is the share of these keywords that are an item; "recall within" also counts those
within a longer item. Precision is the share of the items that contain a keyword or are part of one.

Prints a line per sentence and, last, one line of JSON.
"""

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.config import Settings
from server.core.concurrency import all_of
from server.loading import load_services
from server.services import Services

ROWS = Path(__file__).parent / "data" / "keywords.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="auto", help="as the server's own option")
    parser.add_argument("--dtype", default="auto", help="as the server's own option")
    args = parser.parse_args()
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    services = load_services(Settings(model=args.model, dtype=args.dtype))
    try:
        all_items = asyncio.run(_extract(services, [row["text"] for row in rows]))
    finally:
        services.engine.close()
    result: dict[str, Any] = {"model": args.model}
    for language in ("zh", "en"):
        pairs = [
            (row["keywords"], items)
            for row, items in zip(rows, all_items, strict=True)
            if row["language"] == language
        ]
        for keywords, items in pairs:
            print(f"{', '.join(keywords):60} | {', '.join(items)}")
        result[language] = figures(pairs)
    print(json.dumps(result, ensure_ascii=False))


async def _extract(services: Services, texts: Sequence[str]) -> list[Sequence[str]]:
    task = services.extract_tasks["keywords"]
    results = await all_of(services.extractor.extract(task, text) for text in texts)
    return [result.items for result in results]


def figures(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> dict[str, float]:
    """Shares over all pairs of the expected keywords and the extracted items."""
    num_expected = num_same = num_within = num_items = num_correct = 0
    for expected, extracted in pairs:
        keywords = [keyword.casefold() for keyword in expected]
        items = [item.casefold() for item in extracted]
        num_expected, num_items = num_expected + len(keywords), num_items + len(items)
        num_same += sum(keyword in items for keyword in keywords)
        num_within += sum(any(keyword in item for item in items) for keyword in keywords)
        num_correct += sum(any(k in item or item in k for k in keywords) for item in items)
    return {
        "recall": round(num_same / num_expected, 3),
        "recall within": round(num_within / num_expected, 3),
        "precision": round(num_correct / num_items, 3) if num_items else 0.0,
        "items per text": round(num_items / len(pairs), 2),
    }


if __name__ == "__main__":
    main()
