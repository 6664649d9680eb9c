"""Logits and log-probabilities of a step, from its hidden states."""

from collections.abc import Mapping
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from server.core.engine.model.qwen import QwenModel
from server.core.engine.scheduler import ScheduledChunk

# Rows of continuations whose logits are held at once.
LOGITS_ROWS = 64


class ChunkStates(NamedTuple):
    """Hidden states of a chunk.

    prompt: (T, C) after each of its layers. branches: (R, C), of its continuations; None if none
    has several tokens.
    """

    prompt: list[Tensor]
    branches: Tensor | None


class StepLogits(NamedTuple):
    """Logits and log-probabilities that a step's sequences need.

    to_sample: (N, V). Each of `sampled` has one row for the next token, and one more for each
    token of its draft.
    scored: (V,), of the token after each prompt that is scored.
    logprobs: (nats) of all tokens of a chunk's continuations but their first ones, in order.
    """

    sampled: list[ScheduledChunk]
    to_sample: Tensor
    scored: dict[ScheduledChunk, Tensor]
    logprobs: dict[ScheduledChunk, list[float]]


def read_logits(
    model: QwenModel,
    vocab_size: int,
    states: Mapping[ScheduledChunk, ChunkStates],
    drafts: Mapping[ScheduledChunk, list[int]],
) -> StepLogits:
    """Computes the logits that the step's sequences need.

    drafts: the drafted tokens of each chunk, which were computed after its own.
    """
    complete = [chunk for chunk in states if chunk.is_prompt_complete and chunk.num_tokens]
    sampled = [chunk for chunk in complete if chunk.sequence.params is not None]
    prompts = [chunk for chunk in complete if chunk.sequence.continuations]
    branches = {
        chunk: chunk_states.branches
        for chunk, chunk_states in states.items()
        if chunk_states.branches is not None
    }
    rows = [states[chunk].prompt[-1][-1 - len(drafts.get(chunk, ())) :] for chunk in sampled]
    num_sampled = sum(map(len, rows))
    rows += [states[chunk].prompt[-1][-1:] for chunk in prompts]
    rows += branches.values()
    if not rows:
        return StepLogits([], torch.empty(0, 0), {}, {})
    token_ids = torch.tensor(
        [ids[i] for chunk in branches for ids in chunk.continuations for i in range(1, len(ids))],
        dtype=torch.long,
    )
    # In blocks: the logits of all tokens of many labels may take gigabytes. The first block is
    # computed with the prompts' rows; most steps have no other.
    hidden, num_single = torch.cat(rows), num_sampled + len(prompts)
    first = model.logits(hidden[: num_single + LOGITS_ROWS])
    scored = first[num_sampled:num_single, :vocab_size]
    logprobs = _logprobs(first[num_single:, :vocab_size], token_ids[:LOGITS_ROWS])
    for begin in range(LOGITS_ROWS, len(token_ids), LOGITS_ROWS):
        block = model.logits(hidden[num_single + begin :][:LOGITS_ROWS])[:, :vocab_size]
        logprobs += _logprobs(block, token_ids[begin : begin + LOGITS_ROWS])
    remaining = iter(logprobs)
    return StepLogits(
        sampled,
        first[:num_sampled],
        dict(zip(prompts, scored, strict=True)),
        {chunk: list(islice(remaining, len(rows))) for chunk, rows in branches.items()},
    )


def _logprobs(logits: Tensor, token_ids: Tensor) -> list[float]:
    """Log-probability (nats) of one token for each row of the logits (N, V)."""
    result: list[float] = logits.log_softmax(-1).gather(1, token_ids[:, None])[:, 0].tolist()
    return result
