"""transformers' `generate`, and BERT for labels, as most tutorials use them."""

import itertools
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from benchmarks.engines.measuring import NUM_STEPS, NUM_THREADS, prompt, seconds


class Transformers:
    """transformers' `generate` with one stream."""

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        torch.set_num_threads(NUM_THREADS)
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()

    def prefill(self, num_tokens: int) -> float:
        return self._token_times(num_tokens, 1)[0]

    def decode(self, num_streams: int, num_cached: int, sampling: bool = False) -> float:
        assert num_streams == 1 and not sampling
        return statistics.median(self._token_times(num_cached, NUM_STEPS + 1)[1:])

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Iterable[NDArray[np.float32]]:
        return [self._model(torch.tensor([ids[:-1]])).logits[0].float().numpy()]

    def _token_times(self, num_cached: int, num_new: int) -> list[float]:
        """Seconds to the first token, and from each token to the next."""
        times: list[float] = []

        class Clock:
            def put(self, value: object) -> None:
                times.append(time.perf_counter())

            def end(self) -> None:
                pass

        with torch.inference_mode():
            self._model.generate(
                torch.tensor([prompt(num_cached, 0)]),
                attention_mask=torch.ones(1, num_cached, dtype=torch.long),
                do_sample=False, max_new_tokens=num_new, min_new_tokens=num_new,
                pad_token_id=0, streamer=Clock(),
            )  # fmt: skip
        return [b - a for a, b in itertools.pairwise(times)]


class Bert:
    """The classifier that this server replaces: BERT-base in float32, one padded batch."""

    def __init__(self) -> None:
        torch.set_num_threads(NUM_THREADS)
        torch.manual_seed(0)
        config = BertConfig()
        config.num_labels = 3
        self._model = BertForSequenceClassification(config).eval()

    @torch.inference_mode()
    def classify(self, num_texts: int, num_tokens: int) -> float:
        """Seconds for texts of equal length."""
        ids = torch.randint(1000, 20_000, (num_texts, num_tokens))
        return seconds(lambda: self._model(ids, attention_mask=torch.ones_like(ids)))
