"""Writes all training data into one file: tokens, probabilities and sampling weights.

    python -m training.pack --corpus PATH --out training/runs/pack

Trains the teacher, labels fragments and replies with it, and encodes all texts once, so that
training needs only arrays. Takes some minutes; the teacher and the fragments are cached in the
folder. With `--vectors FOLDER`, the checkpoint of any Qwen, the pack also contains its embeddings,
reduced to fewer dimensions, to initialise new weights.
"""

import argparse
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from server.core.text.tokenizer import ChatTokenizer
from server.core.text.tokenizer_files import read_tokenizer
from training.add_openers import PAIRS
from training.corpus import (
    ReplyRow,
    SentimentRow,
    read_openers,
    read_own_texts,
    read_pairs,
    read_replies,
    read_sentiment,
    read_templates,
)
from training.examples import Renderer, check_rendering, trained_prompts
from training.replies import (
    by_kind,
    label_replies,
    reply_kind,
    shared,
    suitable_rows,
    swapped,
    to_the_point,
)
from training.similar import measured_lines
from training.teacher import Fragment, Probabilities, judged_fragments, train_teacher

LANGUAGES = ("zh", "en")
# Sampling weight of a source, relative to its size. SST-2 consists of phrases from few reviews.
SENTIMENT_SOURCES = {
    "openers": 6.0, "own": 6.0, "templates": 2.0,
    "sst2_train": 0.4, "tweeteval_sentiment_val": 2.0, "vader_amazon": 2.0,
}  # fmt: skip
# English has a larger share because it is harder; its negative texts correct a bias to positive.
SENTIMENT_CLASSES = {
    ("zh", "positive"): 0.12, ("zh", "negative"): 0.12, ("zh", "neutral"): 0.10,
    ("en", "positive"): 0.18, ("en", "negative"): 0.28, ("en", "neutral"): 0.20,
}  # fmt: skip
# Share of the replies drawn from each kind of row.
REPLY_KINDS = {
    ("openers", "zh"): 0.29, ("openers", "en"): 0.33,
    ("templates", "zh"): 0.13, ("templates", "en"): 0.15,
    ("caring", "zh"): 0.02, ("caring", "en"): 0.03,
    ("support", "zh"): 0.05,
}  # fmt: skip
# The same for replies without a cue. "rest" is not to the point, but teaches the language.
PLAIN_KINDS = {**REPLY_KINDS, ("rest", "zh"): 0.30}
OWN = ("openers", "templates")
NUM_REST = 30_000
# Weights of a pair made by swapping words, and of one whose reply shares no piece with the line.
SWAPPED_WEIGHT, BESIDE_WEIGHT = 0.5, 0.6
MAX_ROW_TOKENS = 160
# Share of fragments and patchworks among the texts whose label is learned.
FRAGMENTS = 0.6
# Share of the teacher's probabilities in the target of a labelled row: labels are noisier than the
# teacher, except the project's own.
TEACHER_SHARE = {"openers": 0.3, "own": 0.06, "templates": 0.1}
TEACHER_SHARE_OF_OTHERS = 0.8
# Share of the film reviews, which are tokenized and in lower case, to write in normal spelling.
AS_TYPED = 0.5
VECTOR_SIZE = 256
# Pattern of a question, and the marks that end a question and a statement.
QUESTIONS = {
    "zh": ("吗|呢|什么|几|多少|哪|谁|怎么|是不是|有没有", "？。"),
    "en": (
        r"(?i)^(what|when|where|which|who|why|how|can|could|do|does|did|is|are|will|would)\b",
        "?.",
    ),
}

Arrays = dict[str, NDArray[Any]]


