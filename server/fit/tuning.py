"""The method `prompt`: trains a soft prompt, initialised from the task's instruction, with peft."""

import importlib
import importlib.util
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from server.core.engine.engine import Scores
from server.core.roles.heads import calibrate
from server.core.roles.judges import CrossValidation, LabelJudge
from server.core.roles.prompts import TaskPrompts
from server.core.roles.tasks import Task
from server.fit.errors import FitError
from server.fit.learning import Fitted, Judgements, compare, judgements
from server.fit.selection import LabelledText, Selection, divided
from server.loading import Model

# Tokens that a soft prompt takes in the context.
MAX_VIRTUAL_TOKENS = 64
NUM_EPOCHS = 8
# Share of the training rows that chooses the epoch and the temperature.
HELD_OUT_SHARE = 0.2


class SoftPrompt(Protocol):
    """A tuned soft prompt that can be written."""

    def save(self, folder: Path) -> None:
        """Writes it in peft's format."""


def check_tuning(selection: Selection, task: Task, checkpoint: Path) -> None:
    """Checks that `tune` can run. Called before the weights are read.

    Raises:
        FitError: peft is not installed, it cannot read the checkpoint, or a label has no rows.
    """
    if checkpoint.is_file():
        raise FitError(
            f"--method prompt cannot train on the GGUF file {checkpoint}; give the folder of a "
            "checkpoint in safetensors"
        )
    if importlib.util.find_spec("peft") is None:
        raise FitError("--method prompt needs peft: pip install 'qwen-all-in-one[tune]'")
    labels = {each.label for each in selection.train}
    for i, value in enumerate(task.values):
        if i not in labels:
            raise FitError(
                f"the label {value!r} has no rows; --method prompt needs rows of every label"
            )


def tune(
    model: Model, prompts: TaskPrompts, selection: Selection, before: Judgements
) -> tuple[Fitted, SoftPrompt]:
    """Trains a soft prompt; returns a label judge that uses it, and the soft prompt.

    before: the present judge's labels of the test part.
    """
    task, label_ids = prompts.task, prompts.labels(0)
    train, held_out = divided(selection.train, HELD_OUT_SHARE)
    # Imported here: peft takes seconds to load, and servers do not need it.
    tuning = importlib.import_module("server.core.engine.model.tuning")
    soft_prompt = tuning.SoftPrompt(
        model.checkpoint.path, task.instructions, label_ids, MAX_VIRTUAL_TOKENS
    )
    total = NUM_EPOCHS * len(train) + len(held_out) + len(selection.test)
    with tqdm(total=total, desc="tuning the prompt", leave=False, disable=None) as bar:

        def encoded(rows: list[LabelledText]) -> list[tuple[list[int], int]]:
            return [(prompts.encode(each.text), each.label) for each in rows]

        soft_prompt.train(encoded(train), encoded(held_out), NUM_EPOCHS, bar.update)
        held_out_scores, test_scores = (
            soft_prompt.scores([ids for ids, _ in encoded(rows)], bar.update)
            for rows in (held_out, selection.test)
        )
    calibration = calibrate(held_out_scores, np.array([each.label for each in held_out]))
    judge = LabelJudge(
        temperature=calibration.temperature,
        validation=CrossValidation(len(held_out), calibration.accuracy, calibration.log_loss),
    )
    after = judgements(task, judge, [Scores(row.tolist(), 0) for row in test_scores])
    comparison = compare(before, after, np.array([each.label for each in selection.test]))
    recipe = (
        f"a soft prompt of {soft_prompt.num_virtual_tokens} vectors, initialised from the "
        f"instruction and tuned on the rows"
    )
    return Fitted(judge, comparison, recipe), soft_prompt
