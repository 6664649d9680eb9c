"""Fitted judges in a folder, so that a later start with the same model need not fit them again.

A file is a safetensors file: a head's `center` (C,), `weights` (C, K) and `biases` (K,), or the
labels' `prior` (K,). The rest is JSON in its metadata.
"""

import contextlib
import hashlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from server.core.roles.heads import LinearHead
from server.core.roles.judges import CrossValidation, HeadJudge, Judge, LabelJudge
from server.reasons import first_line

logger = logging.getLogger(__name__)

# Raise this number when the fitting of judges changes, or the arithmetic of quantized models does.
FORMAT = 2


class JudgeCache:
    """Judges of one model in a folder. What cannot be read or written is one warning in all."""

    def __init__(self, folder: Path, model: str) -> None:
        """model: identifies the weights and their type."""
        self._folder, self._model = folder, model
        self._has_warned = False

    def path(self, key: object) -> Path:
        """The file for a key: everything except the model that a judge depends on, as JSON."""
        digest = hashlib.sha256(json.dumps([FORMAT, self._model, key]).encode()).hexdigest()
        return self._folder / f"judge-{digest[:32]}.safetensors"

    def read(self, path: Path) -> Judge | None:
        """The judge, or None if it is not there or is damaged."""
        try:
            with safe_open(path, framework="np") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                metadata = json.loads(opened.metadata()["judge"])
            if metadata.pop("digest") != _digest(tensors, metadata):
                raise ValueError("the contents are not those that were written")
            return _judge(tensors, metadata)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn("a fitted judge cannot be read and is fitted again", error)
        except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
            self._warn(f"a fitted judge is damaged and is fitted again: {path}", error)
        return None

    def write(self, path: Path, judge: Judge) -> None:
        """Keeps the judge, whole or not at all."""
        tensors, metadata = _parts(judge)
        metadata["digest"] = _digest(tensors, metadata)
        temporary_path = path.with_suffix(f".{os.getpid()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary_path, metadata={"judge": json.dumps(metadata)})
            temporary_path.replace(path)
        except (OSError, SafetensorError) as error:
            self._warn("fitted judges cannot be kept", error)
            with contextlib.suppress(OSError):
                temporary_path.unlink()

    def _warn(self, what: str, error: Exception) -> None:
        if not self._has_warned:
            logger.warning("%s (--cache-dir %s): %s", what, self._folder, first_line(error))
        self._has_warned = True


def _digest(tensors: dict[str, Any], metadata: dict[str, Any]) -> str:
    """Of everything in a file but the digest itself."""
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
    # safetensors writes the memory as it lies.
    return {name: np.ascontiguousarray(each) for name, each in tensors.items()}, metadata


def _judge(tensors: dict[str, Any], metadata: dict[str, Any]) -> Judge:
    validation = metadata["validation"] and CrossValidation(**metadata["validation"])
    if "layer" in metadata:
        head = LinearHead(tensors["center"], tensors["weights"], tensors["biases"])
        return HeadJudge(metadata["layer"], head, validation)
    return LabelJudge(tuple(tensors["prior"].tolist()), metadata["temperature"], validation)
