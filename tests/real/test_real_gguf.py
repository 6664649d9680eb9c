"""The real model's own GGUF, `model.gguf` in the folder of `QWEN_REAL`, beside its safetensors."""

from pathlib import Path

import httpx
import pytest
from torch import Tensor

from benchmarks.perplexity import TEXTS, compare, logprobs
from server.config import Settings
from server.core.engine.gguf_file import GGUF, Source, read_gguf
from server.core.engine.model.config import read_model_config
from server.core.engine.model.qwen import load_qwen
from server.core.text.tokenizer_files import read_tokenizer
from tests.servers import run_live

pytestmark = pytest.mark.real

NUM_TOKENS = 200
MOODS = {
    "我今天考试通过了！": "positive",
    "我失恋了，很难过": "negative",
    "I got a new job and I love it!": "positive",
    "My flight was cancelled and nobody helped": "negative",
}


@pytest.fixture(scope="module")
def file(real_folder: Path) -> GGUF:
    path = real_folder / "model.gguf"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    return read_gguf(path)


@pytest.fixture(scope="module")
def texts(file: GGUF) -> list[list[int]]:
    tokenizer = read_tokenizer(file)
    return [tokenizer.encode_text(p.read_text(encoding="utf-8"))[:NUM_TOKENS] for p in TEXTS]


@pytest.fixture(scope="module")
def reference(real_folder: Path, texts: list[list[int]]) -> list[Tensor]:
    """Log-probabilities of the safetensors in float32."""
    return of(real_folder, "float32", texts)


def of(source: Source, dtype: str, texts: list[list[int]]) -> list[Tensor]:
    model = load_qwen(source, read_model_config(source), dtype)
    return [logprobs(model, ids, 151_000) for ids in texts]


# As far from float32 as the safetensors are in the same type: 0.008 in int8, 0.03 in int4.
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 0.01), ("int8", 0.02), ("int4", 0.08)])
def test_its_probabilities_are_those_of_the_safetensors(
    file: GGUF, texts: list[list[int]], reference: list[Tensor], dtype: str, bound: float
) -> None:
    quality = compare(texts, of(file, dtype, texts), reference)
    assert quality.divergence < bound
    assert quality.same_top > 0.8


def test_it_encodes_as_the_tokenizer_in_the_folder(file: GGUF, real_folder: Path) -> None:
    ours, theirs = read_tokenizer(file), read_tokenizer(real_folder)
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        assert ours.encode_text(text) == theirs.encode_text(text)
        messages = [{"role": "user", "content": text}]
        assert ours.encode_chat(messages) == theirs.encode_chat(messages)


def test_both_roles_work_as_it_is_served(file: GGUF) -> None:
    with run_live(Settings(model=str(file.path))) as server:
        assert server.model == "model"
        for text, mood in MOODS.items():
            body = {"model": server.model, "messages": [{"role": "user", "content": text}],
                    "max_tokens": 40, "temperature": 0}  # fmt: skip
            reply = httpx.post(f"{server.base_url}/chat/completions", json=body, timeout=300).json()
            assert reply["sentiment"]["label"] == mood
            answer = reply["choices"][0]["message"]["content"]
            assert len(answer) > 3
            assert any(char >= "\u4e00" for char in answer) == any(c >= "\u4e00" for c in text)
