"""Compares our engine with its peers on one checkpoint: speed, perplexity, memory, loading time.

The checkpoint is the folder in QWEN_REAL, or random weights of Qwen1.5-0.5B's shape, whose
perplexity is not measured. Each engine runs in its own process; they are measured in turns, round
by round. Ratios are taken within a round, because absolute numbers of a shared machine are noisy.
Prints tables and, last, one line of JSON.

    QWEN_REAL=DIR python -m benchmarks.compare --engines ours-int8 openvino-int8 --rounds 5
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.checkpoint import make_checkpoint, real_checkpoint
from benchmarks.engines import TOKEN_ENGINES
from benchmarks.exports import exported
from benchmarks.figures import Figures, Goal, print_medians, report_goals, summary
from benchmarks.perplexity import TEXTS
from benchmarks.worker import Worker

# Name -> request, tokens of one answer; tokens per second are reported. Cases with several streams
# come last: llama.cpp allocates memory for them.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "decode 1 stream": ({"case": "decode", "num_streams": 1, "num_cached": 100}, 1),
    "decode 1 stream at 2000": ({"case": "decode", "num_streams": 1, "num_cached": 2000}, 1),
    "decode 1 stream at 4000": ({"case": "decode", "num_streams": 1, "num_cached": 4000}, 1),
    "prefill 128": ({"case": "prefill", "num_tokens": 128}, 128),
    "prefill 512": ({"case": "prefill", "num_tokens": 512}, 512),
    "prefill 4000": ({"case": "prefill", "num_tokens": 4000}, 4000),
    "decode 8 streams": ({"case": "decode", "num_streams": 8, "num_cached": 100}, 8),
    "decode 8 streams, Qwen's sampling": (
        {"case": "decode", "num_streams": 8, "num_cached": 100, "sampling": True}, 8,
    ),
}  # fmt: skip
SINGLE_STREAM = CASES["decode 1 stream"][0]
PERPLEXITY, PEAK, READY = "perplexity", "peak MiB, 1 stream", "ready after s"

Q8_0 = ("llama.cpp-q8_0", "llama.cpp-q8_0-noflash")
Q4_0 = ("llama.cpp-q4_0", "llama.cpp-q4_0-noflash")


def goal(engine: str, case: str, peers: Sequence[str], reach: str) -> Goal:
    """A goal against the best of the peers in the same case."""
    return Goal((engine, case), [(peer, case) for peer in peers], reach)


GOALS = [
    goal("ours-int8", "prefill 512", ["openvino-int8"], "at least 0.95"),
    goal("ours-int8", "prefill 4000", ["openvino-int8"], "at least 0.9"),
    goal("ours-int8", "decode 1 stream at 4000", ["openvino-int8"], "at least 1.0"),
    goal("ours-int8", "decode 8 streams, Qwen's sampling", ["openvino-int8"], "at least 1.05"),
    goal("ours-int8", "decode 1 stream", [*Q8_0, "openvino-int8"], "at least 1.2"),
    goal("ours-int4", "decode 1 stream", [*Q4_0, "openvino-int4"], "at least 1.0"),
    goal("ours-int8", PERPLEXITY, ["ours-float32"], "at most 1.004"),
    goal("ours-int4", PERPLEXITY, ["llama.cpp-q4_0"], "at most 1.0"),
]
# Goals for Qwen1.5-0.5B's shape, so only for the random weights.
GOALS_OF_SHAPE = [
    Goal(
        ("ours-int8", "decode 1 stream at 2000"),
        [("ours-int8", "decode 1 stream")],
        "at least 0.75",
    ),
    Goal(("ours-int8", PEAK), reach="at most 1024"),
]


def is_measured(engine: str, request: dict[str, Any]) -> bool:
    """Whether the engine runs the case: transformers' generate only runs one short stream."""
    if not engine.startswith("transformers"):
        return True
    return bool(request.get("num_streams", 1) == 1 and request.get("num_cached", 0) <= 100)


def measure(workers: dict[str, Worker], cases: Collection[str], rounds: int) -> Figures:
    """Tokens per second of every engine and case, once per round, after a warm-up round."""
    figures: Figures = defaultdict(list)
    for number in range(rounds + 1):
        for case in cases:
            request, num_tokens = CASES[case]
            for name, worker in workers.items():
                if is_measured(name, request):
                    tokens_per_s = num_tokens / worker.ask(request)["seconds"]
                    if number:
                        figures[name, case].append(tokens_per_s)
    return figures


def prose(checkpoint: Path) -> dict[str, Any]:
    """The request for the perplexity of this project's prose, with the same token ids for all."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    texts = [tokenizer.encode(path.read_text(encoding="utf-8")).ids for path in TEXTS]
    return {"case": "perplexity", "texts": texts, "vocab_size": tokenizer.get_vocab_size()}


def run(engines: Sequence[str], rounds: int, cases: Collection[str] = tuple(CASES)
        ) -> dict[str, Any]:  # fmt: skip
    """Measures, prints the tables, and returns all figures."""
    real = real_checkpoint()
    checkpoint = real or make_checkpoint()
    models = {name: exported(name, checkpoint) for name in engines}
    workers: dict[str, Worker] = {}
    try:
        for name in engines:
            workers[name] = Worker(name, models[name])
            workers[name].ask(SINGLE_STREAM)
        peaks = {n: worker.ask({"case": "memory"})["peak_mib"] for n, worker in workers.items()}
        figures = measure(workers, cases, rounds)
        for name, worker in workers.items():
            figures[name, PEAK], figures[name, READY] = [peaks[name]], [worker.ready_s]
            if real:
                figures[name, PERPLEXITY] = [worker.ask(prose(real))["perplexity"]]
    finally:
        for worker in workers.values():
            worker.close()
    print_medians("engines alone, medians; speeds in tokens per second", figures)
    rows = {f"{name}: {case}": summary(values) for (name, case), values in figures.items()}
    return {**rows, **report_goals(figures, GOALS if real else [*GOALS, *GOALS_OF_SHAPE])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", choices=TOKEN_ENGINES, default=TOKEN_ENGINES)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(json.dumps(run(args.engines, args.rounds, args.cases)))


if __name__ == "__main__":
    main()
