"""How the labels of a task are judged: by scores of their texts, or by a linear head.

A judge is fitted to a task's examples when a model is loaded, or, for a task without examples,
takes the labels' prior off their scores.
"""

import asyncio
import contextlib
import math
import unicodedata
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from server.core.engine import Scores
from server.core.heads import (
    SHRINKAGES,
    Calibration,
    Floats,
    Indices,
    LinearHead,
    calibrate,
    cross_validated,
    fit_heads,
    folds_of,
    log_loss,
)
from server.core.single_flight import all_of
from server.core.tasks import MIN_EXAMPLES, Example, Task
from server.core.tokenizer import ChatTokenizer
from server.errors import ContextLengthError, InvalidRequestError

# They are computed in one step, and everybody else waits for it.
MAX_LABEL_TOKENS = 1024
# The labels' texts are scored for one in so many examples of each label, because this needs all
# layers.
LABEL_SCORES_STRIDE = 6
# A judge with more fitted parameters is chosen only if its log-loss is at most this share of the
# simpler one's. The examples come from one source, which favours what is fitted to them.
MAX_LOSS_RATIO = 0.95
# Everyday sentences of both languages and every mood, to learn what a model says of the labels
# whatever the text is. An empty text would not do: it is truly neutral, so a neutral label would
# lose what is its due (arXiv 2102.09690 and 2309.17249).
REFERENCE_TEXTS = (
    "今天玩得真开心", "这家店的服务太差了", "会议改到周三下午三点", "帮我写一封请假的邮件",
    "谢谢你，帮了我大忙", "快递怎么还没到", "北京到上海坐高铁要多久", "我有点担心明天的考试",
    "I love this song", "The screen broke after two days", "The shop opens at nine",
    "Please translate this sentence", "What a wonderful surprise", "Nobody answered my call",
    "How many people live in Canada?", "I miss my old friends",
)  # fmt: skip


class Scorer(Protocol):
    """What judging needs of the engine."""

    def score(
        self,
        prompt_ids: list[int],
        continuations: list[list[int]],
        *,
        layers: tuple[int, ...] = (),
        num_shared: int = 0,
        is_pinned: bool = False,
    ) -> Awaitable[Scores]:
        """Log-probabilities (nats) of the continuations, hidden states after the layers."""


@dataclass(frozen=True)
class CrossValidation:
    """Accuracy and log-loss (nats) on examples that were left out of the fit."""

    num_examples: int
    accuracy: float
    log_loss: float


@dataclass(frozen=True)
class LabelJudge:
    """Scores the labels' texts after the prompt.

    prior: (K,) log-probabilities of the labels whatever the text is, in nats; they are taken off.
    Empty: none are.
    """

    prior: tuple[float, ...] = ()
    temperature: float = 1.0
    validation: CrossValidation | None = None
    kind: Literal["label_scores"] = "label_scores"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose hidden states it judges by."""
        return ()

    def probabilities(self, scores: Scores) -> list[float]:
        """Of the labels, in the task's order; they add up to 1."""
        logprobs = np.array(scores.logprobs)
        if self.prior:
            logprobs -= self.prior
        return _softmax((logprobs / self.temperature).tolist())


@dataclass(frozen=True)
class HeadJudge:
    """Applies a linear head to the hidden state of the last prompt token after a layer."""

    layer: int
    head: LinearHead
    validation: CrossValidation | None = None
    kind: Literal["head"] = "head"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose hidden states it judges by."""
        return (self.layer,)

    def probabilities(self, scores: Scores) -> list[float]:
        """Of the labels, in the task's order; they add up to 1."""
        assert scores.hidden_states is not None
        return _softmax(self.head.scores(scores.hidden_states[0]).tolist())


Judge = LabelJudge | HeadJudge


