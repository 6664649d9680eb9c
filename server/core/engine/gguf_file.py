"""The header of a GGUF file: its metadata, and the offsets of its tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the package `gguf`
makes an array of every string: for a Qwen's vocabulary that takes 7 s and 490 MB.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from server.core.engine.checkpoint import CheckpointError
from server.reasons import first_line

# Version 1 has other integer sizes; no Qwen was published in it.
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # of the tensors in bytes, unless the metadata name another
_CODES = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.FLOAT32: "f",
    GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}  # fmt: skip
# llama.cpp's default, for a file without a value.
_ROPE_THETA = 10_000.0
# Special tokens with these texts end a reply, as in llama.cpp. A GGUF names one stop token, but
# Qwen's chat models have both.
_END_MARKERS = ("<|im_end|>", "<|endoftext|>")
_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# GGUF's keys by their names in generation_config.json.
_SAMPLING = {
    "temperature": "temp", "top_p": "top_p", "top_k": "top_k",
    "repetition_penalty": "penalty_repeat",
}  # fmt: skip
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the file. shape: in PyTorch's order. offset: in bytes, from the file's start."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        block_size, block_bytes = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block_size * block_bytes


@dataclass(frozen=True)
class GGUF:
    """The header of a file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def architecture(self) -> str:
        """Such as "qwen2"."""
        return str(self["general.architecture"])

    def __str__(self) -> str:
        return str(self.path)

    def __getitem__(self, key: str) -> Any:
        """The value of `key` in the metadata.

        Raises:
            CheckpointError: the metadata lack it.
        """
        if key not in self.metadata:
            raise CheckpointError(f"{self.path}: the metadata lack {key!r}")
        return self.metadata[key]

    def config(self) -> dict[str, Any]:
        """The metadata as a Qwen's config.json.

        Raises:
            CheckpointError: the metadata lack a size of the model.
        """
        arch, get = self.architecture, self.metadata.get
        num_heads = self[f"{arch}.attention.head_count"]
        hidden_size = self[f"{arch}.embedding_length"]
        return {
            "model_type": arch,
            "vocab_size": self.stored("token_embd.weight").shape[0],
            "hidden_size": hidden_size,
            "intermediate_size": self[f"{arch}.feed_forward_length"],
            "num_hidden_layers": self[f"{arch}.block_count"],
            "num_attention_heads": num_heads,
            "num_key_value_heads": get(f"{arch}.attention.head_count_kv", num_heads),
            "head_dim": get(f"{arch}.attention.key_length", hidden_size // max(num_heads, 1)),
            "rms_norm_eps": self[f"{arch}.attention.layer_norm_rms_epsilon"],
            "rope_parameters": self._rope(),
            "max_position_embeddings": self[f"{arch}.context_length"],
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "attention_bias": "blk.0.attn_q.bias" in self.tensors,
        }

    def generation_config(self) -> dict[str, Any]:
        """The metadata as a generation_config.json."""
        texts = self.metadata.get("tokenizer.ggml.tokens", [])
        kinds = self.metadata.get("tokenizer.ggml.token_type", [])
        tokens = enumerate(zip(texts, kinds, strict=False))
        ends = {i for i, (text, kind) in tokens if kind == CONTROL and text in _END_MARKERS}
        named = (self.metadata.get(f"tokenizer.ggml.{name}") for name in _END_IDS)
        ends |= {token_id for token_id in named if token_id is not None}
        sampling = {
            name: self.metadata[f"general.sampling.{key}"]
            for name, key in _SAMPLING.items()
            if f"general.sampling.{key}" in self.metadata
        }
        return {"eos_token_id": list(ends) or None, "do_sample": bool(sampling), **sampling}

    def stored(self, name: str) -> StoredTensor:
        """The tensor `name`.

        Raises:
            CheckpointError: the file lacks it.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: the weights lack {name!r}")
        return self.tensors[name]

    def _rope(self) -> dict[str, Any]:
        arch, get = self.architecture, self.metadata.get
        theta = get(f"{arch}.rope.freq_base", _ROPE_THETA)
        scaling = get(f"{arch}.rope.scaling.type", "none")
        if scaling == "none":
            return {"rope_type": "default", "rope_theta": theta}
        factor = get(f"{arch}.rope.scaling.factor", 1.0)
        return {"rope_type": scaling, "rope_theta": theta, "factor": factor}


# Where a checkpoint is read from: a folder with safetensors, or the header of a GGUF.
Source = Path | GGUF


def open_source(path: Path) -> Source:
    """Reads the header of a GGUF; returns the path of a folder as it is.

    Raises:
        CheckpointError: see `read_gguf`.
    """
    return read_gguf(path) if path.is_file() else path


def read_gguf(path: Path) -> GGUF:
    """Reads the header of the file.

    Raises:
        CheckpointError: the file is damaged, unsupported, or only a part of a model.
    """
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            header = _read_header(path, data)
            _check_is_whole(header, len(data))
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, struct.error) as error:
        raise CheckpointError(
            f"{path}: the GGUF is damaged or incomplete ({first_line(error)}); "
            "copy or download it again"
        ) from error
    return header


def _read_header(path: Path, data: mmap.mmap) -> GGUF:
    cursor = _Cursor(data)
    cursor.offset = 4  # after the magic, which was checked before
    _check_version(path, cursor.number("I"))
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    metadata = dict(cursor.pair() for _ in range(num_keys))
    tensors = dict(cursor.tensor(path) for _ in range(num_tensors))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    begin = -(-cursor.offset // alignment) * alignment
    stored = {
        name: StoredTensor(shape, kind, begin + offset)
        for name, (shape, kind, offset) in tensors.items()
    }
    return GGUF(path, metadata, stored)


def _check_version(path: Path, version: int) -> None:
    if version & 0xFFFF == 0:
        raise CheckpointError(f"{path} is a big-endian GGUF; take the little-endian one")
    if version not in _VERSIONS:
        raise CheckpointError(
            f"{path} is a GGUF of version {version}; this server reads versions 2 and 3"
        )


def _check_is_whole(header: GGUF, num_bytes: int) -> None:
    if (num_parts := header.metadata.get("split.count", 1)) > 1:
        raise CheckpointError(
            f"{header.path} is one of {num_parts} parts of a GGUF; "
            "join them with llama-gguf-split --merge"
        )
    for name, tensor in header.tensors.items():
        if tensor.offset + tensor.num_bytes > num_bytes:
            raise ValueError(f"it ends before {name!r} does")


class _Cursor:
    """Reads values one by one. Raises ValueError or struct.error beyond the end of the data."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.offset = 0

    def number(self, code: str) -> Any:
        """code: see `struct`."""
        [value] = struct.unpack_from(f"<{code}", self._data, self.offset)
        self.offset += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        begin = self.offset + 8
        end = begin + self.number("Q")
        if end > len(self._data):
            raise ValueError("it ends within its header")
        self.offset = end
        # Texts of tokens are valid UTF-8: each byte is stored as a character.
        return str(self._data[begin:end], "utf-8")

    def pair(self) -> tuple[str, Any]:
        """A key of the metadata and its value."""
        return self.string(), self._value(GGUFValueType(self.number("I")))

    def tensor(self, path: Path) -> tuple[str, tuple[tuple[int, ...], GGMLQuantizationType, int]]:
        """A tensor's name; its shape, type, and offset in the tensor data."""
        name = self.string()
        shape = tuple(self.number("Q") for _ in range(self.number("I")))[::-1]
        kind, offset = self.number("I"), self.number("Q")
        if kind not in GGML_QUANT_SIZES:
            raise CheckpointError(f"{path}: {name!r} is of an unknown type: {kind}")
        return name, (shape, GGMLQuantizationType(kind), offset)

    def _value(self, kind: GGUFValueType) -> Any:
        if kind != GGUFValueType.ARRAY:
            return self._element(kind)
        kind = GGUFValueType(self.number("I"))
        return [self._element(kind) for _ in range(self.number("Q"))]

    def _element(self, kind: GGUFValueType) -> Any:
        return self.string() if kind == GGUFValueType.STRING else self.number(_CODES[kind])
