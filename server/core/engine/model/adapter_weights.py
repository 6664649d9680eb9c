"""The tensors of an adapter, as peft saves them, checked against the model's shape."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from server.core.engine.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    AdapterConfig,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    module_path,
    read_adapter_config,
)
from server.core.engine.checkpoint import CheckpointError
from server.core.engine.model.config import ModelConfig
from server.reasons import first_line

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LoraWeights:
    """matrices: A, (R, C_in), and the scaled B, (C_out, R), by layer and module."""

    matrices: Mapping[tuple[int, str], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SoftPrompt:
    """Virtual tokens. embeddings: (T, C)."""

    embeddings: Tensor


@dataclass(frozen=True)
class SoftPrefix:
    """Keys and values of T virtual tokens, in the checkpoint's order of dimensions.

    keys: (layers, H_kv, T, D). values: (layers, H_kv, D, T).
    """

    keys: Tensor
    values: Tensor


AdapterWeights = LoraWeights | SoftPrompt | SoftPrefix


class LoadedAdapter(NamedTuple):
    """An adapter and its weights."""

    adapter: Adapter
    weights: AdapterWeights


def read_adapter(name: str, folder: Path, config: ModelConfig) -> LoadedAdapter:
    """Reads the adapter in the folder; config: of the base model.

    Raises:
        CheckpointError: it cannot be read, or does not fit the base model.
    """
    adapter_config = read_adapter_config(folder)
    tensors = _Tensors(folder, adapter_config)
    weights: AdapterWeights
    num_virtual_tokens = 0
    if isinstance(adapter_config, LoraConfig):
        weights = _read_lora(tensors, adapter_config, config)
    else:
        assert isinstance(adapter_config, PromptConfig)
        num_virtual_tokens = adapter_config.num_virtual_tokens
        is_prefix = isinstance(adapter_config, PrefixConfig)
        read = _read_prefix if is_prefix else _read_prompt
        weights = read(tensors, num_virtual_tokens, config)
    tensors.check_all_taken()
    return LoadedAdapter(Adapter(name, num_virtual_tokens, _digest(folder)), weights)


class _Tensors:
    """The tensors of an adapter, which are taken one by one."""

    def __init__(self, folder: Path, config: AdapterConfig) -> None:
        self.folder, self._base = folder, config.base_model_name_or_path
        try:
            self._tensors = load_file(folder / WEIGHTS_FILE)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder}: the adapter's weights are damaged or incomplete "
                f"({first_line(error)}); copy or download them again"
            ) from error

    def take(self, name: str, *shape: int) -> Tensor:
        """Removes and returns a tensor in float32.

        Raises:
            CheckpointError: it is missing, has another shape, or is not of finite floats.
        """
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            raise self.misfit(f"it lacks {name!r}")
        if list(tensor.shape) != list(shape):
            raise self.misfit(f"{name!r} has shape {list(tensor.shape)}, not {list(shape)}")
        if tensor.dtype not in _DTYPES or not tensor.isfinite().all():
            raise CheckpointError(f"{self.folder}: {name!r} does not consist of finite floats")
        return tensor.float()

    def check_all_taken(self) -> None:
        if self._tensors:
            raise self.misfit(f"{min(self._tensors)!r} has no place in it")

    def misfit(self, reason: str) -> CheckpointError:
        made_for = f" made for {self._base!r}" if self._base else ""
        return CheckpointError(
            f"{self.folder}: the adapter{made_for} does not fit this model: {reason}"
        )


def _read_lora(tensors: _Tensors, lora: LoraConfig, c: ModelConfig) -> LoraWeights:
    if (target := lora.unknown_target(c.num_layers)) is not None:
        raise tensors.misfit(f"target module {target!r} is not supported")
    shapes = _shapes(c)
    matrices = {}
    for layer, name in lora.modules(c.num_layers):
        module = module_path(layer, name)
        if layer >= c.num_layers:
            raise tensors.misfit(f"there is no {module!r}")
        (num_rows, num_columns), rank = shapes[name], lora.rank(module)
        prefix = f"base_model.model.{module}.lora_"
        a = tensors.take(f"{prefix}A.weight", rank, num_columns)
        b = tensors.take(f"{prefix}B.weight", num_rows, rank)
        matrices[layer, name] = a, b * lora.scale(module)
    return LoraWeights(matrices)


def _read_prompt(tensors: _Tensors, num_tokens: int, c: ModelConfig) -> SoftPrompt:
    return SoftPrompt(tensors.take("prompt_embeddings", num_tokens, c.hidden_size))


def _read_prefix(tensors: _Tensors, num_tokens: int, c: ModelConfig) -> SoftPrefix:
    """A row is a token: of each layer first the keys, then the values, head by head."""
    shape = c.num_layers, 2, c.num_kv_heads, c.head_dim
    size = c.num_layers * 2 * c.num_kv_heads * c.head_dim
    by_token = tensors.take("prompt_embeddings", num_tokens, size).view(-1, *shape)
    keys, values = by_token.permute(2, 1, 3, 0, 4)
    return SoftPrefix(keys, values.transpose(-1, -2))


def _shapes(c: ModelConfig) -> dict[str, tuple[int, int]]:
    """(C_out, C_in) of the modules of a layer."""
    size, inner = c.hidden_size, c.intermediate_size
    query_rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return {
        "q_proj": (query_rows, size),
        "k_proj": (kv_rows, size),
        "v_proj": (kv_rows, size),
        "o_proj": (size, query_rows),
        "gate_proj": (inner, size),
        "up_proj": (inner, size),
        "down_proj": (size, inner),
    }


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
