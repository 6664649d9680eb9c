"""Trains a soft prompt: vectors before every prompt, while the weights stay as they are.

Needs peft, the extra `tune`; the server does not import this module. Knows token ids, not text,
except the text that the vectors start from.
"""

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from server.core.engine.model.weights import open_weights

# Of AdamW, decreasing to 0. The trained embeddings have numbers of some hundredths.
LEARNING_RATE = 0.01
ROWS_PER_STEP = 8
# Sequences in one forward pass: they are short, but their logits are large.
BATCH_SIZE = 4
SEED = 0

# Token ids of a prompt, and the index of its label.
TuningRow = tuple[list[int], int]
T = TypeVar("T")
_Pair = tuple[list[int], list[int]]


class SoftPrompt:
    """A checkpoint in float32 with trainable vectors before every prompt."""

    def __init__(
        self, folder: Path, init_text: str, label_ids: list[list[int]], max_virtual_tokens: int
    ) -> None:
        """init_text: the vectors start as the embeddings of its first tokens.

        label_ids: token ids of each label, which may follow a prompt.
        """
        torch.manual_seed(SEED)
        self._label_ids = label_ids
        num_tokens = len(AutoTokenizer.from_pretrained(folder)(init_text)["input_ids"])
        config = PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            prompt_tuning_init=PromptTuningInit.TEXT,
            prompt_tuning_init_text=init_text,
            num_virtual_tokens=min(num_tokens, max_virtual_tokens),
            tokenizer_name_or_path=str(folder),
        )
        with warnings.catch_warnings():
            # peft 0.21 uses a name that transformers 5 deprecates.
            warnings.simplefilter("ignore", FutureWarning)
            self._model: PeftModel = get_peft_model(_read_model(folder), config)
        self.num_virtual_tokens: int = config.num_virtual_tokens

    def train(
        self,
        rows: Sequence[TuningRow],
        held_out: Sequence[TuningRow],
        num_epochs: int,
        report: Callable[[], object],
    ) -> None:
        """Trains, and keeps the vectors of the epoch with the least loss on the held-out rows.

        report: called after each row of an epoch.
        """
        vectors = [each for each in self._model.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(vectors, lr=LEARNING_RATE, weight_decay=0.0)
        rng = random.Random(SEED)
        best_loss, best = self.loss(held_out), [each.detach().clone() for each in vectors]
        for epoch in range(num_epochs):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - epoch / num_epochs)
            for step in _batches(rng.sample(rows, len(rows)), ROWS_PER_STEP):
                self._step(step, optimizer, report)
            loss = self.loss(held_out)
            if loss < best_loss:
                best_loss, best = loss, [each.detach().clone() for each in vectors]
        with torch.no_grad():
            for vector, kept in zip(vectors, best, strict=True):
                vector.copy_(kept)

    def loss(self, rows: Sequence[TuningRow]) -> float:
        """Mean negative log-probability of the rows' labels, in nats."""
        with torch.no_grad():
            losses = [-self._logprobs(self._pairs(batch)) for batch in _batches(rows, BATCH_SIZE)]
        return float(torch.cat(losses).mean())

    def scores(
        self, prompts: Sequence[list[int]], report: Callable[[], object]
    ) -> NDArray[np.float64]:
        """Log-probabilities of the labels after the prompts, in nats: (N, K)."""
        found = []
        for prompt_ids in prompts:
            pairs = [(prompt_ids, ids) for ids in self._label_ids]
            with torch.no_grad():
                found += [self._logprobs(batch) for batch in _batches(pairs, BATCH_SIZE)]
            report()
        scores: NDArray[np.float64] = torch.cat(found).double().numpy()
        return scores.reshape(len(prompts), len(self._label_ids))

    def save(self, folder: Path) -> None:
        """Writes the vectors as peft does: `adapter_config.json`, `adapter_model.safetensors`."""
        self._model.save_pretrained(str(folder))

    def _step(
        self,
        rows: Sequence[TuningRow],
        optimizer: torch.optim.Optimizer,
        report: Callable[[], object],
    ) -> None:
        optimizer.zero_grad()
        for batch in _batches(rows, BATCH_SIZE):
            (-self._logprobs(self._pairs(batch)).sum() / len(rows)).backward()
            for _ in batch:
                report()
        optimizer.step()

    def _pairs(self, rows: Sequence[TuningRow]) -> list[_Pair]:
        return [(prompt_ids, self._label_ids[label]) for prompt_ids, label in rows]

    def _logprobs(self, pairs: Sequence[_Pair]) -> Tensor:
        """Log-probability of each continuation after its prompt, in nats: (B,)."""
        sequences = [prompt_ids + ids[:-1] for prompt_ids, ids in pairs]
        length = max(map(len, sequences))
        input_ids = torch.tensor([each + [0] * (length - len(each)) for each in sequences])
        mask = torch.tensor([[1] * len(each) + [0] * (length - len(each)) for each in sequences])
        # The logits of all positions would take gigabytes.
        places = [range(len(p) - 1, len(p) - 1 + len(ids)) for p, ids in pairs]
        kept = sorted({place for each in places for place in each})
        logits = self._model(
            input_ids=input_ids,
            attention_mask=mask,
            logits_to_keep=torch.tensor(kept) + self.num_virtual_tokens,
        ).logits
        logprobs = logits.float().log_softmax(-1)
        return torch.stack(
            [
                logprobs[i, [kept.index(place) for place in each], ids].sum()
                for i, (each, (_, ids)) in enumerate(zip(places, pairs, strict=True))
            ]
        )


def _read_model(folder: Path) -> PreTrainedModel:
    """The checkpoint as a transformers model, whatever its weights' format."""
    config = AutoConfig.from_pretrained(folder)
    make = AutoModelForCausalLM.from_config
    model: PreTrainedModel = make(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    reader = open_weights(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read(name, parameter.shape))
    model.eval()
    return model


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
