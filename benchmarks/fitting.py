"""The gain of `fit` on a domain: accuracy before, and with 50, 200 and 1,000 labelled rows.

    python -m benchmarks.fitting --model DIR --rows FILE --source NAME

`--rows` is a file of labelled texts, gzipped JSON Lines with `text`, `label`, `lang` and `source`.
Rows of one source are shuffled. Some are test rows, which nothing is fitted to; `fit` uses the
first 50, 200 and 1,000 of the others. Prints a table and, last, one line of JSON.
"""

import argparse
import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

from server.config import Settings
from server.core.roles.fitting import candidate_layers
from server.core.roles.measures import Quality
from server.fit.learning import Measurements, learn, measure_rows
from server.fit.rows import Row
from server.fit.selection import labelled, select
from server.judge_loading import JudgeLoader
from server.loading import find_model, load_engine, prompts_of
from training.corpus import read_sentiment

NUM_ROWS = (50, 200, 1000)
NUM_TEST = 1000
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="auto", help="as the server's own option")
    parser.add_argument("--rows", type=Path, required=True, help="gzipped JSON Lines")
    parser.add_argument("--source", required=True, help="source of the rows to use")
    parser.add_argument("--test", type=int, default=NUM_TEST, help="number of test rows")
    args = parser.parse_args()
    rows = [row for row in read_sentiment(args.rows) if row.source == args.source]
    random.Random(SEED).shuffle(rows)
    numbered = [Row(i, row.text, row.label) for i, row in enumerate(rows)]
    result = {"model": args.model, "source": args.source} | run(args.model, numbered, args.test)
    print(json.dumps(result))


def run(model_name: str, rows: list[Row], num_test: int) -> dict[str, Any]:
    settings = Settings(model=model_name)
    model = find_model(settings)
    task = model.task_file.tasks["sentiment"]
    prompts = prompts_of(task, model)
    # Twice the number needed: some repeat or are too long.
    texts = labelled(rows[: 2 * (num_test + max(NUM_ROWS))], task)
    selection = select(
        texts,
        task,
        lambda text: not prompts.has_room_for(prompts.encode(text)),
        max_rows=num_test + max(NUM_ROWS),
        test_share=num_test / (num_test + max(NUM_ROWS)),
    )
    engine, cache = load_engine(model, settings)
    try:
        judges = JudgeLoader(
            engine, model.tokenizer, cache,
            num_layers=model.config.num_layers, max_context=model.max_context,
            adapters=model.adapters,
        )  # fmt: skip
        judges.load([task])
        present = judges.judges[task.version]
        layers = candidate_layers(model.config.num_layers)
        begin = time.perf_counter()
        measured = asyncio.run(
            measure_rows(engine, prompts, selection, present, layers, lambda: None)
        )
        seconds = time.perf_counter() - begin
    finally:
        engine.close()
    num_texts = len(measured.train) + len(measured.test) + len(measured.examples)
    print(f"{num_texts} texts in {seconds:.0f} s\n")
    print(f"{'rows':>6} {'accuracy':>18} {'macro-F1':>9} {'ECE':>6} {'s':>6}  recipe")
    table: dict[str, dict[str, float]] = {}
    for num_rows in NUM_ROWS:
        part = Measurements(
            measured.layers,
            measured.test_scores,
            measured.train[np.arange(min(num_rows, len(measured.train)))],
            measured.test,
            measured.examples,
        )
        begin = time.perf_counter()
        fitted = learn(task, present, part)
        seconds = time.perf_counter() - begin
        if not table:
            table["0"] = figures("0", fitted.comparison.before)
        table[str(num_rows)] = figures(
            str(num_rows), fitted.comparison.after, f"{seconds:6.1f}  {fitted.recipe}"
        )
    return {"num_texts": num_texts, "accuracy": table}


def figures(name: str, quality: Quality, more: str = "") -> dict[str, float]:
    low, high = quality.accuracy_interval
    print(
        f"{name:>6} {quality.accuracy:.3f} ({low:.3f}–{high:.3f}) {quality.macro_f1:9.3f} "
        f"{quality.calibration_error:6.3f} {more}"
    )
    return {
        "accuracy": round(quality.accuracy, 3),
        "macro-F1": round(quality.macro_f1, 3),
        "ECE": round(quality.calibration_error, 3),
    }


if __name__ == "__main__":
    main()