class Segments:
    """Token ids of texts, each stored once."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._of: dict[tuple[int, ...], int] = {}

    def add(self, ids: Sequence[int]) -> int:
        return self._of.setdefault(tuple(ids), len(self._of))

    def text(self, text: str, most: int = MAX_ROW_TOKENS) -> int:
        return self.add(self._tokenizer.encode_text(text.strip())[:most])

    def arrays(self) -> Arrays:
        return {
            "tokens": np.fromiter((i for ids in self._of for i in ids), dtype=np.uint16),
            "lengths": np.array([len(ids) for ids in self._of], dtype=np.uint8),
        }


def spellings(row: SentimentRow, rng: random.Random) -> list[str]:
    """One or more spellings of the text, as people may type it."""
    text = row.text.strip()
    if row.source.startswith("sst"):
        return [as_typed(text) if rng.random() < AS_TYPED else text]
    return with_and_without_mark(text, row.lang) if row.source in (*OWN, "own") else [text]


def as_typed(text: str) -> str:
    """A tokenized review in normal spelling: "it 's bad ." becomes "It's bad."."""
    text = re.sub(r" (?=(?:[,.;:!?)]|'\w|n't))|(?<=\() ", "", text)
    return text[:1].upper() + text[1:]


def with_and_without_mark(text: str, lang: str) -> list[str]:
    """The line and, if it does not end with a mark, the line with the usual mark.

    Otherwise a full stop would suggest a complaint: lines of chats have none in the corpus.
    """
    if not text[-1].isalnum():
        return [text]
    question, marks = QUESTIONS[lang]
    return [text, text + marks[0 if re.search(question, text) else 1]]


def pieces_of(renderer: Renderer, segments: Segments) -> Arrays:
    """The pieces of the chat template between texts, as segments, and the prefixes as ids."""
    r = renderer
    close = [r.end, *r.newline]
    cues = [
        segments.add([*close, *r.turn("system", r.cues[value]), *r.header["assistant"]])
        for value in r.values
    ]
    return {
        "prefix_instructions": np.array(r.instructions), "prefix_persona": np.array(r.persona),
        "prefix_plain": np.array(r.plain),
        "piece_user": np.array(segments.add(r.header["user"])),
        "piece_answer": np.array(segments.add([*close, *r.header["assistant"]])),
        "piece_turn_end": np.array(segments.add(close)),
        "piece_end": np.array(segments.add([r.end])),
        "piece_cue": np.array(cues),
        "piece_label": np.array([segments.add([i]) for i in r.label_ids]),
        "label_ids": np.array(r.label_ids),
        "poles": np.array([r.values.index(pole) for pole in ("positive", "negative")]),
    }  # fmt: skip


def labelled(
    texts: Sequence[SentimentRow], teacher_probs: Probabilities, fragments: Sequence[Fragment],
    values: Sequence[str], segments: Segments, rng: random.Random,
) -> Arrays:  # fmt: skip
    """Texts with target probabilities and sampling weights."""
    at, probabilities, weights, classes = [], [], [], []
    labels = np.eye(len(values))[[values.index(row.label) for row in texts]]
    shares = np.array([TEACHER_SHARE.get(r.source, TEACHER_SHARE_OF_OTHERS) for r in texts])
    targets = shares[:, None] * teacher_probs + (1 - shares[:, None]) * labels
    for row, target in zip(texts, targets, strict=True):
        for text in spellings(row, rng):
            at.append(segments.text(text, MAX_ROW_TOKENS - 8))
            probabilities.append(target)
            weights.append(SENTIMENT_SOURCES.get(row.source, 1.0))
            classes.append((False, row.lang, row.label))
    for text, lang, target in fragments:
        at.append(segments.text(text))
        probabilities.append(np.array(target))
        weights.append(1.0)
        # Balanced like the texts. Otherwise most fragments would be positive, and the model would
        # label doubtful texts positive.
        classes.append((True, lang, values[int(np.argmax(target))]))
    sums: defaultdict[tuple[bool, str, str], float] = defaultdict(float)
    for key, weight in zip(classes, weights, strict=True):
        sums[key] += weight
    balanced = [
        weight / sums[key] * (FRAGMENTS if key[0] else 1 - FRAGMENTS) * SENTIMENT_CLASSES[key[1:]]
        for key, weight in zip(classes, weights, strict=True)
    ]
    return {
        "text_segments": np.array(at, dtype=np.int32),
        "text_probs": np.round(np.array(probabilities) * 255).astype(np.uint8),
        "text_weights": np.array(balanced, dtype=np.float32),
    }


def paired(
    rows: Sequence[ReplyRow], made: Sequence[ReplyRow], rest: Sequence[ReplyRow],
    values: Sequence[str], segments: Segments, rng: random.Random,
) -> Arrays:  # fmt: skip
    """Pairs of a line and a reply, ordered by kind, with sampling weights.

    made: from other pairs by swapping words; rest: only drawn without a cue.
    """
    numbers = dict(zip(rows, shared(rows), strict=True))
    repeated = Counter(row.reply for row in rows)
    groups = by_kind([*rows, *made]) | {("rest", "zh"): list(rest)}
    columns: list[tuple[int, int, int, int]] = []
    weights: dict[str, list[float]] = {"pair": [], "plain": []}
    made_rows = set(made)
    for (kind, lang), group in sorted(groups.items()):
        row_weights = []
        begin = len(columns)
        for row in rng.sample(group, len(group)):
            lines = with_and_without_mark(row.user.strip(), lang) if kind in OWN else [row.user]
            weight = max(1, repeated[row.reply]) ** -0.5 if kind not in OWN else 1.0
            weight *= SWAPPED_WEIGHT if row in made_rows else 1.0
            weight *= BESIDE_WEIGHT if kind == "openers" and not numbers.get(row, 1) else 1.0
            for line in lines:
                user, reply = segments.text(line), segments.text(row.reply)
                label = values.index(row.label or "neutral")
                columns.append((user, reply, label, LANGUAGES.index(lang)))
                row_weights.append(weight / len(lines))
        total = sum(row_weights)
        for name, kinds in (("pair", REPLY_KINDS), ("plain", PLAIN_KINDS)):
            share = kinds.get((kind, lang), 0.0) / total
            weights[name] += [weight * share for weight in row_weights]
        print(f"{kind} {lang}: {len(columns) - begin} pairs of {len(group)} rows")
    table = np.array(columns, dtype=np.int32)
    return {
        "pair_users": table[:, 0], "pair_replies": table[:, 1],
        "pair_labels": table[:, 2].astype(np.int8), "pair_langs": table[:, 3].astype(np.int8),
        "pair_weights": np.array(weights["pair"], dtype=np.float32),
        "plain_weights": np.array(weights["plain"], dtype=np.float32),
    }  # fmt: skip


def held_out(
    dev: Sequence[SentimentRow], pairs: Sequence[ReplyRow], values: Sequence[str],
    segments: Segments,
) -> Arrays:  # fmt: skip
    return {
        "dev_texts": np.array([segments.text(row.text) for row in dev]),
        "dev_labels": np.array([values.index(row.label) for row in dev]),
        "dev_langs": np.array([LANGUAGES.index(row.lang) for row in dev]),
        "dev_pair_users": np.array([segments.text(row.user) for row in pairs]),
        "dev_pair_replies": np.array([segments.text(row.reply) for row in pairs]),
        "dev_pair_labels": np.array([values.index(str(row.label)) for row in pairs]),
        "dev_pair_langs": np.array([LANGUAGES.index(row.lang) for row in pairs]),
    }


def vectors(folder: Path, tokenizer: ChatTokenizer, size: int = VECTOR_SIZE) -> NDArray[np.int8]:
    """Initial embeddings (V, size) from a larger Qwen, with a standard deviation of 30.

    Each token's vector is the mean of the larger Qwen's vectors for its text, projected to the
    `size` dimensions of the largest variance.
    """
    from training.weights import read_weights

    large = read_weights(folder)["model.embed_tokens.weight"].numpy()
    encode = AutoTokenizer.from_pretrained(folder).encode
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    rows = np.stack([
        large[ids].mean(0) if (ids := encode(text, add_special_tokens=False)) else 0 * large[0]
        for text in texts
    ])  # fmt: skip
    rows -= rows.mean(0)
    _, directions = np.linalg.eigh(rows.T @ rows)
    projected = rows @ directions[:, ::-1][:, :size]
    # Reduces the dominance of a few directions.
    projected /= np.sqrt(projected.std(0) * projected.std())
    scaled = np.clip(np.round(projected / projected.std() * 30), -127, 127)
    vectors: NDArray[np.int8] = scaled.astype(np.int8)
    return vectors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=Path("server/models/qwen-mini"))
    parser.add_argument("--vectors", type=Path, help="folder of a larger Qwen's checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    tokenizer = read_tokenizer(args.tokenizer)
    prompts = trained_prompts()
    renderer = Renderer(tokenizer, prompts)
    values = renderer.values
    openers = read_openers()
    dev = read_sentiment(args.corpus / "sentiment_dev.jsonl.gz")
    texts = _texts(args.corpus, openers, dev)
    replies = read_replies(args.corpus / "replies_train.jsonl.gz")
    check_rendering(renderer, tokenizer, prompts, texts, replies)
    teacher = train_teacher(texts, values, args.out / "teacher.joblib")
    fragments = judged_fragments(texts, replies, teacher, rng, args.out / "fragments.joblib")

    suitable = suitable_rows(replies)
    good = to_the_point(label_replies(suitable, texts, teacher), teacher)
    chosen = set(good)
    rest = [row for row in suitable if row.lang == "zh" and reply_kind(row) == "support"]
    rest = [row for row in rng.sample(rest, len(rest)) if row not in chosen][:NUM_REST]
    segments = Segments(tokenizer)
    arrays = pieces_of(renderer, segments)
    arrays |= labelled(texts, teacher.views(texts), fragments, values, segments, rng)
    arrays |= paired(
        [*openers, *read_templates(), *good], swapped(openers, rng), rest, values, segments, rng
    )
    arrays |= held_out(dev, read_pairs(PAIRS), values, segments)
    arrays |= segments.arrays()
    if args.vectors is not None:
        arrays["embeddings"] = vectors(args.vectors, tokenizer)
    # numpy types an option, allow_pickle, among the names of arrays.
    np.savez_compressed(args.out / "pack.npz", **arrays)  # type: ignore[arg-type]
    size = (args.out / "pack.npz").stat().st_size
    print(f"{len(arrays['tokens']):,} tokens, {len(arrays['text_segments']):,} texts, "
          f"{len(arrays['pair_users']):,} pairs, {size / 1e6:.1f} MB")  # fmt: skip


def _texts(
    corpus: Path, openers: Sequence[ReplyRow], dev: Sequence[SentimentRow]
) -> list[SentimentRow]:
    """Labelled texts of the corpus and of the project, without those of the test data."""
    measured, seen = measured_lines(), {row.text for row in dev}
    texts = read_sentiment(corpus / "sentiment_train.jsonl.gz")
    own = {(r.user, str(r.label), r.lang, r.source) for r in [*openers, *read_templates()]}
    texts += [SentimentRow(*row) for row in sorted(own)]
    texts += read_own_texts()
    return [row for row in texts if row.text not in seen and not measured.has_same(row.text)]


if __name__ == "__main__":
    main()
