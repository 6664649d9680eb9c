"""Constrains completions to JSON of a schema, calls of given tools, or pieces of a text.

Built on llguidance, which computes the tokens that a grammar allows next
(https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md). White space in JSON is
fixed, so that a model cannot spend its tokens on blanks.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import regex
from cachetools import LRUCache, cachedmethod
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from server.core.text.spans import UNSPACED, words
from server.core.text.tokenizer import ChatTokenizer
from server.core.text.tools import (
    BLANKS,
    CALL_BEGIN,
    CALL_END,
    UNTAGGED_END,
    Tool,
    call_head,
    call_opening,
    untagged_head,
)
from server.errors import InvalidRequestError

# As json.dumps writes it, and as models have seen it most often.
_WHITE_SPACE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# The maximum length of a piece of a text: in words if spaces separate them, else in characters.
MAX_PIECE_WORDS, MAX_PIECE_CHARS = 3, 8

# Limits of the cache of compiled grammars: their number, and the length of their texts together; a
# character takes 70 bytes.
MAX_KEPT, MAX_KEPT_CHARS = 64, 2**20


class GrammarError(Exception):
    """The grammar cannot be used. tool: the one whose parameters are the reason, if any."""

    def __init__(self, reason: str, tool: Tool | None = None) -> None:
        super().__init__(reason if tool is None else f"the parameters of {tool.name!r}: {reason}")
        self.tool = tool


class FormatTooComplexError(InvalidRequestError):
    """A schema could be compiled, but is too complex for generation."""


class GrammarState:
    """The state of one completion in its grammar.

    Both methods raise a FormatTooComplexError if the parser exceeds its limits.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self) -> bytes:
        """A bit for each token id, the lowest first: 1 if the token may come next."""
        mask = self._matcher.compute_bitmask()
        self._check()
        return mask

    def accept(self, token_id: int) -> None:
        """Advances by an allowed token."""
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            raise FormatTooComplexError(
                f"The schema of the answer or of a tool is too complex to be followed ({reason}); "
                "give a simpler one, with fewer alternatives that begin alike."
            )


