"""Judges as safetensors files. Knows neither tasks nor models.

A file holds a head's `center` (C,), `weights` (C, K) and `biases` (K,), or the labels' `prior`
(K,). All else is JSON in the metadata, with a digest of the whole file.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from server.core.roles.heads import LinearHead
from server.core.roles.judges import CrossValidation, HeadJudge, Judge, LabelJudge


class DamagedJudgeError(Exception):
    """The file is damaged, or holds no judge."""


def read_judge(path: Path) -> tuple[Judge, dict[str, Any]]:
    """Reads a judge, and the `about` that was written with it.

    Raises:
        OSError: the file cannot be read.
        DamagedJudgeError: the file is damaged, or holds no judge.
    """
    try:
        with safe_open(path, framework="np") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = json.loads(opened.metadata()["judge"])
        if metadata.pop("digest") != _digest(tensors, metadata):
            raise ValueError("the digest does not match the contents")
        return _judge(tensors, metadata), metadata.get("about", {})
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedJudgeError(str(error)) from error


def write_judge(path: Path, judge: Judge, about: Mapping[str, Any] | None = None) -> None:
    """Writes the file, whole or not at all, and creates its folder.

    about: further JSON for the reader.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    tensors, metadata = _parts(judge)
    if about:
        metadata["about"] = dict(about)
    metadata["digest"] = _digest(tensors, metadata)
    temporary_path = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary_path, metadata={"judge": json.dumps(metadata)})
        temporary_path.replace(path)
    except (OSError, SafetensorError):
        with contextlib.suppress(OSError):
            temporary_path.unlink()
        raise


def _digest(tensors: dict[str, Any], metadata: dict[str, Any]) -> str:
    """The digest of the file's contents, except the digest itself."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def _parts(judge: Judge) -> tuple[dict[str, Any], dict[str, Any]]:
    validation = asdict(judge.validation) if judge.validation else None
    if isinstance(judge, HeadJudge):
        head = judge.head
        tensors = {"center": head.center, "weights": head.weights, "biases": head.biases}
        metadata: dict[str, Any] = {"layer": judge.layer, "validation": validation}
    else:
        tensors = {"prior": np.array(judge.prior, dtype=np.float64)}
        metadata = {"temperature": judge.temperature, "validation": validation}
    # safetensors writes an array's memory as it is, whatever its strides.
    return {name: np.ascontiguousarray(each) for name, each in tensors.items()}, metadata


def _judge(tensors: dict[str, Any], metadata: dict[str, Any]) -> Judge:
    validation = metadata["validation"] and CrossValidation(**metadata["validation"])
    if "layer" in metadata:
        head = LinearHead(tensors["center"], tensors["weights"], tensors["biases"])
        return HeadJudge(metadata["layer"], head, validation)
    return LabelJudge(tuple(tensors["prior"].tolist()), metadata["temperature"], validation)
