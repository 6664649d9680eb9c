"""Fits the judge of a task to its examples.

For a task without examples, the labels' prior is subtracted from their scores.
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

# The labels' texts are scored for one in so many examples of each label: this needs all layers.
LABEL_SCORES_STRIDE = 6
# A judge with more fitted parameters is chosen only if its log-loss is at most this share of the
# simpler one's: the examples come from one source, which favours judges fitted to them.
MAX_LOSS_RATIO = 0.95


async def measure_prior(
    scorer: Scorer, prompts: TaskPrompts, work: Work | None = None
) -> LabelJudge:  # fmt: skip
    """A judge that subtracts the labels' mean log-probability after the reference texts.

    If the context has no room for these after the instruction, it subtracts nothing.
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
    # The first prompt computes the instruction, which the rest reuse.
    first, *rest = references
    logprobs = [await measure(*first), *await all_of(measure(*each) for each in rest)]
    return LabelJudge(tuple(np.mean(logprobs, axis=0).tolist()))


def candidate_layers(num_layers: int) -> tuple[int, ...]:
    """The layers whose heads are tried: at two thirds of the depth, and a little deeper."""
    return tuple(sorted({max(1, round(num_layers * share)) for share in (2 / 3, 0.7)}))


async def fit_judge(
    scorer: Scorer, prompts: TaskPrompts, num_layers: int, report: Callable[[], object]
) -> Judge:
    """The judge with the lowest cross-validated log-loss on the task's examples.

    Compares the scores of the labels' texts, with and without their prior, and then the better
    of the two with heads after several layers and with several shrinkages (MAX_LOSS_RATIO).
    Examples longer than the context are left out; if too few remain, `measure_prior` is used.
    num_layers: the model's. report: called after each example.
    """
    layers = candidate_layers(num_layers)
    examples, all_ids = prompts.examples
    if not examples:
        return await measure_prior(scorer, prompts)
    labels = np.array([prompts.task.values.index(example.label) for example in examples])
    has_label_scores = _every_nth(LABEL_SCORES_STRIDE, labels)
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
    """Computes the hidden states of the task's prompts after the layers.

    has_label_scores: for each prompt, whether the labels' texts are scored after it, too.
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

    # The first prompt computes the instruction, which the rest reuse: in all layers, if its labels
    # are scored.
    first = await measure_one(all_ids[0], has_label_scores[0], is_pinned=True)
    return [first, *await all_of(map(measure_one, all_ids[1:], has_label_scores[1:]))]


def states_of(scores: Sequence[Scores], num_layers: int) -> Floats:
    """The hidden states in the scores, after `num_layers` layers each: (N, L, C)."""
    if not num_layers:
        return np.zeros((len(scores), 0, 0), np.float32)
    states = [each.hidden_states for each in scores if each.hidden_states is not None]
    assert len(states) == len(scores)
    return np.stack(states)


def _best(
    layers: Sequence[int],
    states: Floats,
    logprobs: Floats,
    labels: Indices,
    kinds: Sequence[str],
    has_label_scores: NDArray[np.bool_],
) -> Judge:
    """states: (N, L, C). labels, kinds, has_label_scores: (N,). logprobs: (M, K), M of N scored."""
    folds = folds_of(labels, kinds)
    judge, labels_loss = _best_label_judge(
        logprobs,
        labels[has_label_scores],
        [kind for kind, has in zip(kinds, has_label_scores, strict=True) if has],
    )
    candidates = [
        (calibrate(scores, labels), i, shrinkage, scores)
        for i in range(len(layers))
        for shrinkage, scores in zip(
            SHRINKAGES, cross_validated(states[:, i], labels, folds), strict=True
        )
    ]
    best, layer_index, shrinkage, scores = min(candidates, key=lambda each: each[0].log_loss)
    # On the same examples as the label scores.
    head_loss = log_loss(scores[has_label_scores] / best.temperature, labels[has_label_scores])
    if head_loss > MAX_LOSS_RATIO * labels_loss:
        return judge
    [head] = fit_heads(states[:, layer_index], labels, [shrinkage])
    return HeadJudge(
        layers[layer_index], head.with_temperature(best.temperature), _validation(best, len(labels))
    )


def _best_label_judge(
    logprobs: Floats, labels: Indices, kinds: Sequence[str]
) -> tuple[LabelJudge, float]:
    """The judge, and its log-loss on held-out examples. logprobs: (M, K). labels, kinds: (M,)."""
    with_prior = calibrate(logprobs, labels)
    held_out_scores, folds = np.empty_like(logprobs), folds_of(labels, kinds)
    for fold in set(folds.tolist()):
        is_held_out = folds == fold
        held_out_scores[is_held_out] = logprobs[is_held_out] - logprobs[~is_held_out].mean(0)
    without_prior = calibrate(held_out_scores, labels)
    if without_prior.log_loss > MAX_LOSS_RATIO * with_prior.log_loss:
        best, prior = with_prior, ()
    else:
        best, prior = without_prior, tuple(logprobs.mean(0).tolist())
    return LabelJudge(prior, best.temperature, _validation(best, len(labels))), best.log_loss


def _validation(calibration: Calibration, num_examples: int) -> CrossValidation:
    return CrossValidation(num_examples, calibration.accuracy, calibration.log_loss)


def _every_nth(stride: int, labels: Indices) -> NDArray[np.bool_]:
    """True for the first example of each label and every `stride`-th after it: (N,)."""
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for label in set(labels.tolist()):
        chosen[np.flatnonzero(labels == label)[::stride]] = True
    return chosen
