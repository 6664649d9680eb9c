"""Shared by the engines' processes: prompts, clocks, memory, perplexity."""

import math
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

NUM_THREADS = len(os.sched_getaffinity(0))
NUM_STEPS = 16  # of a decode measurement, which is their median
MAX_CONTEXT = 4096  # at least the longest prompt and NUM_STEPS
MAX_STREAMS = 8
MAX_BATCH_CONTEXT = 256  # of each stream in a batch
STEP_ROWS = 256  # per forward, for perplexity
# From Qwen's generation_config.json.
QWEN_SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}


class EngineUnderTest(Protocol):
    """A measured engine."""

    def prefill(self, num_tokens: int) -> float:
        """Seconds to compute a prompt and its next token."""

    def decode(self, num_streams: int, num_cached: int, sampling: bool = False) -> float:
        """Seconds of a step that gives each stream one token.

        num_cached: tokens of each stream's prompt. sampling: with Qwen's defaults, else greedy.
        """

    def logits(self, ids: Sequence[int]) -> Iterable[NDArray[np.float32]]:
        """Logits of the next token after each but the last: (T - 1, V), in blocks of rows."""


def prompt(num_tokens: int, seed: int) -> list[int]:
    """Random ids within every engine's vocabulary."""
    return random.Random(seed).choices(range(1000, 15_000), k=num_tokens)


def median_step_seconds(step: Callable[[], object]) -> float:
    return statistics.median(seconds(step) for _ in range(NUM_STEPS))


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def peak_mib() -> float:
    """Peak resident memory. Not `ru_maxrss`, which may be the parent's peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert match is not None
    return int(match[1]) / 1024


def perplexity(engine: EngineUnderTest, texts: Sequence[Sequence[int]], vocab_size: int) -> float:
    """Perplexity of the texts. vocab_size: logits beyond it are padding."""
    loss = sum(_loss(engine.logits(ids), ids[1:], vocab_size) for ids in texts)
    return math.exp(loss / sum(len(ids) - 1 for ids in texts))


def _loss(blocks: Iterable[NDArray[np.float32]], targets: Sequence[int], vocab_size: int) -> float:
    """Negative log-probability of all targets, in nats."""
    loss, begin = 0.0, 0
    for block in blocks:
        logits = block[:, :vocab_size]
        highest = logits.max(axis=1)
        log_sums = np.log(np.exp(logits - highest[:, None]).sum(axis=1)) + highest
        next_ids = targets[begin : begin + len(logits)]
        loss += float((log_sums - logits[np.arange(len(logits)), next_ids]).sum())
        begin += len(logits)
    assert begin == len(targets)
    return loss


def answer(engine: Any, request: dict[str, Any]) -> dict[str, float]:
    """Measures the case of the request (see the package's docstring)."""
    match request.pop("case"):
        case "memory":
            return {"peak_mib": peak_mib()}
        case "perplexity":
            return {"perplexity": perplexity(engine, **request)}
        case case:
            return {"seconds": getattr(engine, case)(**request)}
