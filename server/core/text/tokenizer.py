"""Turns conversations and texts into token ids.

Only the chat template can write special tokens: whatever a client sends is encoded as
plain text, so no message can open a turn, close one or change its role.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from server.core.text.strings import map_strings, unused_char
from server.core.text.tools import Tool, without_tools
from server.errors import InvalidRequestError
from server.reasons import first_line

Message = Mapping[str, Any]


class ChatTemplateError(Exception):
    """The checkpoint's chat template refuses this conversation."""


class ChatTokenizer:
    """A checkpoint's tokenizer and chat template, safe against markers in user text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._template = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._plain = _without_added_tokens(self._backend)
        self._own = Tokenizer.from_str(self._backend.to_str())
        self._own.encode_special_tokens = True  # as plain text
        added = self._backend.get_added_tokens_decoder()
        self._marker_ids = {token.content: token_id for token_id, token in added.items()}
        # Longest first, so that a marker never hides in a longer one.
        markers = sorted(self._marker_ids, key=len, reverse=True)
        self._markers = re.compile("(" + "|".join(map(re.escape, markers)) + ")")

    @property
    def vocab_size(self) -> int:
        """Number of ids the tokenizer knows (a checkpoint's matrices may be larger)."""
        return self._backend.get_vocab_size()

    def marker_id(self, marker: str) -> int:
        """The id of a special or added token such as `<|im_end|>`."""
        return self._marker_ids[marker]

    def check_ids(self, token_ids: Iterable[int], param: Callable[[int], str]) -> None:
        """Checks that the ids are in the vocabulary.

        param: the request's field with the token id of an index, for errors.

        Raises:
            InvalidRequestError: a token id is not.
        """
        vocab_size = self.vocab_size
        for i, token_id in enumerate(token_ids):
            if not 0 <= token_id < vocab_size:
                raise InvalidRequestError(
                    f"'{param(i)}': the model has no token {token_id}, only 0 to {vocab_size - 1}.",
                    param=param(i),
                )

    def encode_text(self, text: str) -> list[int]:
        """Ids of `text` alone; a marker such as `<|im_end|>` in it stays plain text."""
        return _encode(self._plain, text)

    def encode_own_text(self, text: str) -> list[int]:
        """Ids of `text` as the model generates it, with added tokens that are not special.

        Qwen2.5's `<tool_call>` is such a token; `<|im_end|>` stays plain text.
        """
        return _encode(self._own, text)

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), *,
        add_generation_prompt: bool | None = None, continue_final_message: bool | None = None,
    ) -> list[int]:  # fmt: skip
        """Ids of the conversation in the checkpoint's chat template, ready to be answered.

        If the last message is the assistant's, it is left open, to be continued. Messages may
        have tool calls and their results even if no tools are offered any more.

        add_generation_prompt, continue_final_message: whether the prompt ends with the header of
        an answer, or with the last message left open. At most one may be true.

        Raises:
            ChatTemplateError: the template refuses this order of roles or this content.
        """
        if self._knows_tools:
            offered = [tool.for_template() for tool in tools]
        else:
            messages, offered = without_tools(messages, tools), []
        break_char = _break_char([*messages, *offered])
        rendered = self._render(
            *(self._break_markers(part, break_char) for part in (messages, offered)),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return self._encode_rendered(rendered, break_char)

    def encode_chats(
        self, messages: Sequence[Message], endings: Sequence[Message]
    ) -> tuple[list[int], list[list[int]]]:
        """Ids of the conversation with each of several last messages, split after their prefix.

        Returns the ids of the common prefix, encoded once, and the rest for each last message.
        Joined, they equal those of `encode_chat`.

        Raises:
            ChatTemplateError: the template refuses this order of roles or this content.
        """
        if not self._knows_tools:
            messages = without_tools(messages, ())
        break_char = _break_char([*messages, *endings])
        begin, ends = (self._break_markers(part, break_char) for part in (messages, endings))
        rendered = [self._render([*begin, end], []) for end in ends]
        # An additional empty ending, so that a single ending does not count as common.
        empty = self._render([*begin, {**ends[0], "content": ""}], [])
        first, last = min(empty, *rendered), max(empty, *rendered)
        # What the first and the last in sorted order have in common, all have in common.
        pairs = enumerate(zip(first, last, strict=False))
        common = first[: next((i for i, (a, b) in pairs if a != b), len(first))]
        # Markers are encoded separately from the text around them, so the ids may be split there.
        cut = max((marker.end() for marker in self._markers.finditer(common)), default=0)
        return (
            self._encode_rendered(common[:cut], break_char),
            [self._encode_rendered(text[cut:], break_char) for text in rendered],
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """The tokens' text, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(token_ids, skip_special_tokens=False)

    def token_strs(self, token_ids: Sequence[int]) -> list[str | None]:
        """Each token as the vocabulary spells it, a character for each byte."""
        return [self._backend.id_to_token(token_id) for token_id in token_ids]

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """UTF-8 bytes of every token id; empty for special tokens, which have no text."""
        byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
        added = self._backend.get_added_tokens_decoder()
        table = []
        for token_id in range(self.vocab_size):
            if token_id in added:
                token = added[token_id]
                table.append(b"" if token.special else token.content.encode())
            else:
                chars = self._backend.id_to_token(token_id) or ""
                table.append(bytes(byte_of[char] for char in chars))
        return table

    @cached_property
    def _knows_tools(self) -> bool:
        """Whether the chat template renders tools."""
        probe = Tool("probe_of_this_template", {"type": "object"})
        try:
            rendered = self._render([{"role": "user", "content": "a"}], [probe.for_template()])
        except ChatTemplateError:
            return False
        return probe.name in rendered

    def _encode_rendered(self, rendered: str, break_char: str) -> list[int]:
        """Ids of the chat template's output, in which all markers are the template's own."""
        ids: list[int] = []
        for i, piece in enumerate(self._markers.split(rendered)):
            if i % 2:
                ids.append(self._marker_ids[piece])
            elif piece:
                ids.extend(self.encode_text(piece.replace(break_char, "")))
        return ids

    def _render(
        self, messages: list[Any], tools: list[Any], *,
        add_generation_prompt: bool | None = None, continue_final_message: bool | None = None,
    ) -> str:  # fmt: skip
        if continue_final_message is None:
            is_assistants = messages[-1]["role"] == "assistant"
            continue_final_message = add_generation_prompt is None and is_assistants
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        try:
            rendered = self._template.apply_chat_template(
                messages,
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                # Qwen3 reasons before it answers by default, which takes too long on a CPU.
                enable_thinking=False,
            )
        # ValueError: the template drops the final message, which is to be continued. The last
        # three: it calculates with values of a wrong type, or exceeds the sandbox's limits.
        except (TemplateError, ValueError, TypeError, LookupError, ArithmeticError) as error:
            raise ChatTemplateError(first_line(error)) from error
        return str(rendered)

    def _break_markers(self, value: Any, break_char: str) -> Any:
        """Puts `break_char` after the first character of every marker in the value's strings."""
        return map_strings(
            value, lambda s: self._markers.sub(lambda m: m[0][0] + break_char + m[0][1:], s)
        )


def _encode(backend: Tokenizer, text: str) -> list[int]:
    # Not `encode`, which holds the GIL all the time: a second for a megabyte.
    [encoding] = backend.encode_batch_fast([text], add_special_tokens=False)
    ids: list[int] = encoding.ids
    return ids


def _without_added_tokens(backend: Tokenizer) -> Tokenizer:
    """The same byte-pair encoding without special and added tokens."""
    config = json.loads(backend.to_str())
    config["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(config))


def _break_char(conversation: list[Any]) -> str:
    if (char := unused_char(conversation)) is None:
        raise ChatTemplateError("the messages use up every private-use character")
    return char
