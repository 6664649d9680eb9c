"""Logits and log-probabilities of a step, from its hidden states."""

from collections.abc import Mapping
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from server.core.engine.model.qwen import QwenModel
from server.core.engine.scheduler import ScheduledChunk

# Rows whose logits are held at once, beside one for each sequence.
LOGITS_ROWS = 64


class ChunkStates(NamedTuple):
    """Hidden states of a chunk.

    prompt: (T, C) after each of its layers. branches: (R, C), of its continuations; None if there
    are none of several tokens.
    """

    prompt: list[Tensor]
    branches: Tensor | None


class StepLogits(NamedTuple):
    """What a step says of the next tokens.

    to_sample: (N, V). Each of `sampled` has one row for the next token, and one more for each
    token of its draft.
    scored: (V,), of the token behind each prompt that is scored.
    logprobs: of the tokens of its continuations, in order, without the first token of each.
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

    drafts: the drafted tokens of each chunk, which were computed behind its own.
    """
    complete = [chunk for chunk in states if chunk.is_prompt_complete and chunk.num_tokens]
    sampled = [chunk for chunk in complete if chunk.sequence.params is not None]
    prompts = [chunk for chunk in complete if chunk.sequence.continuations]
    branches = {
        chunk: of_chunk.branches
        for chunk, of_chunk in states.items()
        if of_chunk.branches is not None
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
    # In blocks, for the logits of all tokens of many labels may take gigabytes. The first
    # goes with the prompts; in most steps there is no other.
    hidden, num_single = torch.cat(rows), num_sampled + len(prompts)
    first = model.logits(hidden[: num_single + LOGITS_ROWS])
    scored = first[num_sampled:num_single, :vocab_size]
    logprobs = _logprobs(first[num_single:, :vocab_size], token_ids[:LOGITS_ROWS])
    for begin in range(LOGITS_ROWS, len(token_ids), LOGITS_ROWS):
        block = model.logits(hidden[num_single + begin :][:LOGITS_ROWS])[:, :vocab_size]
        logprobs += _logprobs(block, token_ids[begin : begin + LOGITS_ROWS])
    parts = iter(logprobs)
    return StepLogits(
        sampled,
        first[:num_sampled],
        dict(zip(prompts, scored, strict=True)),
        {chunk: list(islice(parts, len(hidden))) for chunk, hidden in branches.items()},
    )


def _logprobs(logits: Tensor, token_ids: Tensor) -> list[float]:
    """Of one token for each row of the logits (N, V)."""
    result: list[float] = logits.log_softmax(-1).gather(1, token_ids[:, None])[:, 0].tolist()
    return result
