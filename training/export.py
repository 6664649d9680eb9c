"""Puts the weights of a training run where the server finds them.

    python -m training.export --weights training/runs/mini/weights --out server/models/qwen-mini

The weights stay rows of 8-bit integers with a scale each, in one file; with `--bfloat16` they
become numbers of that type.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from training.weights import INDEX, quantized, read_weights

SINGLE = "model.safetensors"


def export(
    weights: Path, out: Path, temperature: float, top_p: float, *, in_bfloat16: bool
) -> None:
    """Writes config.json, generation_config.json and model.safetensors to `out`."""
    config = json.loads((weights / "config.json").read_text())
    state = read_weights(weights)
    if in_bfloat16:
        stored = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    else:
        stored = quantized(state)
    out.mkdir(parents=True, exist_ok=True)
    save_file(stored, out / SINGLE, metadata={"format": "pt"})
    (out / INDEX).unlink(missing_ok=True)
    generation = {
        "bos_token_id": config["bos_token_id"], "do_sample": True,
        "eos_token_id": [config["eos_token_id"], config["pad_token_id"]],
        # No repetition penalty: a model this small needs its few function words again and again.
        "pad_token_id": config["pad_token_id"], "temperature": temperature, "top_p": top_p,
    }  # fmt: skip
    for name, values in (("config.json", config), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="folder of files of weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--temperature", type=float, default=0.3)
    parser.add_argument("--top-p", type=float, default=0.8)
    parser.add_argument("--bfloat16", action="store_true")
    args = parser.parse_args()
    export(args.weights, args.out, args.temperature, args.top_p, in_bfloat16=args.bfloat16)
