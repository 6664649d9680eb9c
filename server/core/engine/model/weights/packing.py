"""How a checkpoint's matrices are packed into few bits, read from its configuration."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.core.engine.checkpoint import CheckpointError
from server.reasons import first_line

# AutoGPTQ's first versions wrote this file instead of a field of config.json.
_OLD_FILE = "quantize_config.json"
# By method: the field that names the format, the format if the field is absent, the offset of
# stored zeros by format, and the supported numbers of bits.
_METHODS: dict[str, tuple[str, str, dict[str, int], tuple[int, ...]]] = {
    "gptq": ("checkpoint_format", "gptq", {"gptq": 1, "gptq_v2": 0}, (4, 8)),
    "awq": ("version", "gemm", {"gemm": 0}, (4,)),
}


@dataclass(frozen=True)
class Packing:
    """Integers, with a scale and a zero for each group of columns of each row.

    method: "gptq" or "awq". bits: of an integer. group_size: columns, -1 for all of a row.
    zero_offset: to add to stored zeros.
    """

    method: str
    bits: int
    group_size: int
    zero_offset: int


def read_packing(folder: Path) -> Packing | None:
    """Reads how the weights are packed; None if they are not.

    Raises:
        CheckpointError: this server does not support the packing.
    """
    config = _read(folder, "config.json").get("quantization_config")
    if config is None and (folder / _OLD_FILE).is_file():
        config = {"quant_method": "gptq", **_read(folder, _OLD_FILE)}
    if config is None:
        return None
    method = config.get("quant_method", "an unnamed method")
    if method not in _METHODS:
        raise _unsupported(folder, method)
    field, default, zero_offsets, known_bits = _METHODS[method]
    form, bits, group_size = (
        str(config.get(field, default)).lower(), config.get("bits"), config.get("group_size"),
    )  # fmt: skip
    if form not in zero_offsets or bits not in known_bits:
        raise _unsupported(folder, f"{method} of format {form}, {bits} bits")
    if not isinstance(group_size, int) or group_size < -1 or group_size == 0:
        raise CheckpointError(f"{folder}: a group_size of {group_size!r} is not possible")
    return Packing(method, bits, group_size, zero_offsets[form])


def _unsupported(folder: Path, packing: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} is quantized already ({packing}); this server reads GPTQ in 4 or 8 bits and AWQ "
        "(gemm) in 4 bits; use the original checkpoint, and --dtype"
    )


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / name).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: {name} is not readable: {first_line(error)}") from error
