"""The label that a task gives one text, decided from what the model scored."""

import math
from dataclasses import dataclass

from server.core.engine.engine import Scores
from server.core.roles.judges import Judge
from server.core.roles.tasks import Label, Task


@dataclass(frozen=True)
class Classification:
    """The label of one text. `probabilities` follow the task's labels and add up to 1.

    score: the probability of the task's one pole minus that of the other, if it has poles.
    Of the prompt's tokens, `num_cached_tokens` needed no computing, and `num_kept_tokens` were
    computed for later prompts to begin with; both are 0 where the engine does not report them.
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
    """The likeliest label; the fallback answers where the model is unsure.

    A label's log-probability is summed over its tokens, so their exponentials add up to
    the share of all possible answers that are labels at all (`min_label_mass`).
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
