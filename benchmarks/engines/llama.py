"""llama.cpp through its C interface, with batches of several sequences."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from benchmarks.engines.measuring import (
    MAX_BATCH_CONTEXT,
    MAX_CONTEXT,
    NUM_THREADS,
    QWEN_SAMPLING,
    STEP_ROWS,
    median_step_seconds,
    prompt,
    seconds,
)

MAX_ROWS = 512  # per forward, llama.cpp's default
# Referenced here because llama.cpp calls it until the process ends.
IGNORE_LOG = llama_cpp.llama_log_callback(lambda level, text, data: None)


class LlamaCpp:
    """Gives every stream its own KV cells: a shared memory is some percent slower."""

    def __init__(self, gguf: Path, *, has_flash_attention: bool) -> None:
        llama_cpp.llama_log_set(IGNORE_LOG, None)
        self._has_flash_attention = has_flash_attention
        self._model = llama_cpp.llama_model_load_from_file(
            str(gguf).encode(), llama_cpp.llama_model_default_params()
        )
        self._batch = llama_cpp.llama_batch_init(MAX_ROWS, 0, 1)
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._num_vocab = llama_cpp.llama_vocab_n_tokens(vocab)

    def prefill(self, num_tokens: int) -> float:
        context = self._cleared_context(1)

        def run() -> None:
            self._compute_prompt(context, 0, prompt(num_tokens, 0))
            self._best(context, -1)

        return seconds(run)

    def decode(self, num_streams: int, num_cached: int, sampling: bool = False) -> float:
        context = self._cleared_context(num_streams)
        samplers = []
        for stream in range(num_streams):
            ids = prompt(num_cached, stream)
            self._compute_prompt(context, stream, ids)
            if sampling:
                samplers.append(self._qwen_sampler(stream, ids))
        positions, tokens = [num_cached] * num_streams, [1000] * num_streams

        def step() -> None:
            rows = [(i, positions[i], tokens[i]) for i in range(num_streams)]
            self._compute(context, rows, all_logits=True)
            for i in range(num_streams):
                positions[i] += 1
                tokens[i] = (
                    llama_cpp.llama_sampler_sample(samplers[i], context, i)
                    if sampling
                    else self._best(context, i)
                )

        result = median_step_seconds(step)
        for sampler in samplers:
            llama_cpp.llama_sampler_free(sampler)
        return result

    def logits(self, ids: Sequence[int]) -> Iterable[NDArray[np.float32]]:
        context = self._cleared_context(1)
        for begin in range(0, len(ids) - 1, STEP_ROWS):
            part = ids[begin : min(begin + STEP_ROWS, len(ids) - 1)]
            rows = [(0, begin + i, token) for i, token in enumerate(part)]
            self._compute(context, rows, all_logits=True)
            logits = llama_cpp.llama_get_logits(context)
            yield np.ctypeslib.as_array(logits, shape=(len(part), self._num_vocab))

    @functools.cache  # noqa: B019 an engine lives as long as its process
    def _context(self, num_streams: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = num_streams
        params.n_ctx = MAX_CONTEXT if num_streams == 1 else num_streams * MAX_BATCH_CONTEXT
        params.n_batch = params.n_ubatch = MAX_ROWS
        params.n_threads = params.n_threads_batch = NUM_THREADS
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if self._has_flash_attention
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        return llama_cpp.llama_init_from_model(self._model, params)

    def _cleared_context(self, num_streams: int) -> Any:
        context = self._context(num_streams)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        return context

    def _compute_prompt(self, context: Any, stream: int, ids: list[int]) -> None:
        for begin in range(0, len(ids), MAX_ROWS):
            chunk = enumerate(ids[begin : begin + MAX_ROWS], start=begin)
            self._compute(context, [(stream, position, token) for position, token in chunk])

    def _compute(
        self, context: Any, rows: list[tuple[int, int, int]], all_logits: bool = False
    ) -> None:
        """rows: sequence, position, token."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (sequence, position, token) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = all_logits or i == len(rows) - 1
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")

    def _best(self, context: Any, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._num_vocab,)).argmax())

    def _qwen_sampler(self, seed: int, prompt_ids: list[int]) -> Any:
        """Qwen's defaults in transformers' order; also penalizes the prompt's tokens."""
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        for sampler in (
            llama_cpp.llama_sampler_init_penalties(
                self._num_vocab, MAX_BATCH_CONTEXT, QWEN_SAMPLING["repetition_penalty"], 0.0, 0.0
            ),
            llama_cpp.llama_sampler_init_top_k(QWEN_SAMPLING["top_k"]),
            llama_cpp.llama_sampler_init_temp(QWEN_SAMPLING["temperature"]),
            llama_cpp.llama_sampler_init_top_p(QWEN_SAMPLING["top_p"], 1),
            llama_cpp.llama_sampler_init_dist(seed),
        ):
            llama_cpp.llama_sampler_chain_add(chain, sampler)
        for token in prompt_ids:
            llama_cpp.llama_sampler_accept(chain, token)
        return chain
