"""Exports the weights of a training run for the server.

    python -m training.export --weights training/runs/mini/weights --out server/models/qwen-mini

The weights stay rows of 8-bit integers with a scale each, in one file. Other programs do not read
this format; for them give `--dtype`, and copy the tokenizer's files beside the weights.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from training.weights import INDEX, quantized, read_weights

SINGLE = "model.safetensors"


def export(weights: Path, out: Path, temperature: float, top_p: float, *, dtype: str) -> None:
    """Writes config.json, generation_config.json and model.safetensors to `out`.

    dtype: "int8", or a type of torch.
    """
    config = json.loads((weights / "config.json").read_text())
    state = read_weights(weights)
    if dtype == "int8":
        stored = quantized(state)
    else:
        stored = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(stored, out / SINGLE, metadata={"format": "pt"})
    (out / INDEX).unlink(missing_ok=True)
    generation = {
        "bos_token_id": config["bos_token_id"], "do_sample": True,
        "eos_token_id": [config["eos_token_id"], config["pad_token_id"]],
        # No repetition penalty: a model this small has to repeat its few function words.
        "pad_token_id": config["pad_token_id"], "temperature": temperature, "top_p": top_p,
    }  # fmt: skip
    for name, values in (("config.json", config), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="folder of weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--temperature", type=float, default=0.3)
    parser.add_argument("--top-p", type=float, default=0.8)
    parser.add_argument("--dtype", choices=("int8", "bfloat16", "float32"), default="int8")
    args = parser.parse_args()
    export(args.weights, args.out, args.temperature, args.top_p, dtype=args.dtype)
