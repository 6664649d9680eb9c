"""One engine in a process of its own, measured on command: ours, or one of its peers.

Reads a case a line from stdin, as JSON, and answers each with a JSON line; `benchmarks.compare`
talks to several of these in turns.

    {"case": "prefill", "num_tokens": 128}                      -> {"seconds": ...}
    {"case": "decode", "num_streams": 8, "num_cached": 100}     -> {"seconds": ...} for a step
    {"case": "classify", "num_texts": 64, "num_tokens": 30}     -> {"seconds": ...}, BERT only
    {"case": "memory"}                                          -> {"peak_mib": ...}
"""

import itertools
import json
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

NUM_THREADS = len(os.sched_getaffinity(0))
NUM_STEPS = 16  # of a decode measurement; the median counts
MAX_CONTEXT = 4096


class EngineUnderTest(Protocol):
    def prefill(self, num_tokens: int) -> float:
        """Seconds to compute a prompt and its next token."""

    def decode(self, num_streams: int, num_cached: int) -> float:
        """Seconds of a step that gives each stream one more token, greedily."""


def prompt(num_tokens: int, seed: int) -> list[int]:
    """Random ids that every engine's vocabulary has."""
    return random.Random(seed).choices(range(1000, 15_000), k=num_tokens)


class Ours:
    """The server's model runner, without HTTP."""

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        from server.core.engine.model import load_runner, read_model_config

        config = read_model_config(checkpoint)
        self._runner = load_runner(
            checkpoint, config, dtype=dtype, vocab_size=config.vocab_size, num_threads=NUM_THREADS,
            max_kv_tokens=16 * MAX_CONTEXT, max_context=MAX_CONTEXT, max_prefix_bytes=0,
        )  # fmt: skip

    def prefill(self, num_tokens: int) -> float:
        sequence = self._admitted(num_tokens, seed=0)
        begin = time.perf_counter()
        self._step([sequence])
        seconds = time.perf_counter() - begin
        self._runner.release(sequence, is_sound=False)
        return seconds

    def decode(self, num_streams: int, num_cached: int) -> float:
        sequences = [self._admitted(num_cached, seed) for seed in range(num_streams)]
        for sequence in sequences:
            self._step([sequence])
        seconds = _median_seconds(lambda: self._step(sequences))
        for sequence in sequences:
            self._runner.release(sequence, is_sound=False)
        return seconds

    def _admitted(self, num_tokens: int, seed: int) -> "Sequence":  # noqa: F821
        from server.core.engine.sequence import SamplingParams, Sequence

        params = SamplingParams(max_tokens=MAX_CONTEXT, temperature=0.0)
        sequence = Sequence(prompt(num_tokens, seed), params, [], lambda event: None)
        assert self._runner.admit(sequence) == 0
        return sequence

    def _step(self, sequences: "list[Sequence]") -> None:  # noqa: F821
        from server.core.engine.scheduler import ScheduledChunk

        chunks = [ScheduledChunk(s, s.num_uncomputed) for s in sequences]
        assert all(self._runner.reserve(c.sequence, c.num_tokens) for c in chunks)
        results = self._runner.step(chunks)
        for chunk in chunks:
            chunk.advance()
            chunk.sequence.completion_ids.append(results[chunk.sequence].token_id)


class Transformers:
    """`generate` of the library, as most tutorials call it."""

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(NUM_THREADS)
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()

    def prefill(self, num_tokens: int) -> float:
        return self._token_times(num_tokens, 1)[0]

    def decode(self, num_streams: int, num_cached: int) -> float:
        assert num_streams == 1
        return statistics.median(self._token_times(num_cached, NUM_STEPS + 1)[1:])

    def _token_times(self, num_cached: int, num_new: int) -> list[float]:
        """Seconds until the first token, and from each to the next."""
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


class LlamaCpp:
    """llama.cpp by its C interface: batches of several sequences, greedy."""

    def __init__(self, checkpoint: Path, kind: str) -> None:
        # Here and in the other engines: a worker imports its own engine only.
        import llama_cpp

        from benchmarks.gguf_files import gguf_file

        self._lib = llama_cpp
        self._on_log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._on_log, None)
        path = gguf_file(checkpoint, kind)
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = 8 * 512 + 2048, 8
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = NUM_THREADS
        params.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)
        self._num_vocab = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )

    def prefill(self, num_tokens: int) -> float:
        self._clear()
        begin = time.perf_counter()
        self._compute([(0, position, t) for position, t in enumerate(prompt(num_tokens, 0))])
        self._best(-1)
        return time.perf_counter() - begin

    def decode(self, num_streams: int, num_cached: int) -> float:
        self._clear()
        for stream in range(num_streams):
            ids = prompt(num_cached, stream)
            for begin in range(0, num_cached, 512):
                chunk = enumerate(ids[begin : begin + 512], start=begin)
                self._compute([(stream, position, t) for position, t in chunk])
        positions, tokens = [num_cached] * num_streams, [1000] * num_streams

        def step() -> None:
            self._compute(
                [(i, positions[i], tokens[i]) for i in range(num_streams)], all_logits=True
            )
            for i in range(num_streams):
                positions[i] += 1
                tokens[i] = self._best(i)

        return _median_seconds(step)

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _compute(self, rows: list[tuple[int, int, int]], all_logits: bool = False) -> None:
        """rows: sequence, position, token."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (sequence, position, token) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = all_logits or i == len(rows) - 1
        if self._lib.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")

    def _best(self, row: int) -> int:
        import numpy as np

        logits = self._lib.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._num_vocab,)).argmax())


class Bert:
    """The classifier this server replaces: BERT-base in float32, one padded batch."""

    def __init__(self) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        torch.set_num_threads(NUM_THREADS)
        torch.manual_seed(0)
        self._model = BertForSequenceClassification(BertConfig(num_labels=3)).eval()

    def classify(self, num_texts: int, num_tokens: int) -> float:
        """Seconds for texts of equal length."""
        ids = torch.randint(1000, 20_000, (num_texts, num_tokens))
        with torch.inference_mode():
            begin = time.perf_counter()
            self._model(ids, attention_mask=torch.ones_like(ids))
            return time.perf_counter() - begin


ENGINES: dict[str, Callable[[Path], EngineUnderTest | Bert]] = {
    "ours-float32": lambda path: Ours(path, "float32"),
    "ours-bfloat16": lambda path: Ours(path, "bfloat16"),
    "ours-int8": lambda path: Ours(path, "int8"),
    "ours-int4": lambda path: Ours(path, "int4"),
    "transformers-float32": lambda path: Transformers(path, "float32"),
    "transformers-bfloat16": lambda path: Transformers(path, "bfloat16"),
    "llama.cpp-q8_0": lambda path: LlamaCpp(path, "q8_0"),
    "llama.cpp-q4_0": lambda path: LlamaCpp(path, "q4_0"),
    "llama.cpp-bf16": lambda path: LlamaCpp(path, "bf16"),
    "bert-base": lambda path: Bert(),
}


def _median_seconds(step: Callable[[], None]) -> float:
    seconds = []
    for _ in range(NUM_STEPS):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def main() -> None:
    name, checkpoint = sys.argv[1], Path(sys.argv[2])
    begin = time.perf_counter()
    engine = ENGINES[name](checkpoint)
    print(json.dumps({"ready_s": time.perf_counter() - begin}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        case = request.pop("case")
        if case == "memory":
            answer = {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        else:
            answer = {"seconds": getattr(engine, case)(**request)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
