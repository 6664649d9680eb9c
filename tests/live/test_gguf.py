"""A served GGUF gives the same results as the folder it was made from."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.config import Settings
from server.core.engine.checkpoint import BUNDLED_FOLDER
from tests.gguf_files import write_gguf
from tests.servers import LiveServer, write_few_examples

TEXTS = ["我今天考试通过了！", "My flight was cancelled and nobody helped"]


def ask(server: LiveServer, path: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{server.base_url}/{path}", json=body, timeout=60)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


def said(server: LiveServer, text: str) -> tuple[str, list[float]]:
    """A reply, and the probabilities of the moods of what was said."""
    # The folder recommends how to sample, and this GGUF does not.
    sampling = {"temperature": 0, "repetition_penalty": 1}
    reply = ask(server, "chat/completions", model=server.model, max_tokens=24,
                messages=[{"role": "user", "content": text}], **sampling)  # fmt: skip
    probabilities = [x["probability"] for x in reply["sentiment"]["probabilities"]]
    return reply["choices"][0]["message"]["content"], probabilities


@pytest.mark.parametrize("of", ["tiny", "bundled"])
def test_a_gguf_answers_and_judges_as_its_folder_does(
    serve: Callable[[Settings], AbstractContextManager[LiveServer]],
    tiny_checkpoint: Path,
    tmp_path: Path,
    of: str,
) -> None:
    folder = tiny_checkpoint if of == "tiny" else BUNDLED_FOLDER
    path = tmp_path / "my-qwen.gguf"
    write_gguf(path, folder)
    # A folder's prompts are a file beside its weights, which the GGUF has not.
    tasks = tmp_path / "tasks.toml"
    shutil.copy(folder / "tasks.toml", tasks)
    write_few_examples(tmp_path)
    with (
        serve(Settings(model=str(folder), tasks=tasks, dtype="float32")) as theirs,
        serve(Settings(model=str(path), tasks=tasks, dtype="float32")) as ours,
    ):
        assert ours.model == "my-qwen"
        for text in TEXTS:
            (our_text, our_moods), (their_text, their_moods) = said(ours, text), said(theirs, text)
            assert our_text == their_text
            assert our_moods == pytest.approx(their_moods, abs=1e-5)
