"""Reads a checkpoint's tokenizer. Apart from its class: transformers imports torch for this."""

from pathlib import Path

from tokenizers.decoders import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from server.core.engine.checkpoint import CheckpointError
from server.core.engine.gguf_file import GGUF, Source
from server.core.text.gguf_tokenizer import read_gguf_tokenizer
from server.core.text.tokenizer import ChatTemplateError, ChatTokenizer
from server.reasons import first_line


def read_tokenizer(source: Source) -> ChatTokenizer:
    """Loads the tokenizer of a checkpoint folder or GGUF file.

    Raises:
        CheckpointError: the tokenizer is missing, damaged or of a kind that Qwen does not use.
    """
    tokenizer = read_gguf_tokenizer(source) if isinstance(source, GGUF) else _read_folder(source)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(f"{source}: the tokenizer has no fast form (tokenizer.json)")
    if not isinstance(tokenizer.backend_tokenizer.decoder, ByteLevel):
        raise CheckpointError(f"{source}: the tokenizer is not byte-level as Qwen's is")
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"{source} has no chat template; use a checkpoint made for chat (...-Chat, "
            "...-Instruct)"
        )
    loaded = ChatTokenizer(tokenizer)
    try:
        loaded.encode_chat([{"role": "user", "content": "a"}])
    except ChatTemplateError as error:
        raise CheckpointError(f"{source}: the chat template is broken: {error}") from error
    return loaded


def _read_folder(folder: Path) -> PreTrainedTokenizerBase:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(f"{folder} has no tokenizer: tokenizer.json is missing")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True
        )
    # tokenizers raises plain Exception for a damaged file.
    except Exception as error:
        raise CheckpointError(
            f"{folder}: the tokenizer is not readable: {first_line(error)}"
        ) from error
    return tokenizer
