"""OpenVINO GenAI's continuous batching, which its `LLMPipeline` also uses.

Runs in its own environment (see the package's docstring).
"""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
from numpy.typing import NDArray

from benchmarks.engines.measuring import (
    NUM_STEPS,
    NUM_THREADS,
    QWEN_SAMPLING,
    STEP_ROWS,
    prompt,
    seconds,
)

PROPERTIES = {"INFERENCE_NUM_THREADS": NUM_THREADS}


class OpenVino:
    """Computes a prompt in one step, as `LLMPipeline` does, but without a prefix cache."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.max_num_batched_tokens = 2**20
        scheduling.enable_prefix_caching = False
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            folder, scheduling, "CPU", PROPERTIES
        )

    def prefill(self, num_tokens: int) -> float:
        return self._step_times(1, num_tokens, num_new=1)[0]

    def decode(self, num_streams: int, num_cached: int, sampling: bool = False) -> float:
        times = self._step_times(num_streams, num_cached, NUM_STEPS + 1, sampling)
        return statistics.median(times[1:])

    def logits(self, ids: Sequence[int]) -> Iterable[NDArray[np.float32]]:
        # The pipeline returns tokens only, so the model is loaded again.
        model = openvino.Core().compile_model(
            self._folder / "openvino_model.xml", "CPU", PROPERTIES
        )
        request = model.create_infer_request()
        for begin in range(0, len(ids) - 1, STEP_ROWS):
            end = min(begin + STEP_ROWS, len(ids) - 1)
            inputs = {
                "input_ids": np.array([ids[begin:end]]),
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(begin, end)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
            yield request.infer(inputs)["logits"][0]

    def _step_times(
        self, num_streams: int, num_cached: int, num_new: int, sampling: bool = False
    ) -> list[float]:
        """Seconds of every step: all prompts first, then one token for each."""
        handles = []  # a request without a handle is dropped
        for seed in range(num_streams):
            config = openvino_genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos = num_new, True
            config.do_sample, config.rng_seed = sampling, seed
            for name, value in QWEN_SAMPLING.items() if sampling else ():
                setattr(config, name, value)
            ids = openvino.Tensor(np.array([prompt(num_cached, seed)]))
            handles.append(self._pipeline.add_request(seed, ids, config))
        times = []
        while self._pipeline.has_non_finished_requests():
            times.append(seconds(self._pipeline.step))
        assert len(times) == num_new
        return times
