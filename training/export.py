"""Writes a training run's averaged weights as a checkpoint in bfloat16.

    python -m training.export --run training/runs/mini --out server/models/qwen-mini

With `--mix-with FOLDER` every weight is the mean of the run's and that checkpoint's: two runs from
the same start are often better together than either (model soups, arXiv 2203.05482).
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, Qwen2ForCausalLM

from server.core.text.tokenizer import ChatTokenizer
from training.train import new_model

MAX_SHARD = "40MB"


def export(run: Path, tokenizer_folder: Path, out: Path, mix_with: Path | None = None) -> None:
    """Writes config.json, generation_config.json and model.safetensors to `out`."""
    tokenizer = ChatTokenizer(AutoTokenizer.from_pretrained(tokenizer_folder))
    end_id, pad_id = tokenizer.marker_id("<|im_end|>"), tokenizer.marker_id("<|endoftext|>")
    model = new_model(tokenizer.vocab_size, end_id)
    state = torch.load(run / "checkpoint.pt", map_location="cpu")
    prefix = "module."
    weights = {
        k.removeprefix(prefix): v for k, v in state["average"].items() if k.startswith(prefix)
    }
    if mix_with is not None:
        others = Qwen2ForCausalLM.from_pretrained(mix_with, dtype=torch.float32).state_dict()
        weights = {name: (weight + others[name]) / 2 for name, weight in weights.items()}
    model.load_state_dict(weights)
    model.generation_config = GenerationConfig(
        do_sample=True,
        # No repetition penalty: a model this small needs its few function words again and again.
        temperature=0.3,
        top_p=0.8,
        bos_token_id=pad_id,
        eos_token_id=[end_id, pad_id],
        pad_token_id=pad_id,
    )
    model.to(torch.bfloat16).save_pretrained(out, max_shard_size=MAX_SHARD)
    config = json.loads((out / "config.json").read_text())
    config.pop("_attn_implementation", None)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=Path("server/models/qwen-mini"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mix-with", type=Path, help="checkpoint folder to take the mean with")
    args = parser.parse_args()
    export(args.run, args.tokenizer, args.out, args.mix_with)
