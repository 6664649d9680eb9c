"""A tokenizer made from a GGUF, against the folder's from which the GGUF was written."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from server.core.engine.gguf_file import read_gguf
from server.core.text.tokenizer import ChatTokenizer
from server.core.text.tokenizer_files import read_tokenizer
from tests.gguf_files import write_gguf


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_checkpoint`, with an added token that is not special and a matrix that is longer."""
    path = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("tokenizer") / "folder"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<tool_call>"])
    tokenizer.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": len(tokenizer) + 7}))
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> ChatTokenizer:
    return read_tokenizer(folder)


@pytest.fixture(scope="module")
def ours(folder: Path) -> ChatTokenizer:
    path = folder / "model.gguf"
    write_gguf(path, folder)
    return read_tokenizer(read_gguf(path))


# What is split in some way of its own, and what is normalised.
PIECES = [
    "don't", "I'LL", "你好", "，", "。\n", "\r\n", "  ", "\u3000", "123", "é", "e\u0301", "ﬁ",
    "한국", "🙂", "👩‍👧", "العربية", "<|im_end|>", "<tool_call>", "<|im_start|>system", "\x00",
    "\ufffd", "(a)",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.sampled_from(PIECES) | st.text(max_size=5)).map("".join))
def test_texts_and_conversations_get_the_same_ids(
    ours: ChatTokenizer, theirs: ChatTokenizer, text: str
) -> None:
    assert ours.encode_text(text) == theirs.encode_text(text)
    assert ours.encode_own_text(text) == theirs.encode_own_text(text)
    messages = [{"role": "user", "content": text}]
    assert ours.encode_chat(messages) == theirs.encode_chat(messages)


def test_the_tokens_are_the_same_without_those_that_only_pad(
    ours: ChatTokenizer, theirs: ChatTokenizer
) -> None:
    assert ours.vocab_size == theirs.vocab_size
    assert ours.token_bytes == theirs.token_bytes
    ids = range(ours.vocab_size)
    assert ours.token_strs(ids) == theirs.token_strs(ids)


def test_files_that_name_no_pre_tokenizer_are_read(
    folder: Path, tmp_path: Path, theirs: ChatTokenizer
) -> None:
    path = tmp_path / "old.gguf"
    write_gguf(path, folder, without=("tokenizer.ggml.pre",))
    text = "Isn't it 2024? 是的。"
    assert read_tokenizer(read_gguf(path)).encode_text(text) == theirs.encode_text(text)
