"""Weights of every type a GGUF may have, against the same weights in transformers."""

import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from server.core.engine.checkpoint import CheckpointError
from server.core.engine.gguf_file import read_gguf
from server.core.engine.model.attention.segment import Segment
from server.core.engine.model.config import read_model_config
from server.core.engine.model.kv_cache import KVCache
from server.core.engine.model.qwen import QwenModel, load_qwen
from server.core.engine.model.weights import open_weights, reader
from server.core.engine.model.weights.gguf_tensors import KINDS
from tests.gguf_files import write_gguf

# Rows of 256 columns, the least that the types with K in their names need.
SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
IDS = random.Random(0).choices(range(300), k=40)


def random_model(name: str) -> PreTrainedModel:
    torch.manual_seed(1)
    model: PreTrainedModel
    if name == "qwen2-tied":
        config = Qwen2Config(
            **SHAPE,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
        model = Qwen2ForCausalLM(config).eval()
    else:
        model = Qwen3ForCausalLM(
            Qwen3Config(
                **SHAPE,
                tie_word_embeddings=False,
                head_dim=128,
                attention_bias=name == "qwen3-untied-bias",
            )
        ).eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or "bias" in parameter_name:
            torch.nn.init.normal_(parameter, mean=0.7, std=0.3)
    return model


def write(tmp_path: Path, model: PreTrainedModel, kind: Kind) -> tuple[Path, dict[str, Tensor]]:
    """A GGUF of the model, and its weights by transformers' names."""
    model.save_pretrained(tmp_path / "folder")
    path = tmp_path / "model.gguf"
    return path, write_gguf(path, tmp_path / "folder", kind)


def load(path: Path, dtype: str = "float32") -> QwenModel:
    file = read_gguf(path)
    return load_qwen(file, read_model_config(file), dtype)


@torch.inference_mode()
def logits(model: QwenModel) -> Tensor:
    cache = KVCache()
    assert model.new_memory(max_tokens=128, max_context=128).reserve(cache, len(IDS))
    [[hidden]] = model.forward([Segment(IDS, range(len(IDS)), cache)])
    return model.logits(hidden)


@torch.inference_mode()
def expected(model: PreTrainedModel, weights: dict[str, Tensor]) -> Tensor:
    model.load_state_dict(weights, strict=False)
    theirs: Tensor = model(torch.tensor([IDS])).logits[0]
    return theirs


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3-untied", "qwen3-untied-bias"])
def test_logits_equal_those_of_transformers_with_the_same_weights(
    tmp_path: Path, name: str, kind: Kind
) -> None:
    model = random_model(name)
    path, weights = write(tmp_path, model, kind)
    theirs = expected(model, weights)
    difference = (logits(load(path)) - theirs).abs().max()
    assert difference < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q8_0, Kind.Q4_K], ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_any_type_is_quantized_again_and_embeddings_stay_as_in_the_file(
    tmp_path: Path, kind: Kind, dtype: str
) -> None:
    reference = random_model("qwen3-untied")
    path, weights = write(tmp_path, reference, kind)
    model, theirs = load(path, dtype), expected(reference, weights)
    assert torch.equal(model._embedded(IDS), weights["model.embed_tokens.weight"][IDS])
    error = (logits(model) - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
    assert error < {"bfloat16": 0.02, "int8": 0.05, "int4": 0.3}[dtype]


def test_a_read_dequantizes_one_block_of_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, weights = write(tmp_path, random_model("qwen2-tied"), Kind.Q8_0)
    sizes = []

    def dequantize(rows: NDArray[Any], kind: Kind) -> NDArray[Any]:
        sizes.append(len(rows))
        return gguf.dequantize(rows, kind)

    monkeypatch.setattr(reader, "BLOCK_ROWS", 70)
    monkeypatch.setattr(gguf.quants, "dequantize", dequantize)
    name = "model.embed_tokens.weight"
    read = open_weights(read_gguf(path)).read(name, (300, 256))
    assert torch.equal(read, weights[name])
    assert sizes == [70, 70, 70, 70, 20]


def test_a_tensor_of_another_shape_or_none_is_one_sentence(tmp_path: Path) -> None:
    path, _ = write(tmp_path, random_model("qwen2-tied"), Kind.F16)
    weights = open_weights(read_gguf(path))
    with pytest.raises(CheckpointError, match=r"'blk.1.ffn_up.weight' has shape \[512, 256\]"):
        weights.read("model.layers.1.mlp.up_proj.weight", (512, 128))
    with pytest.raises(CheckpointError, match=r"the weights lack 'output\.weight'"):
        weights.read("lm_head.weight", (300, 256))


def test_an_unsupported_type_is_named(tmp_path: Path) -> None:
    path, _ = write(tmp_path, random_model("qwen2-tied"), Kind.TQ1_0)
    with pytest.raises(CheckpointError, match="is of type TQ1_0; this server reads F32, F16"):
        load(path)
