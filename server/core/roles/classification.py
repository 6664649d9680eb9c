"""Decides the label of a text from the model's scores."""

import math
from dataclasses import dataclass

from server.core.engine.engine import Scores
from server.core.roles.judges import Judge
from server.core.roles.tasks import Label, Task


@dataclass(frozen=True)
class Classification:
    """The label of one text. `probabilities` are in the order of the task's labels, with sum 1.

    num_cached_tokens: prompt tokens that needed no computing.
    num_kept_tokens: prompt tokens that were computed and that later prompts can reuse. Both are 0
    if the engine does not report them.
    score: probability of the task's first pole minus that of the second; None without poles.
    """

    label: Label
    confidence: float
    probabilities: tuple[tuple[Label, float], ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_kept_tokens: int = 0
    score: float | None = None
    is_cached: bool = False


def decide(task: Task, judge: Judge, scores: Scores, num_prompt_tokens: int) -> Classification:
    """The likeliest label, or the task's fallback if the model is unsure.

    A label's log-probability is the sum over its tokens. The exponentials of all labels add up
    to the probability that an answer is one of the labels (compared with `min_label_mass`).
    """
    probabilities = judge.probabilities(scores)
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    label_mass = sum(map(math.exp, scores.logprobs)) if scores.logprobs else 1.0
    is_unsure = label_mass < task.min_label_mass or probabilities[best] < task.min_confidence
    if is_unsure and task.fallback is not None:
        best = task.values.index(task.fallback)
    score = None
    if task.poles is not None:
        positive, negative = (probabilities[task.values.index(pole)] for pole in task.poles)
        score = positive - negative
    return Classification(
        label=task.labels[best],
        confidence=probabilities[best],
        probabilities=tuple(zip(task.labels, probabilities, strict=True)),
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=scores.num_cached or 0,
        score=score,
    )
