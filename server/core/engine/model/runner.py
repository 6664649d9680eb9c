"""Runs scheduled chunks through the model: one forward pass, then tokens or scores for each."""

import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.core.engine.heap import trim_heap
from server.core.engine.lookup import PromptLookup
from server.core.engine.model.adapter_weights import LoadedAdapter, LoraWeights
from server.core.engine.model.attention.segment import Segment
from server.core.engine.model.kv_cache import KVCache
from server.core.engine.model.logits import ChunkStates, StepLogits, read_logits
from server.core.engine.model.lora import Lora
from server.core.engine.model.prefix_cache import PrefixCache
from server.core.engine.model.qwen import QwenModel
from server.core.engine.model.sampler import Sampler, sample
from server.core.engine.runner import StepResult
from server.core.engine.scheduler import ScheduledChunk
from server.core.engine.sequence import PrefilledEvent, ScoredEvent, Sequence, TokenEvent

# Maximum rows of a step with drafts.
MAX_DRAFT_ROWS = 8


@dataclass
class _State:
    """The runner's state of an admitted sequence.

    logprobs: (nats) of each continuation, once its prompt is computed; those of tokens after the
    first are added as they are computed. hidden_states: (L, C), see `Scores`.
    """

    cache: KVCache
    sampler: Sampler | None
    logprobs: list[float] = field(default_factory=list)
    hidden_states: NDArray[np.float32] | None = None
    lookup: PromptLookup | None = None  # created for the first draft


