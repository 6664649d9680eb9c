"""Reads the weights of a checkpoint as float32, whatever format they are stored in."""

import hashlib
from pathlib import Path

from server.core.engine.checkpoint import CheckpointError
from server.core.engine.gguf_file import GGUF, Source
from server.core.engine.model.weights.gguf_tensors import GGUFReader
from server.core.engine.model.weights.packed import PackedReader
from server.core.engine.model.weights.packing import read_packing
from server.core.engine.model.weights.reader import Lookup, WeightReader
from server.core.engine.model.weights.safetensors_folder import SafetensorsReader, weight_files
from server.reasons import first_line

__all__ = ["Lookup", "WeightReader", "open_weights", "weights_digest"]


def open_weights(source: Source) -> WeightReader:
    """The reader for the checkpoint's format.

    Raises:
        CheckpointError: its weights are missing or damaged.
    """
    if isinstance(source, GGUF):
        return GGUFReader(source)
    packing = read_packing(source)
    return PackedReader(source, packing) if packing else SafetensorsReader(source)


def weights_digest(source: Source) -> str:
    """SHA-256 of the checkpoint's configuration and weights, in hexadecimal; 1 or 2 GB a second.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for path in _files_of(source):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise CheckpointError(f"{source}: cannot read the weights: {first_line(error)}") from error
    return digest.hexdigest()


def _files_of(source: Source) -> list[Path]:
    if isinstance(source, GGUF):
        return [source.path]
    return [source / "config.json", *weight_files(source)]
