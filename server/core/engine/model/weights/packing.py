"""How a checkpoint's matrices are packed into few bits, as its configuration says."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.core.engine.checkpoint import CheckpointError
from server.reasons import first_line

# Where AutoGPTQ's first versions wrote what stands in config.json today.
_OLD_FILE = "quantize_config.json"
# Of each method: the field that names the format, what it is if the field is absent, the formats
# with what is to be added to a stored zero, and numbers of bits.
_METHODS: dict[str, tuple[str, str, dict[str, int], tuple[int, ...]]] = {
    "gptq": ("checkpoint_format", "gptq", {"gptq": 1, "gptq_v2": 0}, (4, 8)),
    "awq": ("version", "gemm", {"gemm": 0}, (4,)),
}


@dataclass(frozen=True)
class Packing:
    """Integers, with a scale and a zero for each group of columns of each row.

    method: "gptq" or "awq". bits: of an integer. group_size: columns, -1 for all of a row.
    zero_offset: to be added to the zeros as they are stored.
    """

    method: str
    bits: int
    group_size: int
    zero_offset: int


def read_packing(folder: Path) -> Packing | None:
    """What config.json says of it; None if the weights are not packed.

    Raises:
        CheckpointError: they are packed in a way that this server does not read.
    """
    said = _read(folder, "config.json").get("quantization_config")
    if said is None and (folder / _OLD_FILE).is_file():
        said = {"quant_method": "gptq", **_read(folder, _OLD_FILE)}
    if said is None:
        return None
    method = said.get("quant_method", "an unnamed method")
    if method not in _METHODS:
        raise _refused(folder, method)
    field, usual, zero_offsets, known_bits = _METHODS[method]
    form, bits, group_size = (
        str(said.get(field, usual)).lower(), said.get("bits"), said.get("group_size"),
    )  # fmt: skip
    if form not in zero_offsets or bits not in known_bits:
        raise _refused(folder, f"{method} of format {form}, {bits} bits")
    if not isinstance(group_size, int) or group_size < -1 or group_size == 0:
        raise CheckpointError(f"{folder}: a group_size of {group_size!r} is not possible")
    return Packing(method, bits, group_size, zero_offsets[form])


def _refused(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} is quantized already ({what}), and not by GPTQ in 4 or 8 bits or AWQ (gemm) in "
        "4, which this server reads; take the checkpoint it was made from and --dtype"
    )


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / name).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: {name} is not readable: {first_line(error)}") from error