class ModelRunner:
    """A `Runner` that keeps the KV cache and the sampler of every admitted sequence."""

    def __init__(
        self, model: QwenModel, *, vocab_size: int, max_kv_tokens: int, max_context: int,
        max_prefix_bytes: int = 0, adapters: Iterable[LoadedAdapter] = (),
        max_draft_tokens: int = 0,
    ) -> None:  # fmt: skip
        """vocab_size: ids from it on are padding of the output matrix and never sampled.

        max_kv_tokens: capacity for all running sequences together, at least max_context.

        max_prefix_bytes: size of the prefix cache.

        adapters: those that sequences may name.

        max_draft_tokens: of one sequence in a step. Without kernels there are none: the last bits
        of a token's logits would depend on whether it was drafted.
        """
        self._model = model
        self._max_draft_tokens = max_draft_tokens if model.is_row_exact else 0
        self._vocab_size = vocab_size
        self._memory = model.new_memory(max_kv_tokens, max_context)
        self._prefixes = PrefixCache(max_prefix_bytes)
        self._states: dict[Sequence, _State] = {}
        self._loras: dict[str, Lora] = {}
        for adapter in adapters:
            self._add_adapter(adapter)

    @property
    def num_sequences(self) -> int:
        """Sequences that were admitted and not released."""
        return len(self._states)

    @property
    def num_kv_tokens(self) -> int:
        """Capacity in tokens of the slots in use."""
        return self._memory.num_tokens

    @torch.inference_mode()
    def step(
        self, chunks: list[ScheduledChunk], should_stop: Callable[[], bool] = lambda: False
    ) -> dict[Sequence, StepResult | Exception]:
        """Runs one forward pass over all chunks; returns a result for each complete sequence.

        Raises:
            StepInterruptedError: `should_stop`, called before each layer, returned True.
        """
        drafts = self._drafts(chunks)
        segments = {chunk: self._segments(chunk, drafts.get(chunk, [])) for chunk in chunks}
        computed = list(chain(*segments.values()))
        # There may be no row: continuations of one token after a computed prompt.
        hidden = iter(self._model.forward(computed, should_stop) if computed else ())
        states = {
            chunk: ChunkStates(
                next(hidden) if chunk.num_tokens else [],
                next(hidden)[-1] if parts and parts[-1].branches else None,
            )
            for chunk, parts in segments.items()
        }
        logits = read_logits(self._model, self._vocab_size, states, drafts)
        results = self._sample(logits, drafts)
        for chunk in chunks:
            if chunk.sequence.params is not None:
                continue
            try:
                if (result := self._score(chunk, states[chunk].prompt, logits)) is not None:
                    results[chunk.sequence] = result
            except Exception as error:
                results[chunk.sequence] = error
        return results

    def _drafts(self, chunks: list[ScheduledChunk]) -> dict[ScheduledChunk, list[int]]:
        """The draft of each chunk; none for a step of many rows, where checking costs more."""
        if len(chunks) * (1 + self._max_draft_tokens) > MAX_DRAFT_ROWS:
            return {}
        if not all(self._can_draft(chunk.sequence) for chunk in chunks):
            return {}
        return {chunk: self._draft(chunk.sequence) for chunk in chunks}

    def _can_draft(self, sequence: Sequence) -> bool:
        """Whether the sequence's logits are bit-identical with and without a draft."""
        return sequence.is_decoding and sequence.adapter.name not in self._loras

    def _draft(self, sequence: Sequence) -> list[int]:
        state, params = self._states[sequence], sequence.params
        assert params is not None
        room = state.cache.capacity - _num_positions(sequence, sequence.num_tokens)
        num_left = params.max_tokens - len(sequence.completion_ids) - 1
        if (limit := min(self._max_draft_tokens, room, num_left)) < 1:
            return []
        if state.lookup is None:
            state.lookup = PromptLookup(sequence.token_ids)
        return state.lookup.draft(limit)

    def _sample(
        self, logits: StepLogits, drafts: Mapping[ScheduledChunk, list[int]]
    ) -> dict[Sequence, StepResult | Exception]:
        """Samples the next token of each sequence, and one more after each right drafted token.

        Every token is sampled, so a draft changes no text.
        """
        sampled: dict[ScheduledChunk, list[TokenEvent]] = {chunk: [] for chunk in logits.sampled}
        failed: dict[ScheduledChunk, Exception] = {}
        sizes = (1 + len(drafts.get(chunk, ())) for chunk in sampled)
        # The row of each chunk whose token is sampled next.
        rows = dict(zip(sampled, accumulate(sizes, initial=0), strict=False))
        while rows:
            # Without drafts these are all rows, which need not be copied.
            is_all = len(rows) == len(logits.to_sample)
            selected = logits.to_sample if is_all else logits.to_sample[list(rows.values())]
            samplers = [self._sampler_of(chunk.sequence) for chunk in rows]
            for chunk, result in zip(list(rows), sample(samplers, selected), strict=True):
                row = rows.pop(chunk)
                if isinstance(result, Exception):
                    failed[chunk] = result
                    continue
                sampled[chunk].append(result)
                if _matches(drafts.get(chunk, []), sampled[chunk], chunk.sequence):
                    rows[chunk] = row + 1
        for chunk, tokens in sampled.items():
            self._learn(chunk.sequence, tokens, was_drafted=bool(drafts.get(chunk)))
        return {chunk.sequence: failed.get(chunk, tokens) for chunk, tokens in sampled.items()}

    def _sampler_of(self, sequence: Sequence) -> Sampler:
        sampler = self._states[sequence].sampler
        assert sampler is not None
        return sampler

    def _learn(self, sequence: Sequence, tokens: list[TokenEvent], *, was_drafted: bool) -> None:
        lookup = self._states[sequence].lookup
        if lookup is None:
            return
        for token in tokens:
            lookup.append(token.token_id)
        if was_drafted:
            lookup.learn(was_right=len(tokens) > 1)

    @torch.inference_mode()
    def admit(self, sequence: Sequence) -> int | None:
        """Allocates memory for the sequence's tokens, filled with the longest cached prefix.

        Returns how many of its tokens are cached; None if memory is short.
        """
        state = self._states.get(sequence)
        cache = KVCache() if state is None else state.cache
        if not self._memory.reserve(cache, _num_positions(sequence, sequence.num_tokens)):
            return None
        if state is None:
            state = self._states[sequence] = _State(cache, self._new_sampler(sequence))
        prefix = self._prefixes.lookup(
            _prefix_ids(sequence, sequence.num_tokens),
            self._num_layers(sequence),
            adapter=sequence.adapter.name,
        )
        if prefix is not None:
            self._memory.fill(state.cache, prefix)
        return state.cache.length - sequence.adapter.num_virtual_tokens

    @torch.inference_mode()
    def reserve(self, sequence: Sequence) -> bool:
        """Makes room for the sequence's next token; False if memory is short."""
        cache = self._states[sequence].cache
        # A failed step may have left another length.
        cache.length = _num_positions(sequence, sequence.num_computed)
        return self._memory.reserve(cache, 1)

    @torch.inference_mode()
    def suspend(self, sequence: Sequence) -> None:
        """Frees the sequence's memory; a later `admit` resumes it."""
        self._remember(sequence)
        self._memory.free(self._states[sequence].cache)

    @torch.inference_mode()
    def release(self, sequence: Sequence, *, is_sound: bool) -> None:
        """Frees the sequence's memory; if it is sound, caches what others may begin with."""
        if sequence not in self._states:
            return
        try:
            if is_sound:
                self._remember(sequence)
        finally:
            self._memory.free(self._states.pop(sequence).cache, is_sound=is_sound)

    def fits(self, sequence: Sequence, without: Collection[Sequence]) -> bool:
        """Whether the sequence could be admitted if those of `without` were suspended."""
        freed = [self._states[other].cache for other in without]
        return self._memory.fits(_num_positions(sequence, sequence.num_tokens), freed)

    def is_kept(self, num_tokens: int) -> bool:
        """Whether a prompt of that length is cached once it is computed. Thread-safe."""
        return self._prefixes.has_room_for(self._memory.num_bytes(num_tokens))

    def rest(self) -> None:
        """Returns free memory to the system. Called when the engine is idle."""
        self._memory.rest()
        trim_heap()

    @torch.inference_mode()
    def _add_adapter(self, loaded: LoadedAdapter) -> None:
        adapter, weights = loaded
        if isinstance(weights, LoraWeights):
            self._loras[adapter.name] = self._model.fold_lora(weights)
            return
        prefix = self._model.virtual_prefix(weights)
        self._prefixes.pin([0] * prefix.length, prefix, adapter=adapter.name)

    def _new_sampler(self, sequence: Sequence) -> Sampler | None:
        if sequence.params is None:
            return None
        return Sampler(sequence.params, sequence.prompt_ids, self._vocab_size)

    def _remember(self, sequence: Sequence) -> None:
        bound = sequence.num_shared if sequence.is_scored else sys.maxsize
        length = min(sequence.num_computed, bound)
        if length:
            self._prefixes.store(
                _prefix_ids(sequence, length),
                self._states[sequence].cache,
                self._num_layers(sequence),
                adapter=sequence.adapter.name,
                is_pinned=sequence.is_pinned,
            )

    def _segments(self, chunk: ScheduledChunk, draft: list[int]) -> list[Segment]:
        """One for the chunk's tokens and draft; one for its continuations, without last tokens."""
        sequence = chunk.sequence
        begin = sequence.num_computed
        end = begin + chunk.num_tokens
        first, last = _num_positions(sequence, begin), _num_positions(sequence, end)
        cache = self._states[sequence].cache
        # It is longer if a step failed after its forward pass or a draft was wrong; those positions
        # are written again.
        cache.length = first
        segments = []
        lora = self._loras.get(sequence.adapter.name)
        # None: the model's last layer.
        layers = (self._num_layers(sequence),) if sequence.layers else None
        if chunk.num_tokens:
            ids = sequence.tokens(begin, end) + draft
            positions = range(first, last + len(draft))
            # Before the prompt's last chunk, layers only says where the segment leaves.
            wanted = sequence.layers if chunk.is_prompt_complete else ()
            all_layers = layers and tuple(sorted({*wanted, *layers}))
            segments.append(
                Segment(ids, positions, cache, sequence.is_decoding, layers=all_layers, lora=lora)
            )
        if branches := [ids[:-1] for ids in chunk.continuations if len(ids) > 1]:
            lengths = tuple(map(len, branches))
            places = [last + i for length in lengths for i in range(length)]
            ids = list(chain(*branches))
            segments.append(Segment(ids, places, cache, branches=lengths, layers=layers, lora=lora))
        return segments

    def _num_layers(self, sequence: Sequence) -> int:
        return sequence.depth or self._model.config.num_layers

    def _score(
        self, chunk: ScheduledChunk, states: list[Tensor], logits: StepLogits
    ) -> StepResult | None:
        """The step's result for a sequence that samples nothing; None if it is not complete.

        states: the chunk's hidden states, (T, C) after each of its layers.

        Raises:
            ValueError: the logits or hidden states are not finite.
        """
        sequence, state = chunk.sequence, self._states[chunk.sequence]
        if chunk.is_prompt_complete and chunk.num_tokens:
            if sequence.layers:
                rows = [each[chunk.num_tokens - 1] for each in states[: len(sequence.layers)]]
                state.hidden_states = torch.stack(rows).numpy()
            if chunk in logits.scored:
                first_ids = torch.tensor([ids[0] for ids in sequence.continuations])
                state.logprobs = logits.scored[chunk].log_softmax(-1)[first_ids].tolist()
        remaining = iter(logits.logprobs.get(chunk, ()))
        for i, ids in enumerate(chunk.continuations, start=sequence.num_scored):
            state.logprobs[i] += sum(islice(remaining, len(ids) - 1))
        if not chunk.is_last:
            return None
        if not sequence.is_scored:
            return PrefilledEvent()
        if not all(map(math.isfinite, state.logprobs)):
            raise ValueError("the model's logits are not finite")
        if state.hidden_states is not None and not np.isfinite(state.hidden_states).all():
            raise ValueError("the model's hidden states are not finite")
        return ScoredEvent(state.logprobs, state.hidden_states)


def _matches(draft: list[int], tokens: list[TokenEvent], sequence: Sequence) -> bool:
    """Whether the draft has the last sampled token, so that the next one can be sampled, too."""
    token_id, index = tokens[-1].token_id, len(tokens) - 1
    assert sequence.params is not None
    is_end = token_id in sequence.params.stop_token_ids
    return not is_end and draft[index : index + 1] == [token_id]


def _num_positions(sequence: Sequence, num_tokens: int) -> int:
    """Positions of the sequence's first tokens and of the virtual ones before them."""
    return sequence.adapter.num_virtual_tokens + num_tokens


def _prefix_ids(sequence: Sequence, num_tokens: int) -> list[int]:
    """Ids of the same positions; 0 for each virtual token, which has no id."""
    return [0] * sequence.adapter.num_virtual_tokens + sequence.tokens(0, num_tokens)