class TaskPrompts:
    """The analyst's prompts of one task, and its labels, as token ids."""

    def __init__(self, task: Task, tokenizer: ChatTokenizer, max_context: int) -> None:
        self.task, self._tokenizer, self._max_context = task, tokenizer, max_context

    @cached_property
    def num_shared(self) -> int:
        """How many tokens every prompt of the task begins with: its instruction."""
        one, other = self.encode("a"), self.encode("我")
        return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)

    def encode(self, text: str) -> list[int]:
        """Ids of the prompt about the text.

        Raises:
            ChatTemplateError: the template refuses the task's prompt.
        """
        return self._tokenizer.encode_chat(self.task.messages(text))

    @cached_property
    def examples(self) -> tuple[list[Example], list[list[int]]]:
        """The task's examples that fit the context with the labels, and the ids of their prompts.

        Both lists are empty if fewer than MIN_EXAMPLES of a label fit.
        """
        room = self._max_context - sum(len(ids) - 1 for ids in self.labels(0))
        encoded = [(each, self.encode(normalise(each.text))) for each in self.task.examples]
        short_enough = [(each, ids) for each, ids in encoded if len(ids) < room]
        counts = Counter(each.label for each, _ in short_enough)
        if any(counts[value] < MIN_EXAMPLES for value in self.task.values):
            return [], []
        return [each for each, _ in short_enough], [ids for _, ids in short_enough]

    @cached_property
    def references(self) -> list[tuple[list[int], list[list[int]]]]:
        """Ids of the prompts about the reference texts, each with those of the labels' texts.

        Those that do not fit the context are left out.
        """
        references = []
        for text in REFERENCE_TEXTS:
            ids = self.encode(text)
            with contextlib.suppress(ContextLengthError):
                references.append((ids, self.labels(len(ids))))
        return references

    def labels(self, num_prompt_tokens: int) -> list[list[int]]:
        """Ids of the labels' texts. Raises as `encode_labels`."""
        return encode_labels(self.task, self._tokenizer, num_prompt_tokens, self._max_context)


