"""Chooses the code that computes a model: kernels for this processor, or PyTorch."""

import importlib
import importlib.util
from typing import NamedTuple

import torch

from server.core.engine.model.attention.step import TORCH_ATTENTION, AttentionKind
from server.core.engine.model.config import ModelConfig
from server.core.engine.model.linear import QUANTIZED_DTYPES, linear_factory
from server.core.engine.model.operations import Operations, TorchOperations

# Columns of a tile. Kernels need a model whose sizes are multiples of it.
_TILE = 64
_KERNELS = "server.core.engine.model.kernels"


class Backend(NamedTuple):
    """The code that computes a model's layers and its attention.

    is_row_exact: whether a token's hidden state is bit-identical if it is the only new token of its
    sequence and if it is one of several.
    """

    operations: Operations
    attention: AttentionKind
    is_row_exact: bool = False


def choose_backend(config: ModelConfig, dtype: str) -> Backend:
    """Kernels, if this processor and the model's sizes allow them; else PyTorch."""
    attention = _attention_of(config, dtype)
    if dtype in QUANTIZED_DTYPES and _has_kernels_for(config):
        # Imported only here: importing compiles the kernels.
        matrix = importlib.import_module(f"{_KERNELS}.matrix")
        if matrix.is_layout_known():
            module = importlib.import_module(f"{_KERNELS}.operations")
            operations: Operations = module.KernelOperations(config, dtype)
            return Backend(operations, attention, attention is not TORCH_ATTENTION)
    return Backend(TorchOperations(config, linear_factory(dtype)), attention)


def _attention_of(config: ModelConfig, dtype: str) -> AttentionKind:
    """Kernels with keys and values in bfloat16, or PyTorch with float32."""
    if not _is_attention_in_kernels(config, dtype):
        return TORCH_ATTENTION
    kind: AttentionKind = importlib.import_module(f"{_KERNELS}.attention").KERNEL_ATTENTION
    return kind


def kv_bytes_per_token(config: ModelConfig, dtype: str) -> int:
    """Memory of one token's keys and values in all layers."""
    num_bytes = 2 if _is_attention_in_kernels(config, dtype) else 4
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * num_bytes


def _has_kernels_for(config: ModelConfig) -> bool:
    sizes = config.hidden_size | config.intermediate_size | config.num_heads * config.head_dim
    return _has_numba() and torch.cpu._is_vnni_supported() and not sizes % _TILE


def _is_attention_in_kernels(config: ModelConfig, dtype: str) -> bool:
    is_supported = torch.cpu._is_avx512_bf16_supported() and not config.head_dim % _TILE
    return dtype != "float32" and _has_numba() and is_supported


def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None
