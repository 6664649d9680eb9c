"""Kernels or PyTorch: which of them computes a model, and that both compute the same."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from server.core.engine.model import backend
from server.core.engine.model.attention.segment import Segment
from server.core.engine.model.attention.step import TORCH_ATTENTION
from server.core.engine.model.backend import Backend, choose_backend, kv_bytes_per_token
from server.core.engine.model.config import ModelConfig, read_model_config
from server.core.engine.model.kv_cache import KVCache
from server.core.engine.model.linear import linear_factory
from server.core.engine.model.operations import TorchOperations
from server.core.engine.model.qwen import QwenModel, load_qwen
from server.core.engine.model.weights import open_weights

HAS_KERNELS = torch.cpu._is_vnni_supported() and torch.cpu._is_avx512_bf16_supported()
needs_kernels = pytest.mark.skipif(
    not HAS_KERNELS, reason="the processor lacks AVX512-VNNI or BF16"
)

SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture(scope="module", params=["qwen2-64", "qwen3-128-bias"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of a shape that the kernels can compute."""
    torch.manual_seed(1)
    model: torch.nn.Module
    if request.param == "qwen2-64":
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE | {"hidden_size": 256}))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=128, attention_bias=True))
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, mean=0.7, std=0.3)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest.fixture
def config(folder: Path) -> ModelConfig:
    return read_model_config(folder)


def is_of_torch(chosen: Backend) -> bool:
    return isinstance(chosen.operations, TorchOperations) and chosen.attention is TORCH_ATTENTION


@needs_kernels
def test_kernels_compute_quantized_weights_and_pytorch_other_ones(config: ModelConfig) -> None:
    for dtype in ("int8", "int4"):
        assert not isinstance(choose_backend(config, dtype).operations, TorchOperations)
    assert is_of_torch(choose_backend(config, "float32"))
    chosen = choose_backend(config, "bfloat16")
    assert isinstance(chosen.operations, TorchOperations)
    assert chosen.attention.layout.dtype == torch.bfloat16
    assert kv_bytes_per_token(config, "int8") * 2 == kv_bytes_per_token(config, "float32")


@pytest.mark.parametrize("lacking", ["numba", "vnni", "sizes"])
def test_pytorch_computes_if_the_kernels_cannot(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    if lacking == "numba":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    elif lacking == "vnni":
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    else:
        monkeypatch.setattr(backend, "_TILE", 1000)
    assert is_of_torch(choose_backend(config, "int8"))
    assert kv_bytes_per_token(config, "int8") == kv_bytes_per_token(config, "float32")


@needs_kernels
@pytest.mark.parametrize("has_bfloat16", [True, False])
@pytest.mark.parametrize(("dtype", "error"), [("int8", 0.05), ("int4", 0.4)])
def test_kernels_and_pytorch_compute_the_same(
    folder: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch, dtype: str, error: float,
    has_bfloat16: bool,
) -> None:  # fmt: skip
    # Without bfloat16 the attention is PyTorch's, in float32.
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    ids = torch.randint(0, 300, (150,), generator=torch.Generator().manual_seed(0)).tolist()

    def logits(model: QwenModel) -> torch.Tensor:
        """Of a prompt, and of a sampled token after it."""
        memory, cache, rows = model.new_memory(256, 256), KVCache(), []
        assert memory.reserve(cache, len(ids))
        with torch.inference_mode():
            for part, is_decode in ((range(149), False), (range(149, 150), True)):
                segment = Segment([ids[i] for i in part], part, cache, is_decode)
                [[hidden]] = model.forward([segment])
                rows.append(model.logits(hidden))
        return torch.cat(rows)

    ours = logits(load_qwen(folder, config, dtype))
    in_torch = Backend(TorchOperations(config, linear_factory(dtype)), TORCH_ATTENTION)
    theirs = logits(QwenModel(config, open_weights(folder), in_torch, ids[:64]))
    exact = logits(load_qwen(folder, config, "float32"))
    for quantized in (ours, theirs):
        assert (quantized - exact).abs().mean() < error * exact.std()


@needs_kernels
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_in_kernels_sampled_and_prompt_tokens_have_the_same_states_to_the_last_bit(
    folder: Path, config: ModelConfig, dtype: str
) -> None:
    # So a conversation continues the same whether its prefix is cached or computed again.
    model = load_qwen(folder, config, dtype)
    ids = torch.randint(0, 300, (230,), generator=torch.Generator().manual_seed(0)).tolist()
    memory, states = model.new_memory(1024, 256), list[torch.Tensor]()
    for sizes in ([230], [100, *[1] * 60, 70]):
        cache, parts = KVCache(), list[torch.Tensor]()
        assert memory.reserve(cache, len(ids))
        for size in sizes:
            part = range(cache.length, cache.length + size)
            segment = Segment([ids[i] for i in part], part, cache, is_decode=size == 1)
            with torch.inference_mode():
                [[hidden]] = model.forward([segment])
            parts.append(hidden)
        states.append(torch.cat(parts))
    assert torch.equal(*states)
