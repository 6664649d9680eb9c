"""Our engine beside its peers on one checkpoint: decode, prefill, memory, time to be ready.

Engines run in processes of their own and are measured in turns, round by round; ratios are
taken within a round, because absolute numbers of a shared machine are noisy. Prints a table
for people and, last, one line of JSON.

    python -m benchmarks.compare --rounds 5
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import DEFAULT_FOLDER, make_checkpoint
from benchmarks.engines import ENGINES
from benchmarks.latency import summary

Figures = dict[tuple[str, str], list[float]]

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


class Worker:
    """An engine in a process of its own."""

    def __init__(self, name: str, checkpoint: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.engines", name, str(checkpoint)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ready_s: float = self._answer()["ready_s"]

    def ask(self, request: dict[str, Any]) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} has died")
        answer: dict[str, float] = json.loads(line)
        return answer


def can(engine: str, request: dict[str, Any]) -> bool:
    """transformers' generate has no continuous batches, and its float32 is slow to wait for."""
    if not engine.startswith("transformers"):
        return True
    return request.get("num_streams", 1) == 1 and request.get("num_cached", 0) <= 100


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    checkpoint = make_checkpoint(args.checkpoint)
    workers: dict[str, Worker] = {}
    try:
        for name in args.engines:
            workers[name] = Worker(name, checkpoint)
        figures = measure(workers, args.rounds)
        memory = {n: round(w.ask({"case": "memory"})["peak_mib"]) for n, w in workers.items()}
        ready = {n: round(w.ready_s, 1) for n, w in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    report(figures, memory, ready, args.rounds)


def report(figures: Figures, memory: dict[str, int], ready: dict[str, float], rounds: int) -> None:
    """Prints the tables and the JSON line."""
    print(f"{'tokens per second':52} {'min':>9} {'median':>9} {'max':>9}")
    rows = {f"{name}: {case}": summary(values) for (name, case), values in figures.items()}
    ratios = {}
    for ours, theirs, goal in GOALS:
        if ours in figures and theirs in figures:
            pairs = zip(figures[ours], figures[theirs], strict=True)
            ratios[f"{ours[0]} / {theirs[0]}: {ours[1]}"] = {
                **summary([a / b for a, b in pairs]),
                "goal": goal,
            }
    for name, row in {**rows, **ratios}.items():
        goal = f"  to reach: {row['goal']}" if row.get("goal") else ""
        print(f"{name:52} {row['min']:>9} {row['median']:>9} {row['max']:>9}{goal}")
    for name in memory:
        print(f"{name:30} peak memory {memory[name]:>6} MiB, ready after {ready[name]:>5} s")
    everything = {"rounds": rounds, **rows, **ratios, "peak_mib": memory, "ready_s": ready}
    print(json.dumps(everything))


if __name__ == "__main__":
    main()
