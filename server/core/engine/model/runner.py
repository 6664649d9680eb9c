"""Runs scheduled chunks through the model: one forward, then a token or scores for each."""

import math
import sys
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from server.core.engine.engine import StepResult
from server.core.engine.heap import trim_heap
from server.core.engine.model.attention import Segment
from server.core.engine.model.kv_cache import KVCache
from server.core.engine.model.prefix_cache import PrefixCache
from server.core.engine.model.qwen import QwenModel
from server.core.engine.model.sampler import Sampler
from server.core.engine.scheduler import ScheduledChunk
from server.core.engine.sequence import PrefilledEvent, ScoredEvent, Sequence

# Rows whose logits are held at once, beside one for each sequence.
LOGITS_ROWS = 128


@dataclass(frozen=True)
class _State:
    cache: KVCache
    sampler: Sampler | None


class ModelRunner:
    """Keeps the KV cache and the sampler of every sequence that was admitted."""

    def __init__(
        self, model: QwenModel, *, vocab_size: int, max_kv_tokens: int, max_context: int,
        max_prefix_bytes: int = 0,
    ) -> None:  # fmt: skip
        """vocab_size: ids beyond it are padding of the output matrix and never come out.

        max_kv_tokens: room for all running sequences together, one of max_context at least.

        max_prefix_bytes: memory for what finished sequences computed, for others to reuse.
        """
        self._model = model
        self._vocab_size = vocab_size
        self._memory = model.new_memory(max_kv_tokens, max_context)
        self._prefixes = PrefixCache(max_prefix_bytes)
        self._states: dict[Sequence, _State] = {}

    @property
    def num_sequences(self) -> int:
        """Sequences that hold memory."""
        return len(self._states)

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the slots in use have room for."""
        return self._memory.num_tokens

    @torch.inference_mode()
    def step(self, chunks: list[ScheduledChunk]) -> dict[Sequence, StepResult | Exception]:
        """One forward over all chunks; a result for each whose prompt is now complete."""
        hidden = self._model.forward([self._segment(chunk) for chunk in chunks])
        # Of each complete prompt its hidden states after each of its layers, last token first.
        complete = {
            chunk.sequence: [rows[chunk.num_tokens - 1 :] for rows in states]
            for chunk, states in zip(chunks, hidden, strict=True)
            if chunk.is_last
        }
        continued = {
            sequence: states[-1]
            for sequence, states in complete.items()
            if sequence.params is not None or sequence.continuations
        }
        logits = self._logits(continued) if continued else {}
        results: dict[Sequence, StepResult | Exception] = {}
        for sequence, states in complete.items():
            try:
                results[sequence] = self._result(sequence, states, logits.get(sequence))
            except Exception as error:
                results[sequence] = error
        return results

    def _logits(self, rows: dict[Sequence, Tensor]) -> dict[Sequence, tuple[Tensor, Tensor]]:
        """Logits of what follows each prompt (V,), and log-probabilities of what is known to (T,).

        The latter are of the continuations' tokens but each one's first, in order.
        rows: the hidden state of the last prompt token, then of the continuations' tokens.
        """
        prompts = torch.cat([each[:1] for each in rows.values()])
        others = torch.cat([each[1:] for each in rows.values()])
        token_ids = torch.tensor(
            [token_id for each in rows for ids in each.continuations for token_id in ids[1:]],
            dtype=torch.long,
        )
        # In blocks, for the logits of all tokens of many labels may take gigabytes. The first
        # goes with the prompts; in most steps there is no other.
        first = self._model.logits(torch.cat([prompts, others[:LOGITS_ROWS]]))
        logits, of_others = first[: len(prompts)], first[len(prompts) :]
        logprobs = [self._logprobs(of_others, token_ids[:LOGITS_ROWS])]
        for begin in range(LOGITS_ROWS, len(others), LOGITS_ROWS):
            block = slice(begin, begin + LOGITS_ROWS)
            logprobs.append(self._logprobs(self._model.logits(others[block]), token_ids[block]))
        lengths = [len(each) - 1 for each in rows.values()]
        behind = torch.split(torch.cat(logprobs), lengths)
        return dict(zip(rows, zip(logits[:, : self._vocab_size], behind, strict=True), strict=True))

    def _logprobs(self, logits: Tensor, token_ids: Tensor) -> Tensor:
        """Of one token for each row of the logits (N, V): (N,)."""
        logprobs = logits[:, : self._vocab_size].log_softmax(-1)
        return logprobs.gather(1, token_ids[:, None])[:, 0]

    @torch.inference_mode()
    def admit(self, sequence: Sequence) -> int | None:
        """Gives the sequence room for its prompt, filled with the longest prefix that is known.

        Returns how many tokens that are; None if memory is short.
        """
        state = self._states.get(sequence) or self._new_state(sequence)
        if not self._memory.reserve(state.cache, len(sequence.token_ids) + _num_extra(sequence)):
            return None
        self._states[sequence] = state
        prefix = self._prefixes.lookup(sequence.token_ids, self._num_layers(sequence))
        if prefix is not None:
            self._memory.fill(state.cache, prefix)
        return state.cache.length

    @torch.inference_mode()
    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Makes room for the sequence's next tokens; False if memory is short."""
        cache = self._states[sequence].cache
        return self._memory.reserve(cache, num_tokens + _num_extra(sequence))

    @torch.inference_mode()
    def suspend(self, sequence: Sequence) -> None:
        """Gives the sequence's room to others; admitting it again goes on where it was."""
        self._remember(sequence)
        self._memory.free(self._states[sequence].cache)

    @torch.inference_mode()
    def release(self, sequence: Sequence, *, is_sound: bool) -> None:
        """Frees all the sequence holds; what others may begin with is kept, if it is sound."""
        if sequence not in self._states:
            return
        try:
            if is_sound:
                self._remember(sequence)
        finally:
            self._memory.free(self._states.pop(sequence).cache, is_sound=is_sound)

    def is_kept(self, num_tokens: int) -> bool:
        """Whether a prompt of that length, once computed, is kept for others. Any thread."""
        return self._prefixes.has_room_for(num_tokens * self._model.config.kv_bytes_per_token)

    def rest(self) -> None:
        """Gives memory that nothing is in back to the system: there is no work for now."""
        trim_heap()

    def _new_state(self, sequence: Sequence) -> _State:
        sampler = None
        if sequence.params is not None:
            sampler = Sampler(sequence.params, sequence.prompt_ids, self._vocab_size)
        return _State(KVCache(), sampler)

    def _remember(self, sequence: Sequence) -> None:
        bound = sequence.num_shared if sequence.is_scored else sys.maxsize
        length = min(sequence.num_computed, bound)
        if length:
            self._prefixes.store(
                sequence.token_ids[:length],
                self._states[sequence].cache,
                self._num_layers(sequence),
                is_pinned=sequence.is_pinned,
            )

    def _segment(self, chunk: ScheduledChunk) -> Segment:
        sequence = chunk.sequence
        begin = sequence.num_computed
        end = begin + chunk.num_tokens
        cache = self._states[sequence].cache
        # More only if a step failed behind its forward; what it wrote there is written again.
        cache.length = begin
        token_ids, positions = sequence.token_ids[begin:end], list(range(begin, end))
        layers = None
        if sequence.layers:
            # Before the last chunk no hidden states are needed; the segment only has to stop.
            wanted = sequence.layers if chunk.is_last else ()
            layers = tuple(sorted({*wanted, self._num_layers(sequence)}))
        segment = Segment(token_ids, positions, cache, sequence.is_decoding, layers=layers)
        if not (chunk.is_last and _num_extra(sequence)):
            return segment
        return _with_continuations(segment, sequence.continuations)

    def _num_layers(self, sequence: Sequence) -> int:
        return sequence.depth or self._model.config.num_layers

    def _result(
        self, sequence: Sequence, states: list[Tensor], logits: tuple[Tensor, Tensor] | None
    ) -> StepResult:
        """states: of the end of the prompt, (T, C) after each layer. logits: as `_logits` has them.

        Raises:
            ValueError: the logits or hidden states were not numbers.
        """
        sampler = self._states[sequence].sampler
        if sampler is not None:
            assert logits is not None
            return sampler.sample(logits[0])
        if not sequence.is_scored:
            return PrefilledEvent()
        logprobs: list[float] = []
        if logits is not None:
            first, others = logits
            logprobs = _score(first.log_softmax(-1), others.tolist(), sequence.continuations)
        if not sequence.layers:
            return ScoredEvent(logprobs)
        hidden_states = torch.stack([each[0] for each in states[: len(sequence.layers)]]).numpy()
        if not np.isfinite(hidden_states).all():
            raise ValueError("the model's hidden states are not finite")
        return ScoredEvent(logprobs, hidden_states)