def normalise(text: str) -> str:
    """The form in which texts are judged and compared: NFC, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def encode_labels(
    task: Task,
    tokenizer: ChatTokenizer,
    num_prompt_tokens: int,
    max_context: int,
    labels_param: str = "labels",
) -> list[list[int]]:
    """Ids of each label's text, to be laid behind a prompt.

    labels_param: where a request has its labels.

    Raises:
        InvalidRequestError: the labels are too long to be computed in one step.
        ContextLengthError: prompt and labels are too long for the model.
    """
    label_ids = [tokenizer.encode_text(label.text) for label in task.labels]
    num_label_tokens = sum(map(len, label_ids))
    if num_label_tokens > MAX_LABEL_TOKENS:
        raise InvalidRequestError(
            f"'{labels_param}': the labels to choose from have {num_label_tokens} tokens "
            f"together, of {MAX_LABEL_TOKENS} at most; use fewer or shorter ones.",
            param=labels_param,
        )
    # All labels but their last tokens are laid behind the prompt in one forward.
    num_tokens = num_prompt_tokens + num_label_tokens - len(label_ids)
    if num_tokens >= max_context:
        raise ContextLengthError(num_tokens, max_context, "input")
    return label_ids


async def measure_prior(scorer: Scorer, prompts: TaskPrompts) -> LabelJudge:
    """A judge that takes off the labels' mean log-probability after the reference texts.

    Where the context has no room for these behind the instruction, nothing is taken off.
    """
    # Off the event loop: an instruction may be long.
    references = await asyncio.to_thread(lambda: prompts.references)

    async def measure(ids: list[int], label_ids: list[list[int]]) -> list[float]:
        scores = await scorer.score(ids, label_ids, num_shared=prompts.num_shared)
        return scores.logprobs

    if not references:
        return LabelJudge()
    # The first computes the instruction, for the others to begin with.
    first, *others = references
    measured = [await measure(*first), *await all_of(measure(*each) for each in others)]
    return LabelJudge(tuple(np.mean(measured, axis=0).tolist()))


def candidate_layers(num_layers: int) -> tuple[int, ...]:
    """The layers whose heads are tried: at two thirds of the depth, and a little deeper."""
    return tuple(sorted({max(1, round(num_layers * share)) for share in (2 / 3, 0.7)}))


async def fit_judge(
    scorer: Scorer, prompts: TaskPrompts, num_layers: int, report: Callable[[], object]
) -> Judge:
    """The judge with the least cross-validated log-loss on the task's examples.

    The scores of the labels' texts as they are compete with those without their prior, and these
    with heads after several layers and with several shrinkages. Examples longer than the context
    are left out; where too few are left, or there are none, the prior is taken off.
    num_layers: the model's. report: called after each example.
    """
    layers = candidate_layers(num_layers)
    examples, all_ids = prompts.examples
    if not examples:
        return await measure_prior(scorer, prompts)
    labels = np.array([prompts.task.values.index(example.label) for example in examples])
    has_label_scores = _every(LABEL_SCORES_STRIDE, labels)
    label_ids = prompts.labels(max(map(len, all_ids)))

    async def measure(ids: list[int], with_labels: bool, is_pinned: bool = False) -> Scores:
        scores = await scorer.score(
            ids,
            label_ids if with_labels else [],
            layers=layers,
            num_shared=prompts.num_shared,
            is_pinned=is_pinned,
        )
        report()
        return scores

    # The first computes the instruction in all layers, for all others to begin with.
    first = await measure(all_ids[0], with_labels=bool(has_label_scores[0]), is_pinned=True)
    others = await all_of(map(measure, all_ids[1:], has_label_scores[1:].tolist()))
    scores = [first, *others]
    states = np.stack([_states_of(each) for each in scores])
    logprobs = np.array([each.logprobs for each in scores if each.logprobs])
    kinds = [example.kind for example in examples]
    # In a thread: cross-validation takes a second or two.
    return await asyncio.to_thread(_best, layers, states, logprobs, labels, kinds, has_label_scores)


def _best(
    layers: Sequence[int],
    states: Floats,
    logprobs: Floats,
    labels: Indices,
    kinds: Sequence[str],
    has_label_scores: NDArray[np.bool_],
) -> Judge:
    """states: (N, L, C). labels, kinds, has_label_scores: (N,). logprobs: (M, K), where it has."""
    folds = folds_of(labels, kinds)
    judge, labels_loss = _best_label_judge(
        logprobs,
        labels[has_label_scores],
        [kind for kind, has in zip(kinds, has_label_scores, strict=True) if has],
    )
    tried = [
        (calibrate(scores, labels), i, shrinkage, scores)
        for i in range(len(layers))
        for shrinkage, scores in zip(
            SHRINKAGES, cross_validated(states[:, i], labels, folds), strict=True
        )
    ]
    best, layer_index, shrinkage, scores = min(tried, key=lambda each: each[0].log_loss)
    # On the same examples as the labels' texts.
    head_loss = log_loss(scores[has_label_scores] / best.temperature, labels[has_label_scores])
    if head_loss > MAX_LOSS_RATIO * labels_loss:
        return judge
    [head] = fit_heads(states[:, layer_index], labels, [shrinkage])
    return HeadJudge(
        layers[layer_index], head.cooled(best.temperature), _validation(best, len(labels))
    )


def _best_label_judge(
    logprobs: Floats, labels: Indices, kinds: Sequence[str]
) -> tuple[LabelJudge, float]:
    """logprobs: (M, K). labels, kinds: (M,). Returns its log-loss on examples left out, too."""
    as_they_are = calibrate(logprobs, labels)
    left_out_scores, folds = np.empty_like(logprobs), folds_of(labels, kinds)
    for fold in set(folds.tolist()):
        is_left_out = folds == fold
        left_out_scores[is_left_out] = logprobs[is_left_out] - logprobs[~is_left_out].mean(0)
    without_prior = calibrate(left_out_scores, labels)
    if without_prior.log_loss > MAX_LOSS_RATIO * as_they_are.log_loss:
        best, prior = as_they_are, ()
    else:
        best, prior = without_prior, tuple(logprobs.mean(0).tolist())
    return LabelJudge(prior, best.temperature, _validation(best, len(labels))), best.log_loss


def _validation(calibration: Calibration, num_examples: int) -> CrossValidation:
    return CrossValidation(num_examples, calibration.accuracy, calibration.log_loss)


def _states_of(scores: Scores) -> Floats:
    assert scores.hidden_states is not None
    return scores.hidden_states


def _every(stride: int, labels: Indices) -> NDArray[np.bool_]:
    """True for the first example of each label and every so many after it: (N,)."""
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for label in set(labels.tolist()):
        chosen[np.flatnonzero(labels == label)[::stride]] = True
    return chosen


def _softmax(scores: Sequence[float]) -> list[float]:
    highest = max(scores)
    weights = [math.exp(score - highest) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]
