"""Fitted judges in a folder, so that a later start with the same model need not fit them again.

A file is a safetensors file: a head's `weights` (C, K) and `biases` (K,), or the labels' `prior`
(K,); the rest is JSON in its metadata.
"""

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

from server.core.heads import LinearHead
from server.core.judges import CrossValidation, HeadJudge, Judge, LabelJudge

logger = logging.getLogger(__name__)

# To be raised when judges are fitted in another way than before.
FORMAT = 1


class JudgeCache:
    """Judges of one model in a folder. What cannot be read or written is a warning."""

    def __init__(self, folder: Path, model: str) -> None:
        """model: what the judges depend on but the prompts, such as a digest of the weights."""
        self._folder, self._model = folder, model

    def path(self, key: object) -> Path:
        """Where the judge of this key is kept: all that it depends on but the model, as JSON."""
        digest = hashlib.sha256(json.dumps([FORMAT, self._model, key]).encode()).hexdigest()
        return self._folder / f"judge-{digest[:32]}.safetensors"

    def read(self, path: Path) -> Judge | None:
        """The judge, or None if it is not there or is damaged."""
        try:
            with safe_open(path, framework="np") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                about = json.loads(opened.metadata()["judge"])
            if about.pop("digest") != _digest(tensors):
                raise ValueError("the numbers are not those that were written")
            return _judge(tensors, about)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
            logger.warning("a fitted judge is damaged and is fitted again: %s: %s", path, error)
            return None

    def write(self, path: Path, judge: Judge) -> None:
        """Keeps the judge, whole or not at all."""
        tensors, about = _parts(judge)
        draft = path.with_suffix(f".{os.getpid()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            about["digest"] = _digest(tensors)
            save_file(tensors, draft, metadata={"judge": json.dumps(about)})
            draft.replace(path)
        except (OSError, SafetensorError) as error:
            logger.warning(
                "a fitted judge cannot be kept (--cache-dir %s): %s", self._folder, error
            )
            draft.unlink(missing_ok=True)


def _digest(tensors: dict[str, Any]) -> str:
    """Of the tensors' bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def _parts(judge: Judge) -> tuple[dict[str, Any], dict[str, Any]]:
    validation = asdict(judge.validation) if judge.validation else None
    if isinstance(judge, HeadJudge):
        tensors = {"weights": judge.head.weights, "biases": judge.head.biases}
        return tensors, {"layer": judge.layer, "validation": validation}
    prior = np.array(judge.prior, dtype=np.float64)
    return {"prior": prior}, {"temperature": judge.temperature, "validation": validation}


def _judge(tensors: dict[str, Any], about: dict[str, Any]) -> Judge:
    validation = CrossValidation(**about["validation"]) if about["validation"] else None
    if "layer" in about:
        head = LinearHead(tensors["weights"], tensors["biases"])
        return HeadJudge(about["layer"], head, validation)
    return LabelJudge(tuple(tensors["prior"].tolist()), about["temperature"], validation)