def _num_extra(sequence: Sequence) -> int:
    """Tokens that are computed behind the prompt in its last step."""
    return sum(len(continuation) - 1 for continuation in sequence.continuations)


def _with_continuations(prompt: Segment, continuations: list[list[int]]) -> Segment:
    """The end of a prompt and, behind it, all continuations but their last tokens.

    Each continuation sees the prompt and itself only, so one forward scores them all.
    """
    num_prompt, num_cached = len(prompt.token_ids), prompt.cache.length
    branches = [continuation[:-1] for continuation in continuations]
    total = num_prompt + sum(map(len, branches))
    mask = torch.zeros(total, num_cached + total, dtype=torch.bool)
    mask[:, : num_cached + num_prompt] = True
    mask[:num_prompt] = torch.ones(num_prompt, num_cached + total).bool().tril(num_cached)
    token_ids, positions = list(prompt.token_ids), list(prompt.positions)
    next_position = positions[-1] + 1
    for branch in branches:
        begin, length = len(token_ids), len(branch)
        columns = slice(num_cached + begin, num_cached + begin + length)
        mask[begin : begin + length, columns] = torch.ones(length, length).bool().tril()
        token_ids += branch
        positions += range(next_position, next_position + length)
    return replace(prompt, token_ids=token_ids, positions=positions, mask=mask)


def _score(first: Tensor, others: list[float], continuations: list[list[int]]) -> list[float]:
    """Summed log-probability of each continuation.

    first: (V,) of its first token. others: of all its others, one continuation behind the other.

    Raises:
        ValueError: the logits were not numbers.
    """
    scores, begin = [], 0
    for continuation in continuations:
        end = begin + len(continuation) - 1
        score = first[continuation[0]].item() + sum(others[begin:end])
        begin = end
        if not math.isfinite(score):
            raise ValueError("the model's logits are not finite")
        scores.append(score)
    return scores
