"""The measured checkpoint: a real one, or random weights of Qwen1.5-0.5B's exact shape.

Speed hardly depends on the weights' values; perplexity does. This writes the random one:

    python -m benchmarks.checkpoint --out benchmarks/cache/qwen-random
"""

import argparse
import os
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from server.core.engine.checkpoint import BUNDLED_FOLDER

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
DEFAULT_FOLDER = Path("benchmarks/cache/qwen-random")


def qwen_shape() -> Qwen2Config:
    """The configuration of Qwen/Qwen1.5-0.5B-Chat."""
    return Qwen2Config(
        vocab_size=151_936, hidden_size=1024, intermediate_size=2816, num_hidden_layers=24,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=32_768,
        rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        bos_token_id=151_643, eos_token_id=151_645, dtype="bfloat16",
    )  # fmt: skip


def real_checkpoint() -> Path | None:
    """The folder in QWEN_REAL, or None."""
    folder = os.environ.get("QWEN_REAL")
    return Path(folder) if folder else None


def make_checkpoint(folder: Path = DEFAULT_FOLDER, tokenizer: Path = BUNDLED_FOLDER) -> Path:
    """Writes the random checkpoint, 930 MB, unless it exists.

    tokenizer: a folder with tokenizer files. The bundled model's has fewer ids than Qwen's.
    """
    if (folder / "model.safetensors").exists():
        return folder
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(qwen_shape()).bfloat16()
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=[151_645, 151_643])
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument(
        "--tokenizer", type=Path, default=BUNDLED_FOLDER,
        help="folder with tokenizer files; default: the bundled model's",
    )  # fmt: skip
    args = parser.parse_args()
    print(make_checkpoint(args.out, args.tokenizer))
