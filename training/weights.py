"""Writes weights as rows of 8-bit integers with a scale each.

The server's int8 quantization gives the same integers (server/core/engine/model/linear.py), so int8
loses nothing. The weights can be split into files below a size limit.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SCALES = ".scales"
INDEX = "model.safetensors.index.json"


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(R, C) -> integers (R, C), scales (R,). The largest value of each row becomes 127."""
    wide = weight.float()
    scales = wide.abs().amax(1).clamp_min(1e-12) / 127
    return (wide / scales[:, None]).round().to(torch.int8), scales


def dequantize(integers: Tensor, scales: Tensor) -> Tensor:
    return integers.float() * scales[:, None]


def quantized(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrices as integers and scales, the vectors in float32."""
    result = {}
    for name, weight in state.items():
        if weight.ndim == 2:
            result[name], result[name + SCALES] = quantize(weight.detach().cpu())
        else:
            result[name] = weight.detach().float().cpu()
    return {name: tensor.contiguous() for name, tensor in result.items()}


def write_parts(state: Mapping[str, Tensor], folder: Path, max_bytes: int) -> None:
    """Writes tensors to files of at most `max_bytes`, and an index, with transformers' names."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if size + tensor.nbytes > max_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05}-of-{len(parts):05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())},
             "weight_map": weight_map}  # fmt: skip
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder in float32, whether quantized or not."""
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        stored |= load_file(path)
    return {
        name: dequantize(tensor, stored[name + SCALES])
        if tensor.dtype == torch.int8
        else tensor.float()
        for name, tensor in stored.items()
        if not name.endswith(SCALES)
    }
