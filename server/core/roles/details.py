"""Explains the label of a text by the labels of its sentences and the weights of its words."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from server.core.engine.work import Work
from server.core.roles.classification import Classification
from server.core.roles.classifier import Classifier, PreparedTexts
from server.core.roles.language import language_of
from server.core.roles.tasks import Task
from server.core.text import spans
from server.core.text.spans import Span
from server.errors import InvalidRequestError

# Minimum confidence at which a sentence's label counts as a pole.
MIN_POLE_CONFIDENCE = 0.7
# In a text with more words, runs of several words are weighted together.
MAX_WORDS = 64
# Limit on what one request judges: texts, their sentences, and their versions without a word.
MAX_JUDGEMENTS = 1024


@dataclass(frozen=True)
class Details:
    """The label of a text and, on request, the labels of its sentences and weights of its words.

    is_mixed: whether there are sentences of both poles; None if the task has no poles.
    words: a weight is how much the probability of the text's label drops without the word.
    computed: the results that did not come from the cache.
    """

    whole: Classification
    sentences: tuple[tuple[Span, Classification], ...]
    words: tuple[tuple[Span, float], ...]
    is_mixed: bool | None
    computed: tuple[Classification, ...]


@dataclass(frozen=True)
class _Plan:
    """A text, and its pieces to judge."""

    text: str
    sentences: Sequence[Span]
    words: Sequence[Span]

    @property
    def parts(self) -> list[str]:
        """The texts that are judged besides the whole text."""
        return [
            *(span.of(self.text) for span in self.sentences),
            *(self.text[: span.offset] + self.text[span.end :] for span in self.words),
        ]


async def judge_details(
    classifier: Classifier, task: Task, texts: Sequence[str], work: Work, *,
    with_sentences: bool = False, with_words: bool = False,
    param: Callable[[int], str] = lambda index: "input",
) -> list[Details]:  # fmt: skip
    """Judges the texts and their pieces as one batch.

    param: the request's field with the text of an index, for errors.

    Raises:
        ContextLengthError: a text is too long for the model.
        InvalidRequestError: there are too many pieces, or the chat template refuses the task.
    """

    def prepare() -> tuple[list[_Plan], PreparedTexts]:
        plans = [_plan(text, with_sentences, with_words) for text in texts]
        _check_number(plans)
        parts = [(i, part) for i, plan in enumerate(plans) for part in plan.parts]
        owners = [*range(len(texts)), *(i for i, _ in parts)]
        all_texts = [*texts, *(part for _, part in parts)]
        return plans, classifier.prepare(task, all_texts, lambda i: param(owners[i]))

    plans, prepared = await asyncio.to_thread(prepare)
    results = await classifier.judge(prepared, work, num_texts=len(texts))
    rest = iter(results[len(texts) :])
    return [_details(task, plan, whole, rest) for plan, whole in zip(plans, results, strict=False)]


def _check_number(plans: Sequence[_Plan]) -> None:
    num_judgements = sum(1 + len(plan.sentences) + len(plan.words) for plan in plans)
    if num_judgements > MAX_JUDGEMENTS:
        raise InvalidRequestError(
            f"'input': the texts with their sentences and words take {num_judgements} judgements; "
            f"one request may take {MAX_JUDGEMENTS}. Send fewer or shorter texts.",
            param="input",
        )


def _plan(text: str, with_sentences: bool, with_words: bool) -> _Plan:
    return _Plan(
        text,
        spans.sentences(text, language_of(text)) if with_sentences else (),
        _runs(spans.words(text)) if with_words else (),
    )


def _runs(words: Sequence[Span]) -> list[Span]:
    """The words, joined to at most MAX_WORDS runs."""
    size = max(1, -(-len(words) // MAX_WORDS))
    runs = [words[start : start + size] for start in range(0, len(words), size)]
    return [Span(run[0].offset, run[-1].end - run[0].offset) for run in runs]


def _details(
    task: Task, plan: _Plan, whole: Classification, rest: Iterator[Classification]
) -> Details:
    of_sentences = list(islice(rest, len(plan.sentences)))
    without_words = list(islice(rest, len(plan.words)))
    label = task.labels.index(whole.label)

    def weight(result: Classification) -> float:
        return whole.probabilities[label][1] - result.probabilities[label][1]

    return Details(
        whole,
        sentences=tuple(zip(plan.sentences, of_sentences, strict=True)),
        words=tuple(zip(plan.words, map(weight, without_words), strict=True)),
        is_mixed=_is_mixed(task, of_sentences),
        computed=tuple(
            result for result in (whole, *of_sentences, *without_words) if not result.is_cached
        ),
    )


def _is_mixed(task: Task, sentences: Sequence[Classification]) -> bool | None:
    if task.poles is None:
        return None
    labels = {each.label.value for each in sentences if each.confidence >= MIN_POLE_CONFIDENCE}
    return set(task.poles) <= labels
