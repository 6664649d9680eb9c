"""Whether quantized weights judge as float32 does, on labelled texts and the bundled model.

    python -m benchmarks.agreement --rows PATH/sentiment_dev.jsonl.gz

Prints, for each --dtype, the share of texts with the label of float32, and the accuracy;
last, one line of JSON.
"""

import argparse
import asyncio
import json
from pathlib import Path

from server.config import Settings
from server.loading import load_services
from training.corpus import read_sentiment

DTYPES = ("float32", "bfloat16", "int8", "int4")


async def labels_of(texts: list[str], model: str, dtype: str) -> list[str]:
    """The label of each text, judged by one engine in batches."""
    settings = Settings(model=model, dtype=dtype, sentiment_cache_size=0)
    services = load_services(settings)
    try:
        task = services.tasks["sentiment"]
        results = await asyncio.gather(*(services.classifier.classify(task, t) for t in texts))
    finally:
        services.engine.close()
    return [result.label.value for result in results]


def share(ours: list[str], theirs: list[str]) -> float:
    return round(sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="gzipped JSON Lines, labelled")
    parser.add_argument("--model", default="mini")
    args = parser.parse_args()
    rows = read_sentiment(args.rows)
    texts, given = [row.text for row in rows], [row.label for row in rows]
    judged = {dtype: asyncio.run(labels_of(texts, args.model, dtype)) for dtype in DTYPES}
    table = {
        dtype: {
            "as_float32": share(labels, judged["float32"]),
            "accuracy": share(labels, given),
        }
        for dtype, labels in judged.items()
    }
    print(f"{'dtype':10} {'as float32':>11} {'accuracy':>9}   ({len(rows)} texts)")
    for dtype, figures in table.items():
        print(f"{dtype:10} {figures['as_float32']:>11} {figures['accuracy']:>9}")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
