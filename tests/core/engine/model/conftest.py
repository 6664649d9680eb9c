"""Tiny random checkpoints of every supported architecture."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from server.core.engine.checkpoint import BUNDLED_FOLDER
from training.weights import read_weights

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
ARCHITECTURES: dict[str, tuple[type[Qwen2Config | Qwen3Config], dict[str, Any]] | None] = {
    "qwen2-tied-mha": (Qwen2Config, {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen2-untied-gqa": (Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "qwen3-tied-gqa": (
        Qwen3Config,
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "head_dim": 16},
    ),
    "qwen3-untied-mha-bias": (
        Qwen3Config,
        {
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "head_dim": 16,
            "attention_bias": True,
        },
    ),
    "bundled": None,
}


@pytest.fixture(scope="package", autouse=True)
def two_threads() -> Iterator[None]:
    """What is computed in parallel is tested so, whatever ran before in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=ARCHITECTURES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of each architecture."""
    shape = ARCHITECTURES[request.param]
    folder: Path = tmp_path_factory.mktemp("model") / request.param
    if shape is None:
        # transformers does not know its 8-bit rows.
        shutil.copytree(BUNDLED_FOLDER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        weights = read_weights(BUNDLED_FOLDER)
        stored = {name: weight.bfloat16() for name, weight in weights.items()}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    torch.manual_seed(1)
    config = shape[0](**SHAPE, **shape[1])
    model: PreTrainedModel
    if isinstance(config, Qwen2Config):
        model = Qwen2ForCausalLM(config)
    else:
        model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        # transformers starts norms at 1 and biases at 0, which would hide their absence.
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, mean=0.7, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def oracle(checkpoint: Path) -> PreTrainedModel:
    """The same checkpoint in transformers, in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.eval()
    return model
