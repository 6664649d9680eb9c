"""Fits the judge of a task to its examples, when a model is loaded.

A task without examples has the labels' prior taken off their scores.
"""

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from server.core.concurrency import all_of
from server.core.engine.engine import Scores
from server.core.engine.work import Work
from server.core.roles.heads import (
    SHRINKAGES,
    Calibration,
    Floats,
    Indices,
    calibrate,
    cross_validated,
    fit_heads,
    folds_of,
    log_loss,
)
from server.core.roles.judges import CrossValidation, HeadJudge, Judge, LabelJudge, Scorer
from server.core.roles.prompts import TaskPrompts

# The labels' texts are scored for one in so many examples of each label, because this needs all
# layers.
LABEL_SCORES_STRIDE = 6
# A judge with more fitted parameters is chosen only if its log-loss is at most this share of the
# simpler one's. The examples come from one source, which favours what is fitted to them.
MAX_LOSS_RATIO = 0.95


async def measure_prior(
    scorer: Scorer, prompts: TaskPrompts, work: Work | None = None
) -> LabelJudge:  # fmt: skip
    """A judge that takes off the labels' mean log-probability after the reference texts.

    Where the context has no room for these behind the instruction, nothing is taken off.
    """
    # Off the event loop: an instruction may be long.
    references = await asyncio.to_thread(lambda: prompts.references)

    async def measure(ids: list[int], label_ids: list[list[int]]) -> list[float]:
        scores = await scorer.score(
            ids, label_ids, num_shared=prompts.num_shared, work=work, adapter=prompts.adapter
        )
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
    scores = await measure(scorer, prompts, all_ids, layers, has_label_scores.tolist(), report)
    states = states_of(scores, len(layers))
    logprobs = np.array([each.logprobs for each in scores if each.logprobs])
    kinds = [example.kind for example in examples]
    # In a thread: cross-validation takes a second or two.
    return await asyncio.to_thread(_best, layers, states, logprobs, labels, kinds, has_label_scores)


async def measure(
    scorer: Scorer,
    prompts: TaskPrompts,
    all_ids: Sequence[list[int]],
    layers: tuple[int, ...],
    has_label_scores: Sequence[bool],
    report: Callable[[], object],
) -> list[Scores]:
    """What the model computes of prompts of the task: hidden states after the layers.

    has_label_scores: for each prompt, whether the labels' texts are scored behind it, too.
    report: called after each prompt.
    """
    label_ids, work = prompts.labels(max(map(len, all_ids))), Work()

    async def measure_one(ids: list[int], with_labels: bool, is_pinned: bool = False) -> Scores:
        scores = await scorer.score(
            ids,
            label_ids if with_labels else [],
            layers=layers,
            num_shared=prompts.num_shared,
            is_pinned=is_pinned,
            work=work,
            adapter=prompts.adapter,
        )
        report()
        return scores

    # The first computes the instruction for the others to begin with; in all layers, if it has
    # its labels scored.
    first = await measure_one(all_ids[0], has_label_scores[0], is_pinned=True)
    return [first, *await all_of(map(measure_one, all_ids[1:], has_label_scores[1:]))]


def states_of(scores: Sequence[Scores], num_layers: int) -> Floats:
    """The hidden states that were measured after so many layers: (N, L, C)."""
    if not num_layers:
        return np.zeros((len(scores), 0, 0), np.float32)
    known = [each.hidden_states for each in scores if each.hidden_states is not None]
    assert len(known) == len(scores)
    return np.stack(known)


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


def _every(stride: int, labels: Indices) -> NDArray[np.bool_]:
    """True for the first example of each label and every so many after it: (N,)."""
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for label in set(labels.tolist()):
        chosen[np.flatnonzero(labels == label)[::stride]] = True
    return chosen
