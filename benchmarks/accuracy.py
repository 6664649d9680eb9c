"""How well a running server tells moods apart, beside what people use without a GPU.

Sends labelled texts through /v1/classify and reports, per language and per source,
three-way accuracy on all rows and accuracy between positive and negative on polar rows.

    python -m server --model mini &
    python -m benchmarks.accuracy --rows PATH/sentiment_dev.jsonl.gz [--baselines]

`--baselines` adds SnowNLP (Chinese) and VADER (English): pip install -e '.[bench]'.
Prints a table for people and, last, one line of JSON.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import httpx

from training.corpus import SentimentRow, read_sentiment

BATCH = 64
# A text's label of three, and the more likely of positive and negative.
Judgement = tuple[str, str]


def ask_server(url: str, texts: list[str]) -> list[Judgement]:
    """The server's judgements, in batches."""
    judgements = []
    with httpx.Client(base_url=url, timeout=600) as client:
        for begin in range(0, len(texts), BATCH):
            response = client.post("/classify", json={"input": texts[begin : begin + BATCH]})
            response.raise_for_status()
            for item in response.json()["data"]:
                probs = {p["value"]: p["probability"] for p in item["probabilities"]}
                judgements.append((item["label"], max(("positive", "negative"), key=probs.get)))
    return judgements


def snownlp_judge() -> Callable[[str], Judgement]:
    """SnowNLP's probability of positive; the middle third counts as neutral."""
    from snownlp import SnowNLP

    def judge(text: str) -> Judgement:
        score = SnowNLP(text).sentiments
        label = "positive" if score > 2 / 3 else "negative" if score < 1 / 3 else "neutral"
        return label, "positive" if score >= 0.5 else "negative"

    return judge


def vader_judge() -> Callable[[str], Judgement]:
    """VADER's compound score with the thresholds its authors recommend."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()

    def judge(text: str) -> Judgement:
        score = analyzer.polarity_scores(text)["compound"]
        label = "positive" if score >= 0.05 else "negative" if score <= -0.05 else "neutral"
        return label, "positive" if score >= 0 else "negative"

    return judge


def accuracies(
    rows: list[SentimentRow], judgements: list[Judgement]
) -> dict[str, dict[str, float | int]]:
    """Per language and per source: rows, three-way accuracy, accuracy on polar rows."""
    groups: dict[str, list[tuple[SentimentRow, Judgement]]] = defaultdict(list)
    for row, judgement in zip(rows, judgements, strict=True):
        groups[row.lang].append((row, judgement))
        groups[f"{row.lang} {row.source}"].append((row, judgement))
    table: dict[str, dict[str, float | int]] = {}
    for name in sorted(groups):
        pairs = groups[name]
        polar = [polar == row.label for row, (_, polar) in pairs if row.label != "neutral"]
        table[name] = {
            "rows": len(pairs),
            "three_way": round(sum(label == r.label for r, (label, _) in pairs) / len(pairs), 3),
            "polar": round(sum(polar) / len(polar), 3) if polar else float("nan"),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="gzipped JSON Lines, labelled")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="base URL")
    parser.add_argument("--baselines", action="store_true", help="also SnowNLP and VADER")
    args = parser.parse_args()
    rows = read_sentiment(args.rows)
    tables = {"server": accuracies(rows, ask_server(args.url, [row.text for row in rows]))}
    if args.baselines:
        for lang, name, make in (("zh", "SnowNLP", snownlp_judge), ("en", "VADER", vader_judge)):
            judge, own = make(), [row for row in rows if row.lang == lang]
            tables[name] = accuracies(own, [judge(row.text) for row in own])
    for judge_name, table in tables.items():
        print(f"\n{judge_name:32} {'rows':>6} {'three-way':>10} {'polar':>7}")
        for name, scores in table.items():
            print(f"  {name:30} {scores['rows']:>6} {scores['three_way']:>10} {scores['polar']:>7}")
    print(json.dumps(tables))


if __name__ == "__main__":
    main()
