"""Makes a Qwen's tokenizer from the metadata of a GGUF file.

transformers can do so, too (`gguf_file=`), but adds three tokens, whatever the file lists.
"""

from typing import Any

from tokenizers import AddedToken
from transformers import Qwen2Tokenizer

from server.core.engine.checkpoint import CheckpointError
from server.core.engine.gguf_file import CONTROL, GGUF, NORMAL, UNUSED, USER_DEFINED
from server.reasons import first_line

# llama.cpp's name of Qwen's pre-tokenizer. Files made before llama.cpp distinguished pre-tokenizers
# name none; Qwen's is assumed.
_SPLIT = "qwen2"


def read_gguf_tokenizer(gguf: GGUF) -> Qwen2Tokenizer:
    """Makes the tokenizer, with the file's chat template.

    Raises:
        CheckpointError: the tokenizer is missing, damaged or of a kind that Qwen does not use.
    """
    if "tokenizer.ggml.tokens" not in gguf.metadata:
        raise CheckpointError(f"{gguf} has no tokenizer: tokenizer.ggml.tokens is missing")
    kinds = (gguf.metadata.get("tokenizer.ggml.model"), gguf.metadata.get("tokenizer.ggml.pre"))
    if kinds not in [("gpt2", _SPLIT), ("gpt2", None)]:
        raise CheckpointError(
            f"{gguf}: the tokenizer is of kind {kinds[0]!r}, {kinds[1]!r}; use a GGUF of a Qwen, "
            f"whose kind is 'gpt2', {_SPLIT!r}"
        )
    merges = gguf["tokenizer.ggml.merges"]
    try:
        return _make(gguf, merges)
    # tokenizers raises plain Exception for merges that do not fit.
    except Exception as error:
        raise CheckpointError(
            f"{gguf}: the tokenizer is not readable: {first_line(error)}"
        ) from error


def _make(gguf: GGUF, merges: list[str]) -> Qwen2Tokenizer:
    tokens, kinds = _tokens(gguf)
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        raise ValueError("two tokens have the same text")
    # `Any`, for the annotations are too narrow.
    pairs: Any = [tuple(merge.split(" ")) for merge in merges]
    none: Any = None
    tokenizer = Qwen2Tokenizer(
        vocab=ids, merges=pairs, unk_token=none, eos_token=none, pad_token=none,
        chat_template=gguf.metadata.get("tokenizer.chat_template"),
    )  # fmt: skip
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    return tokenizer


def _tokens(gguf: GGUF) -> tuple[list[str], list[int]]:
    """Text and kind of each token, without the tokens that only pad the model's matrices."""
    tokens: list[str] = gguf["tokenizer.ggml.tokens"]
    kinds: list[int] = gguf.metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    end = len(tokens)
    # In old files, padding tokens have the kind USER_DEFINED.
    while end and (kinds[end - 1] == UNUSED or tokens[end - 1] == f"[PAD{end - 1}]"):
        end -= 1
    return tokens[:end], kinds[:end]
