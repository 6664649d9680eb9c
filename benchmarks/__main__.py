"""Everything `make bench` measures, on a random checkpoint of Qwen1.5-0.5B's shape.

Engines alone, then over HTTP, beside their peers. Prints tables for people and, last, one
line of JSON.

    python -m benchmarks --rounds 5
"""

import argparse
import json
import platform
import subprocess

import torch

from benchmarks import compare, latency
from benchmarks.checkpoint import make_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    checkpoint = make_checkpoint()
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"commit {commit}, {machine}, {args.rounds} rounds\n", flush=True)
    engines = compare.run(checkpoint, compare.TOKEN_ENGINES, args.rounds)
    http = latency.run(str(checkpoint), args.rounds)
    figures = {"commit": commit, "machine": machine, "rounds": args.rounds}
    print(json.dumps({**figures, "engines": engines, "http": http}))


if __name__ == "__main__":
    main()
