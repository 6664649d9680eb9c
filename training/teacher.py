"""The teacher: linear n-gram classifiers, whose label probabilities the model learns.

They learn in one pass what a small transformer needs many epochs for, and their probabilities are
less noisy than the corpus's labels. They also label texts without a label: fragments of texts, and
the lines of the reply corpus.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import joblib
import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline, make_union

from training.corpus import ReplyRow, SentimentRow

FOLDS = 3
# Corrects a bias towards positive in English, as measured on the dev rows.
ODDS = {("en", "negative"): 1.4}
MAX_WORDS, MAX_CHARACTERS = 8, 12  # of a fragment, English and Chinese
# Numbers of fragments and patchworks.
NUM_FRAGMENTS = {"zh": 60_000, "en": 130_000}
NUM_PATCHWORKS = {"zh": 90_000, "en": 320_000}

Probabilities = NDArray[np.float32]
# Text, language and label probabilities.
Fragment = tuple[str, str, Sequence[float]]


def _classifier(lang: str) -> Pipeline:
    if lang == "zh":
        features = make_union(
            TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=2, sublinear_tf=True)
        )
    else:
        features = make_union(
            TfidfVectorizer(
                ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"[\w']+|[^\w\s]"
            ),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), min_df=3, sublinear_tf=True),
        )
    return make_pipeline(features, LogisticRegression(C=4.0, class_weight="balanced", max_iter=200))


class Teacher:
    """Gives label probabilities of texts, with one classifier per language."""

    def __init__(self, rows: Sequence[SentimentRow], values: Sequence[str]) -> None:
        """values: the labels, in the order of the probabilities."""
        self.values = list(values)
        self._order = np.argsort(np.argsort(values))
        self._by_lang: dict[str, Pipeline] = {}
        self._seen = {row.text: i for i, row in enumerate(rows)}
        # Probabilities of each row by a classifier trained without the row's fold.
        self.out_of_fold: Probabilities = np.zeros((len(rows), len(values)), dtype=np.float32)
        for lang in sorted({row.lang for row in rows}):
            chosen = np.array([row.lang == lang for row in rows])
            texts = [row.text for row in rows if row.lang == lang]
            labels = [row.label for row in rows if row.lang == lang]
            classifier = _classifier(lang)
            folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
            probabilities = cross_val_predict(
                classifier, texts, labels, cv=folds, method="predict_proba"
            )
            self.out_of_fold[chosen] = self._corrected(probabilities[:, self._order], lang)
            self._by_lang[lang] = classifier.fit(texts, labels)

    def judge(self, texts: Sequence[str], lang: str) -> Probabilities:
        """Label probabilities: (N, labels)."""
        probabilities = self._by_lang[lang].predict_proba(texts)[:, self._order]
        return self._corrected(probabilities, lang)

    def views(self, rows: Sequence[SentimentRow]) -> Probabilities:
        """Label probabilities: (N, labels); for rows it was trained on, the out-of-fold ones."""
        result = np.zeros((len(rows), len(self.values)), dtype=np.float32)
        for lang in sorted({row.lang for row in rows}):
            new = [i for i, r in enumerate(rows) if r.lang == lang and r.text not in self._seen]
            if new:
                result[new] = self.judge([rows[i].text for i in new], lang)
        for i, row in enumerate(rows):
            if row.text in self._seen:
                result[i] = self.out_of_fold[self._seen[row.text]]
        return result

    def _corrected(self, probabilities: Probabilities, lang: str) -> Probabilities:
        """Probabilities (N, labels) with the bias corrected by ODDS."""
        weighted = probabilities * [ODDS.get((lang, value), 1.0) for value in self.values]
        return np.asarray(weighted / weighted.sum(-1, keepdims=True), dtype=np.float32)


def train_teacher(rows: Sequence[SentimentRow], values: Sequence[str], path: Path) -> Teacher:
    """Trains the teacher, which takes some minutes, or reads it from `path` if that exists."""
    if path.exists():
        teacher: Teacher = joblib.load(path)
        return teacher
    teacher = Teacher(rows, values)
    joblib.dump(teacher, path)
    return teacher


def fragment(text: str, lang: str, rng: random.Random) -> str:
    """A few words or characters of a text: short prompts show the effect of each."""
    if lang == "zh":
        parts, longest, joint = list(text), MAX_CHARACTERS, ""
    else:
        parts, longest, joint = text.split(), MAX_WORDS, " "
    length = rng.randint(1, longest)
    begin = rng.randint(0, max(0, len(parts) - length))
    return joint.join(parts[begin : begin + length]).strip()


def patchwork(texts: Sequence[str], lang: str, rng: random.Random) -> str:
    """Joins fragments of two to four texts.

    A model soon memorises the labels of whole texts, and then learns no more from the teacher.
    """
    joints = ["，", "。", ""] if lang == "zh" else [", ", ". ", " "]
    pieces = [fragment(rng.choice(texts), lang, rng) for _ in range(rng.randint(2, 4))]
    return rng.choice(joints).join(pieces)


def judged_fragments(
    texts: Sequence[SentimentRow], replies: Sequence[ReplyRow], teacher: Teacher,
    rng: random.Random, path: Path,
) -> list[Fragment]:  # fmt: skip
    """Lines of the reply corpus, fragments and patchworks, with the teacher's probabilities.

    Takes some minutes; reads them from `path` if that exists.
    """
    fragments: list[Fragment] = joblib.load(path) if path.exists() else []
    if fragments:
        return fragments
    for lang, num_fragments in NUM_FRAGMENTS.items():
        lines = [line for r in replies if r.lang == lang for line in (r.user, r.reply)]
        sources = lines + [row.text for row in texts if row.lang == lang]
        drawn = [fragment(rng.choice(sources), lang, rng) for _ in range(num_fragments)]
        drawn += [patchwork(sources, lang, rng) for _ in range(NUM_PATCHWORKS[lang])]
        drawn += rng.sample(lines, min(len(lines), num_fragments // 4))
        drawn = sorted({line for line in drawn if line.strip()})
        probabilities = teacher.judge(drawn, lang).tolist()
        fragments += [(text, lang, p) for text, p in zip(drawn, probabilities, strict=True)]
    joblib.dump(fragments, path)
    return fragments
