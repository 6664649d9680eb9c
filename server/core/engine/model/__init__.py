"""The only package that imports torch: weights, forward, KV cache, sampling."""

from collections.abc import Iterable

import torch

from server.core.engine.checkpoint import CheckpointError
from server.core.engine.gguf_file import Source
from server.core.engine.model.adapter_weights import LoadedAdapter, read_adapter
from server.core.engine.model.backend import kv_bytes_per_token
from server.core.engine.model.config import ModelConfig, read_model_config
from server.core.engine.model.linear import INT4_GROUP_SIZE, Int8Linear
from server.core.engine.model.qwen import load_qwen
from server.core.engine.model.runner import ModelRunner
from server.core.engine.model.weights import weights_digest

__all__ = [
    "LoadedAdapter",
    "ModelConfig",
    "choose_dtype",
    "kv_bytes_per_token",
    "load_runner",
    "read_adapter",
    "read_model_config",
    "weights_digest",
]

# Below this many parameters the float32 weights fit the CPU's caches, and fewer bits gain little.
_SMALL_MODEL = 100_000_000


def load_runner(
    source: Source,
    config: ModelConfig,
    *,
    dtype: str,
    vocab_size: int,
    num_threads: int | None,
    max_kv_tokens: int,
    max_context: int,
    max_prefix_bytes: int,
    max_draft_tokens: int,
    adapters: Iterable[LoadedAdapter] = (),
) -> ModelRunner:
    """Loads the checkpoint, ready to run.

    dtype: a result of `choose_dtype`.
    num_threads: CPU threads of the model, None for PyTorch's choice (the physical cores).
    Other arguments: see `ModelRunner`.

    Raises:
        CheckpointError: the weights do not fit the configuration, or cannot be read; or the
            processor or the model does not support `dtype`.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if dtype == "int8" and not Int8Linear.is_supported():
        raise CheckpointError("int8 needs an x86 processor; use --dtype bfloat16 or float32 here")
    if dtype == "int4" and (config.hidden_size | config.intermediate_size) % INT4_GROUP_SIZE:
        raise CheckpointError(
            f"{source}: int4 needs matrices of a multiple of {INT4_GROUP_SIZE} columns; "
            "use --dtype int8"
        )
    return ModelRunner(
        load_qwen(source, config, dtype),
        vocab_size=vocab_size,
        max_kv_tokens=max_kv_tokens,
        max_context=max_context,
        max_prefix_bytes=max_prefix_bytes,
        max_draft_tokens=max_draft_tokens,
        adapters=adapters,
    )


def choose_dtype(dtype: str, config: ModelConfig) -> str:
    """The type of the weights: "float32", "bfloat16", "int8" or "int4"; resolves "auto"."""
    if dtype != "auto":
        return dtype
    if config.num_parameters < _SMALL_MODEL:
        return "float32"
    if Int8Linear.is_supported():
        return "int8"
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
