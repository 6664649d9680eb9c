"""The only package that imports torch: weights, forward, KV cache, sampling."""

from pathlib import Path

import torch

from server.core.model.config import ModelConfig, read_model_config
from server.core.model.qwen import load_qwen
from server.core.model.runner import ModelRunner

__all__ = ["ModelConfig", "load_runner", "read_model_config"]

# Below this size the float32 weights fit the CPU's caches and bfloat16 gains nothing.
_SMALL_MODEL = 100_000_000


def load_runner(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: str,
    num_threads: int | None,
    max_prefix_bytes: int,
) -> ModelRunner:
    """Loads the checkpoint in `folder`, ready to run.

    dtype: "float32", "bfloat16", or "auto" for whichever is faster here.
    max_prefix_bytes: memory for prefixes of earlier prompts.
    num_threads: CPU threads of the model, None for PyTorch's choice (the physical cores).

    Raises:
        CheckpointError: the weights do not fit the configuration, or cannot be read.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if dtype == "auto":
        is_fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        dtype = "bfloat16" if is_fast and config.num_parameters > _SMALL_MODEL else "float32"
    return ModelRunner(load_qwen(folder, config, getattr(torch, dtype)), max_prefix_bytes)
