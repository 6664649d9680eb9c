"""Runs an engine of `benchmarks.engines` in its own process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.exports import OPENVINO_PYTHON


class Worker:
    """An engine in its own process."""

    def __init__(self, engine: str, model: Path) -> None:
        """model: in the engine's own format, see `benchmarks.exports`."""
        python = OPENVINO_PYTHON if engine.startswith("openvino") else sys.executable
        command = [python, "-m", "benchmarks.engines", engine, model]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ready_s: float = self._answer()["ready_s"]

    def ask(self, request: dict[str, Any]) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        with self._process:  # closes the pipes and waits
            self._process.kill()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} has died")
        answer: dict[str, float] = json.loads(line)
        return answer
