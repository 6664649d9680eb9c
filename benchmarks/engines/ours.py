"""The server's engine without HTTP: its scheduler and its model runner."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.engines.measuring import (
    MAX_CONTEXT,
    MAX_STREAMS,
    NUM_THREADS,
    QWEN_SAMPLING,
    median_step_seconds,
    prompt,
    seconds,
)
from benchmarks.perplexity import logprobs
from server.config import Settings
from server.core.engine import sequence as engine_sequence
from server.core.engine.allocator import RunnerAllocator
from server.core.engine.model import load_runner, read_model_config
from server.core.engine.model.qwen import load_qwen
from server.core.engine.scheduler import Scheduler
from server.core.engine.sequence import Event, SamplingParams
from server.core.engine.work import Work

MAX_ROWS = Settings.model_fields["max_num_batched_tokens"].default  # per step
GREEDY = {"temperature": 0.0}


class Ours:
    """Our engine, with steps scheduled as in the server."""

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype
        self._config = read_model_config(checkpoint)
        self._runner = load_runner(
            checkpoint, self._config, dtype=dtype, vocab_size=self._config.vocab_size,
            num_threads=NUM_THREADS, max_kv_tokens=16 * MAX_CONTEXT, max_context=MAX_CONTEXT,
            max_prefix_bytes=0, max_draft_tokens=0,
        )  # fmt: skip
        allocator = RunnerAllocator(self._runner, _fail)
        self._scheduler = Scheduler(MAX_STREAMS, MAX_ROWS, allocator)

    def prefill(self, num_tokens: int) -> float:
        self._add(prompt(num_tokens, 0), GREEDY, Work())
        result = seconds(self._finish_prompts)
        self._release_all()
        return result

    def decode(self, num_streams: int, num_cached: int, sampling: bool = False) -> float:
        params = QWEN_SAMPLING if sampling else GREEDY
        work = Work()
        for seed in range(num_streams):
            self._add(prompt(num_cached, seed), {**params, "seed": seed}, work)
        self._finish_prompts()
        result = median_step_seconds(self._step)
        self._release_all()
        return result

    def generate(self, num_streams: int, num_cached: int, num_new: int, token_id: int) -> float:
        """Seconds from the prompts of several requests to the last new token.

        token_id: the id of all new tokens, by a bias, as in `benchmarks.light_client`.
        """

        def run() -> None:
            self._step()
            while self._running:
                self._step()

        params = {**GREEDY, "max_tokens": num_new, "logit_bias": ((token_id, 100.0),)}
        for seed in range(num_streams):
            self._add(prompt(num_cached, seed), params, Work())
        return seconds(run)

    def logits(self, ids: Sequence[int]) -> Iterable[NDArray[np.float32]]:
        # The runner returns tokens only, so the model is loaded again. Log-probabilities are valid
        # logits.
        model = load_qwen(self._checkpoint, self._config, self._dtype)
        yield logprobs(model, ids, self._config.vocab_size).numpy()

    @property
    def _running(self) -> list[engine_sequence.Sequence]:
        return self._scheduler.admission.running

    def _add(self, ids: list[int], sampling: Mapping[str, Any], work: Work) -> None:
        params = SamplingParams(**{"max_tokens": MAX_CONTEXT, **sampling})
        self._scheduler.admission.add(engine_sequence.Sequence(ids, params, work=work))

    def _finish_prompts(self) -> None:
        self._step()
        while not all(sequence.is_decoding for sequence in self._running):
            self._step()

    def _step(self) -> None:
        chunks = self._scheduler.schedule()
        results = self._runner.step(chunks)
        for chunk in chunks:
            chunk.advance()
        for sequence, result in results.items():
            if not isinstance(result, list):
                raise RuntimeError(f"a step returned {result!r}")
            [token] = result
            sequence.completion_ids.append(token.token_id)
            if sequence.params and len(sequence.completion_ids) >= sequence.params.max_tokens:
                self._release(sequence)

    def _release(self, sequence: engine_sequence.Sequence) -> None:
        self._scheduler.admission.remove(sequence)
        self._runner.release(sequence, is_sound=False)

    def _release_all(self) -> None:
        for sequence in list(self._running):
            self._release(sequence)


def _fail(sequence: engine_sequence.Sequence, event: Event) -> None:
    raise RuntimeError(f"a sequence ended with {event!r}")
