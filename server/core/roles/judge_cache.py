"""Keeps fitted judges in a folder, so that later starts with the same model need not fit them."""

import hashlib
import json
import logging
from pathlib import Path

from safetensors import SafetensorError

from server.core.roles.judge_files import DamagedJudgeError, read_judge, write_judge
from server.core.roles.judges import Judge
from server.reasons import first_line

logger = logging.getLogger(__name__)

# Increment when the fitting of judges or the arithmetic of quantized models changes.
FORMAT = 2


class JudgeCache:
    """The judges of one model in a folder. Logs only the first failure to read or write."""

    def __init__(self, folder: Path, model: str) -> None:
        """model: identifies the weights and their type."""
        self._folder, self.model = folder, model
        self._has_warned = False

    def path(self, key: object) -> Path:
        """The file for a key. key: all that the judge depends on but the model, as JSON values."""
        digest = hashlib.sha256(json.dumps([FORMAT, self.model, key]).encode()).hexdigest()
        return self._folder / f"judge-{digest[:32]}.safetensors"

    def read(self, path: Path) -> Judge | None:
        """The judge; None if it is missing, unreadable or damaged."""
        try:
            judge, _ = read_judge(path)
            return judge
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn("a fitted judge cannot be read and is fitted again", error)
        except DamagedJudgeError as error:
            self._warn(f"a fitted judge is damaged and is fitted again: {path}", error)
        return None

    def write(self, path: Path, judge: Judge) -> None:
        """Writes the judge, whole or not at all."""
        try:
            write_judge(path, judge)
        except (OSError, SafetensorError) as error:
            self._warn("fitted judges cannot be kept", error)

    def _warn(self, message: str, error: Exception) -> None:
        if not self._has_warned:
            logger.warning("%s (--cache-dir %s): %s", message, self._folder, first_line(error))
        self._has_warned = True
