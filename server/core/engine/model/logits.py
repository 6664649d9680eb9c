"""Logits and log-probabilities of a step, from its hidden states."""

from collections.abc import Mapping
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from server.core.engine.model.qwen import QwenModel
from server.core.engine.scheduler import ScheduledChunk
from server.core.engine.sequence import Sequence

# Rows whose logits are held at once, beside one for each sequence.
LOGITS_ROWS = 64


class States(NamedTuple):
    """Hidden states of a chunk.

    prompt: (T, C) after each of its layers. branches: (R, C), of its continuations; None if there
    are none of several tokens.
    """

    prompt: list[Tensor]
    branches: Tensor | None


def read_logits(
    model: QwenModel, vocab_size: int, states: Mapping[ScheduledChunk, States]
) -> tuple[dict[ScheduledChunk, Tensor], dict[ScheduledChunk, list[float]]]:
    """Logits behind each complete prompt (V,), and log-probabilities within continuations.

    The latter are of the continuations' tokens but each one's first, in order.
    """
    prompts = {
        chunk: of_chunk.prompt[-1][-1]
        for chunk, of_chunk in states.items()
        if chunk.is_prompt_complete and chunk.num_tokens and _needs_logits(chunk.sequence)
    }
    scored = {
        chunk: of_chunk.branches
        for chunk, of_chunk in states.items()
        if of_chunk.branches is not None
    }
    if not prompts and not scored:
        return {}, {}
    rows = [*(row[None] for row in prompts.values()), *scored.values()]
    token_ids = torch.tensor(
        [ids[i] for chunk in scored for ids in chunk.continuations for i in range(1, len(ids))],
        dtype=torch.long,
    )
    # In blocks, for the logits of all tokens of many labels may take gigabytes. The first
    # goes with the prompts; in most steps there is no other.
    hidden, num_prompts = torch.cat(rows), len(prompts)
    first = model.logits(hidden[: num_prompts + LOGITS_ROWS])[:, :vocab_size]
    logprobs = _logprobs(first[num_prompts:], token_ids[:LOGITS_ROWS])
    for begin in range(LOGITS_ROWS, len(token_ids), LOGITS_ROWS):
        block = model.logits(hidden[num_prompts + begin :][:LOGITS_ROWS])[:, :vocab_size]
        logprobs += _logprobs(block, token_ids[begin : begin + LOGITS_ROWS])
    parts = iter(logprobs)
    return (
        dict(zip(prompts, first, strict=False)),
        {chunk: list(islice(parts, len(rows))) for chunk, rows in scored.items()},
    )


def _logprobs(logits: Tensor, token_ids: Tensor) -> list[float]:
    """Of one token for each row of the logits (N, V)."""
    result: list[float] = logits.log_softmax(-1).gather(1, token_ids[:, None])[:, 0].tolist()
    return result


def _needs_logits(sequence: Sequence) -> bool:
    return sequence.params is not None or bool(sequence.continuations)