@dataclass(frozen=True)
class OutputFormat:
    """The format of an answer; by default any text.

    schema: of the JSON that the answer must be, unless it is a call.
    tools: those that the answer may call, or must call (`is_call_required`).
    """

    schema: Mapping[str, Any] | None = None
    tools: Sequence[Tool] = ()
    is_call_required: bool = False
    is_parallel: bool = True  # whether several calls are allowed

    @property
    def call_opening(self) -> regex.Pattern[str] | None:
        """The pattern of the start of a call (`tools.call_opening`); None: there are no tools."""
        if not self.tools:
            return None
        may_be_any_text = self.schema is None and not self.is_call_required
        return call_opening(self.tools if may_be_any_text else ())


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar; any number of completions may use it at once."""

    matcher: LLMatcher
    text: str  # in llguidance's format

    def begin(self) -> GrammarState:
        """The state before the first token."""
        return GrammarState(self.matcher.deep_copy())


class GrammarCompiler:
    """Compiles grammars for the tokens of one checkpoint, on any thread.

    The most recently used ones are cached: an agent sends the same tools with every turn.
    """

    def __init__(self, tokenizer: ChatTokenizer, eos_token_ids: Sequence[int]) -> None:
        """eos_token_ids: the tokens that may end a complete text."""
        self._chat_tokenizer = tokenizer
        self._eos_token_ids = list(eos_token_ids)
        self._cache: LRUCache[str, Grammar] = LRUCache(
            MAX_KEPT_CHARS, lambda grammar: max(len(grammar.text), MAX_KEPT_CHARS // MAX_KEPT)
        )
        self._lock = Lock()

    def compile(self, output: OutputFormat) -> Grammar | None:
        """The grammar of the format; None if any text is allowed. May take a second.

        Raises:
            GrammarError: a schema is invalid, or has a rule that cannot be guaranteed.
        """
        if output.tools:
            return self.tool_calls(
                output.tools,
                is_required=output.is_call_required,
                is_parallel=output.is_parallel,
                answer=output.schema,
            )
        return None if output.schema is None else self.json_schema(output.schema)

    def json_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """The grammar of JSON that fits the schema.

        Raises:
            GrammarError: the schema is invalid, or has a rule that cannot be guaranteed.
        """
        try:
            grammar = LLMatcher.grammar_from_json_schema(dict(schema), overrides=_WHITE_SPACE)  # type: ignore[arg-type]
        except ValueError as error:  # an integer of more than 64 bits
            raise GrammarError(str(error)) from error
        return self._compile(grammar)

    def lark(self, text: str) -> Grammar:
        """The grammar that is written in llguidance's own language.

        Raises:
            GrammarError: the grammar is invalid.
        """
        return self._compile(LLMatcher.grammar_from_lark(text))

    def tool_calls(
        self, tools: Sequence[Tool], *, is_required: bool, is_parallel: bool,
        answer: Mapping[str, Any] | None = None,
    ) -> Grammar:  # fmt: skip
        """The grammar of calls of the tools: one call, or several if `is_parallel`.

        If no call is required, any text may come before the calls or in their place. With
        `answer`, a schema, only JSON of this schema may come in their place.

        Raises:
            GrammarError: a schema is invalid, or has a rule that cannot be guaranteed.
        """
        text = _calls_in_lark(tools, is_required, is_parallel, answer)
        try:
            return self._compile(LLMatcher.grammar_from_lark(text))
        except GrammarError:
            # Each schema alone, so that the message names the invalid one.
            for tool in tools:
                try:
                    self.json_schema(tool.parameters)
                except GrammarError as error:
                    raise GrammarError(str(error), tool) from error
            if answer is not None:
                self.json_schema(answer)
            raise

    def pieces(self, text: str, max_pieces: int) -> Grammar | None:
        """The grammar of 1 to `max_pieces` lines, each a few consecutive words of the text.

        None if the text has no letter and no digit. May take a second for a long text.
        """
        chunks = _chunks(text)
        if not chunks:
            return None
        return self._build(LLMatcher.grammar_from_lark(_pieces_in_lark(chunks, max_pieces)))

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        # Built on first use: it takes two seconds for Qwen's vocabulary.
        vocabulary = _Vocabulary(self._chat_tokenizer, self._eos_token_ids[0])
        return LLTokenizer(TokenizerWrapper(vocabulary), eos_token=self._eos_token_ids)

    # A grammar that fails, or is too long, is not cached.
    @cachedmethod(lambda self: self._cache, lock=lambda self: self._lock)
    def _compile(self, text: str) -> Grammar:
        return self._build(text)

    def _build(self, text: str) -> Grammar:
        matcher = LLMatcher(self._tokenizer, text, log_level=0)
        if matcher.is_error():
            raise GrammarError(matcher.get_error())
        return Grammar(matcher, text)


class _Vocabulary:
    """The tokens in the form that llguidance reads.

    From the tokenizer itself, llguidance would take every added token for a special one, which
    no text can contain. Qwen2.5's `<tool_call>` is an added token.
    """

    def __init__(self, tokenizer: ChatTokenizer, eos_token_id: int) -> None:
        self.eos_token_id, self.bos_token_id = eos_token_id, None
        token_bytes = tokenizer.token_bytes
        self.special_token_ids = [i for i, data in enumerate(token_bytes) if not data]
        self.tokens = [data or tokenizer.decode([i]).encode() for i, data in enumerate(token_bytes)]
        self._token_bytes, self._encode = token_bytes, tokenizer.encode_own_text
        self._byte_ids = {data[0]: i for i, data in enumerate(token_bytes) if len(data) == 1}

    def __call__(self, text: str) -> list[int]:
        """Ids of exactly this text, which Qwen's tokenizer may change to Unicode's form NFC."""
        ids, data = self._encode(text), text.encode()
        if b"".join(self._token_bytes[i] for i in ids) == data:
            return ids
        return [self._byte_ids[byte] for byte in data]


def _calls_in_lark(
    tools: Sequence[Tool], is_required: bool, is_parallel: bool, answer: Mapping[str, Any] | None
) -> str:
    """The rules of `GrammarCompiler.tool_calls`."""
    more = '("\\n" call)*' if is_parallel else ""
    bodies = (
        f"{json.dumps(call_head(tool.name)[len(CALL_BEGIN) :])} arguments_{i}"
        for i, tool in enumerate(tools)
    )
    rules = [
        f"call: {json.dumps(CALL_BEGIN)} body",
        f"body: ({' | '.join(bodies)}) {json.dumps(CALL_END)}",
        *(f"arguments_{i}: {_json(tool.parameters)}" for i, tool in enumerate(tools)),
    ]
    if is_required:
        rules.append(f"start: call {more}")
    elif answer is not None:
        rules += [f"start: answer | call {more}", f"answer: {_json(answer)}"]
    else:
        # Lazy: the text ends where the first call begins.
        rules += [
            f"start: TEXT | opening body {more} | untagged",
            f"opening[lazy]: TEXT {json.dumps(CALL_BEGIN)}",
            r"TEXT: /(.|\n)*/",
            *_untagged_in_lark(tools, is_parallel),
        ]
    return "\n".join(rules)


def _untagged_in_lark(tools: Sequence[Tool], is_parallel: bool) -> list[str]:
    """Rules of text that ends in calls without tags: bare, in code fences, or in an array."""
    first = (f'opening_{i} " "? arguments_{i}' for i in range(len(tools)))
    following = (
        f"{json.dumps(json.dumps(tool.name))} MIDDLE arguments_{i}" for i, tool in enumerate(tools)
    )
    end = json.dumps(UNTAGGED_END)
    more = f"(NEXT ({' | '.join(following)}) {end})*" if is_parallel else ""
    return [
        f'untagged: ({" | ".join(first)}) {end} {more} "\\n]"? "\\n```"?',
        *(f"opening_{i}[lazy]: TEXT /{untagged_head(t.name)}/" for i, t in enumerate(tools)),
        rf'NEXT: /(,|\n```\n{{1,2}}```(json)?)?{BLANKS}\{{{BLANKS}"name": ?/',
        rf'MIDDLE: /,{BLANKS}"arguments": ?/',
    ]


def _json(schema: Mapping[str, Any]) -> str:
    """JSON of the schema, as part of a Lark grammar."""
    return f"%json {json.dumps({**schema, 'x-guidance': _WHITE_SPACE})}"


def _chunks(text: str) -> list[str]:
    """The words of the text and their separators: a space for a space, a line break otherwise."""
    chunks: list[str] = []
    end = 0
    for word in words(text):
        piece = word.of(text)
        if not any(map(str.isalnum, piece)):
            continue  # an emoji
        gap = text[end : word.offset]
        is_joined = not gap and (_is_unspaced(piece) or (chunks and _is_unspaced(chunks[-1])))
        if chunks and not is_joined:
            # An empty gap lies within a long word that was cut.
            chunks.append(" " if gap == " " else "\n")
        chunks.append(piece)
        end = word.end
    return chunks


def _is_unspaced(word: str) -> bool:
    return re.match(f"[{UNSPACED}]", word) is not None


def _pieces_in_lark(chunks: Sequence[str], max_pieces: int) -> str:
    """The rules of `GrammarCompiler.pieces`."""
    spaced = rf"[^\s{UNSPACED}]+"
    return "\n".join(
        (
            f'start: (piece "\\n"){{1,{max_pieces}}}',
            "piece: PIECE",
            f"PIECE: TEXT & (/({spaced}|[{UNSPACED}]){{1,{MAX_PIECE_CHARS}}}/"
            f" | /{spaced}( {spaced}){{0,{MAX_PIECE_WORDS - 1}}}/)",
            f"TEXT: %regex {json.dumps({'substring_chunks': chunks})}",
        )
    )
