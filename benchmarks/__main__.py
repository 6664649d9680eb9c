"""All measurements of `make bench`.

Measures engines alone, then over HTTP, beside their peers, on the checkpoint in QWEN_REAL or on
random weights of Qwen1.5-0.5B's shape. Prints tables and, last, one line of JSON.

    QWEN_REAL=DIR python -m benchmarks --rounds 5
"""

import argparse
import json
import platform
import subprocess

import torch

from benchmarks import compare, latency
from benchmarks.checkpoint import make_checkpoint, real_checkpoint
from benchmarks.engines import TOKEN_ENGINES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    checkpoint = real_checkpoint() or make_checkpoint()
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"commit {commit}, {machine}, {checkpoint.name}, {args.rounds} rounds\n", flush=True)
    engines = compare.run(TOKEN_ENGINES, args.rounds)
    http = latency.run(str(checkpoint), args.rounds)
    about = {"commit": commit, "machine": machine, "model": checkpoint.name, "rounds": args.rounds}
    print(json.dumps({**about, "engines": engines, "http": http}))


if __name__ == "__main__":
    main()
