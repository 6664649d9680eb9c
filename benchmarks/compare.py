"""Our engine beside its peers on one checkpoint: decode, prefill, memory, time to be ready.

Engines run in processes of their own and are measured in turns, round by round; ratios are
taken within a round, because absolute numbers of a shared machine are noisy. Prints a table
for people and, last, one line of JSON.

    python -m benchmarks.compare --rounds 5
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import DEFAULT_FOLDER, make_checkpoint
from benchmarks.engines import ENGINES
from benchmarks.figures import print_table, summary
from benchmarks.worker import Worker

Figures = dict[tuple[str, str], list[float]]
TOKEN_ENGINES = [name for name in ENGINES if name != "bert-base"]

# Name, request, tokens of one answer. Tokens per second is what is reported.
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("decode 1 stream", {"case": "decode", "num_streams": 1, "num_cached": 100}, 1),
    ("decode 1 stream at 2000", {"case": "decode", "num_streams": 1, "num_cached": 2000}, 1),
    ("decode 8 streams", {"case": "decode", "num_streams": 8, "num_cached": 100}, 8),
    ("prefill 128", {"case": "prefill", "num_tokens": 128}, 128),
    ("prefill 512", {"case": "prefill", "num_tokens": 512}, 512),
]
# Our figure, the peer's, what to reach.
GOALS = [
    (("ours-int8", "decode 1 stream"), ("llama.cpp-q8_0", "decode 1 stream"), 1.0),
    (("ours-int4", "decode 1 stream"), ("llama.cpp-q4_0", "decode 1 stream"), 1.0),
    (("ours-int8", "decode 1 stream"), ("transformers-float32", "decode 1 stream"), 5.0),
    (("ours-int8", "decode 1 stream"), ("transformers-bfloat16", "decode 1 stream"), None),
    (("ours-int8", "decode 8 streams"), ("llama.cpp-q8_0", "decode 8 streams"), 2.5),
    (("ours-int8", "decode 8 streams"), ("llama.cpp-q4_0", "decode 8 streams"), 1.5),
    (("ours-int8", "prefill 128"), ("llama.cpp-q8_0", "prefill 128"), 2.0),
    (("ours-int8", "prefill 512"), ("llama.cpp-q8_0", "prefill 512"), 2.0),
    (("ours-int8", "prefill 128"), ("llama.cpp-q4_0", "prefill 128"), 1.3),
    (("ours-int8", "prefill 512"), ("llama.cpp-q4_0", "prefill 512"), 1.3),
    (("ours-int8", "prefill 128"), ("llama.cpp-bf16", "prefill 128"), 1.3),
    (("ours-int8", "prefill 512"), ("llama.cpp-bf16", "prefill 512"), 1.3),
    (("ours-int8", "decode 8 streams"), ("ours-int8", "decode 1 stream"), 4.0),
    (("ours-int8", "decode 1 stream at 2000"), ("ours-int8", "decode 1 stream"), 0.7),
]  # fmt: skip


def can(engine: str, request: dict[str, Any]) -> bool:
    """transformers' generate is measured as people use it: one stream, a short chat."""
    if not engine.startswith("transformers"):
        return True
    return request.get("num_streams", 1) == 1 and request.get("num_cached", 0) <= 100


def single_stream_peaks(workers: dict[str, Worker]) -> dict[str, int]:
    """What each has taken of memory at most, in MiB: loading, and decoding one stream."""
    peaks = {}
    for name, worker in workers.items():
        worker.ask(CASES[0][1])
        peaks[name] = round(worker.ask({"case": "memory"})["peak_mib"])
    return peaks


def measure(workers: dict[str, Worker], rounds: int) -> Figures:
    """Tokens per second of every engine and case, once a round, after a round to warm up."""
    figures: Figures = defaultdict(list)
    for number in range(rounds + 1):
        for case, request, num_tokens in CASES:
            for name, worker in workers.items():
                if can(name, request):
                    tokens_per_s = num_tokens / worker.ask(request)["seconds"]
                    if number:
                        figures[name, case].append(tokens_per_s)
    return figures


def run(checkpoint: Path, engines: list[str], rounds: int) -> dict[str, Any]:
    """Measures, prints the table, and returns all figures."""
    workers: dict[str, Worker] = {}
    try:
        for name in engines:
            workers[name] = Worker(name, checkpoint)
        memory = single_stream_peaks(workers)
        figures = measure(workers, rounds)
        ready = {n: round(w.ready_s, 1) for n, w in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    return report(figures, memory, ready)


def report(figures: Figures, memory: dict[str, int], ready: dict[str, float]) -> dict[str, Any]:
    """Prints the tables; returns what is in them."""
    rows = {f"{name}: {case}": summary(values) for (name, case), values in figures.items()}
    ratios = {}
    for ours, theirs, goal in GOALS:
        if ours in figures and theirs in figures:
            pairs = zip(figures[ours], figures[theirs], strict=True)
            name = f"{ours[0]} / {theirs[0]}: {ours[1]}"
            ratios[name] = {**summary([a / b for a, b in pairs]), "goal": goal}
    print_table("tokens per second, engines alone", rows)
    print_table("ratios, round by round", ratios)
    for name in memory:
        print(
            f"{name:30} peak memory, one stream {memory[name]:>6} MiB, "
            f"ready after {ready[name]:>5} s"
        )
    return {**rows, **ratios, "peak_mib": memory, "ready_s": ready}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--engines", nargs="+", choices=TOKEN_ENGINES, default=TOKEN_ENGINES)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(json.dumps(run(make_checkpoint(args.checkpoint), args.engines, args.rounds)))


if __name__ == "__main__":
    main()
