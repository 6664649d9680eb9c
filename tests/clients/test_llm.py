"""The `llm` command against a real server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import LiveServer

pytest.importorskip("llm")


@pytest.mark.parametrize("options", [[], ["--no-stream"], ["-o", "temperature", "0.9"]])
def test_the_command_is_answered(tiny: LiveServer, tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: ours\n  model_name: {tiny.model}\n  api_base: {tiny.base_url}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "llm", "-m", "ours", *options, "-o", "max_tokens", "20", "Hello!"],
        env={**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "unused"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
