"""Runs scheduled chunks through the model: one forward, then a token or scores for each."""

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from server.core.engine import StepResult
from server.core.model.kv_cache import KVCache
from server.core.model.prefix_cache import PrefixCache
from server.core.model.qwen import QwenModel, Segment
from server.core.model.sampler import Sampler
from server.core.scheduler import ScheduledChunk
from server.core.sequence import Sequence


@dataclass(frozen=True)
class _State:
    cache: KVCache
    sampler: Sampler | None


class ModelRunner:
    """Keeps the KV cache and the sampler of every running sequence."""

    def __init__(self, model: QwenModel, max_prefix_bytes: int = 0) -> None:
        """max_prefix_bytes: memory for what finished sequences computed, for others to reuse."""
        self._model = model
        self._prefixes = PrefixCache(max_prefix_bytes)
        self._states: dict[Sequence, _State] = {}

    @property
    def num_sequences(self) -> int:
        """Sequences that hold memory."""
        return len(self._states)

    @torch.inference_mode()
    def step(self, chunks: list[ScheduledChunk]) -> dict[Sequence, StepResult | Exception]:
        """One forward over all chunks; a result for each whose prompt is now complete."""
        segments = [self._segment(chunk) for chunk in chunks]
        hidden = self._model.forward(segments)
        results: dict[Sequence, StepResult | Exception] = {}
        begin = 0
        for chunk, segment in zip(chunks, segments, strict=True):
            end = begin + len(segment.token_ids)
            if chunk.is_last:
                # From the last prompt token on, so that continuations are included.
                rows = hidden[begin + chunk.num_tokens - 1 : end]
                try:
                    results[chunk.sequence] = self._result(chunk.sequence, rows)
                except Exception as error:
                    results[chunk.sequence] = error
            begin = end
        return results

    @torch.inference_mode()
    def admit(self, sequence: Sequence) -> int:
        """Gives the sequence a KV cache, filled with the longest prefix that is known."""
        cache = self._prefixes.lookup(sequence.prompt_ids) or self._model.new_cache()
        sampler = None
        if sequence.params is not None:
            vocab_size = self._model.config.vocab_size
            sampler = Sampler(sequence.params, sequence.prompt_ids, vocab_size)
        self._states[sequence] = _State(cache, sampler)
        return cache.length

    @torch.inference_mode()
    def release(self, sequence: Sequence, *, is_sound: bool) -> None:
        """Frees the sequence's KV cache; what others may begin with is kept, if it is sound."""
        state = self._states.pop(sequence, None)
        if state is None or not is_sound:
            return
        is_scored = bool(sequence.continuations)
        length = min(sequence.num_computed, sequence.num_shared if is_scored else sys.maxsize)
        if length:
            self._prefixes.store(
                sequence.token_ids[:length], state.cache, is_pinned=sequence.is_pinned
            )

    def _segment(self, chunk: ScheduledChunk) -> Segment:
        sequence = chunk.sequence
        begin = sequence.num_computed
        end = begin + chunk.num_tokens
        cache = self._states[sequence].cache
        token_ids, positions = sequence.token_ids[begin:end], list(range(begin, end))
        if not (sequence.continuations and chunk.is_last):
            return Segment(token_ids, positions, cache)
        return _with_continuations(token_ids, positions, cache, sequence.continuations)

    def _result(self, sequence: Sequence, rows: Tensor) -> StepResult:
        if not sequence.continuations and sequence.params is None:
            return StepResult()
        logits = self._model.logits(rows)
        sampler = self._states[sequence].sampler
        if sampler is not None:
            return StepResult(token_id=sampler.sample(logits[-1]))
        return StepResult(logprobs=_score(logits.log_softmax(-1), sequence.continuations))


def _with_continuations(
    token_ids: list[int], positions: list[int], cache: KVCache, continuations: list[list[int]]
) -> Segment:
    """The end of a prompt and, behind it, all continuations but their last tokens.

    Each continuation sees the prompt and itself only, so one forward scores them all.
    """
    num_prompt, num_cached = len(token_ids), cache.length
    branches = [continuation[:-1] for continuation in continuations]
    total = num_prompt + sum(map(len, branches))
    mask = torch.zeros(total, num_cached + total, dtype=torch.bool)
    mask[:, : num_cached + num_prompt] = True
    mask[:num_prompt] = torch.ones(num_prompt, num_cached + total).bool().tril(num_cached)
    token_ids, positions = list(token_ids), list(positions)
    next_position = positions[-1] + 1
    for branch in branches:
        begin, length = len(token_ids), len(branch)
        columns = slice(num_cached + begin, num_cached + begin + length)
        mask[begin : begin + length, columns] = torch.ones(length, length).bool().tril()
        token_ids += branch
        positions += range(next_position, next_position + length)
    return Segment(token_ids, positions, cache, mask)


def _score(logprobs: Tensor, continuations: list[list[int]]) -> list[float]:
    """Summed log-probability of each continuation; rows as `_with_continuations` laid them out.

    Raises:
        ValueError: the logits were not numbers.
    """
    scores, row = [], 1
    for continuation in continuations:
        score = logprobs[0, continuation[0]].item()
        for token_id in continuation[1:]:
            score += logprobs[row, token_id].item()
            row += 1
        if not math.isfinite(score):
            raise ValueError("the model's logits are not finite")
        scores.append(score)
    return scores
