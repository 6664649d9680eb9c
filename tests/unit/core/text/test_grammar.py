"""Grammars: whatever tokens a model prefers, its text fits."""

import copy
import functools
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from server.core.engine.checkpoint import BUNDLED_FOLDER
from server.core.text import grammar as grammar_module
from server.core.text.grammar import (
    MAX_KEPT,
    FormatTooComplexError,
    Grammar,
    GrammarCompiler,
    GrammarError,
    OutputFormat,
)
from server.core.text.spans import MAX_WORD_CHARS
from server.core.text.tokenizer import ChatTokenizer
from server.core.text.tools import Answer, TextDelta, Tool

WEATHER = Tool(
    "get_weather",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
    },
)
CLOCK = Tool("clock", {"type": "object", "properties": {}, "additionalProperties": False})
MAX_TOKENS = 400
# Compiles, but after the first brace it might be any of these.
TOO_COMPLEX = {
    "anyOf": [{"type": "object", "properties": {f"p{i}": {"type": "string"}}} for i in range(200)]
}


@pytest.fixture(scope="session")
def compiler(tokenizer: ChatTokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, [tokenizer.marker_id("<|im_end|>")])


def allowed_ids(mask: bytes, vocab_size: int) -> list[int]:
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=vocab_size, bitorder="little")
    ids: list[int] = np.flatnonzero(bits).tolist()
    return ids


@functools.cache
def closing_ids(tokenizer: ChatTokenizer) -> frozenset[int]:
    """Tokens that end strings, lists and objects, or begin to end a call."""
    return frozenset(i for i, data in enumerate(tokenizer.token_bytes) if data[:1] in b'"}]<')


def walk(grammar: Grammar, tokenizer: ChatTokenizer, rng: random.Random) -> str:
    """The text of a random model that ends strings, lists and its answer as soon as it can."""
    state, end = grammar.begin(), tokenizer.marker_id("<|im_end|>")
    data = b""
    for _ in range(MAX_TOKENS):
        allowed = allowed_ids(state.allowed(), tokenizer.vocab_size)
        if end in allowed:
            return data.decode()
        closing = sorted(closing_ids(tokenizer).intersection(allowed))
        chosen = rng.choice(closing if closing and rng.random() < 0.6 else allowed)
        state.accept(chosen)
        data += tokenizer.token_bytes[chosen]
    pytest.fail(f"no end after {MAX_TOKENS} tokens: {data!r}")


def accepts(grammar: Grammar, tokenizer: ChatTokenizer, text: str) -> bool:
    """Whether the text is complete in the grammar."""
    state = grammar.begin()
    for token_id in tokenizer.encode_text(text):
        mask = state.allowed()
        if not mask[token_id // 8] >> (token_id % 8) & 1:
            return False
        state.accept(token_id)
    return tokenizer.marker_id("<|im_end|>") in allowed_ids(state.allowed(), tokenizer.vocab_size)


# --- JSON -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_json_object_is_valid(
    compiler: GrammarCompiler, tokenizer: ChatTokenizer, seed: int
) -> None:
    text = walk(compiler.json_schema({"type": "object"}), tokenizer, random.Random(seed))
    assert isinstance(json.loads(text), dict)


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Schemas of the kind people send: nested objects, lists, enumerations, bounds."""
    leaves = st.one_of(
        st.sampled_from(["string", "integer", "number", "boolean", "null"]).map(
            lambda kind: {"type": kind}
        ),
        st.lists(st.text('abc中😀"\\', min_size=1, max_size=4), min_size=1, max_size=3).map(
            lambda values: {"enum": values}
        ),
        st.integers(-50, 50).map(
            lambda low: {"type": "integer", "minimum": low, "maximum": low + 9}
        ),
        st.just({"type": "string", "maxLength": 5}),
        st.just({"type": "string", "pattern": "^[a-c]{1,3}$"}),
    )
    names = st.text("abc_名", min_size=1, max_size=4)

    def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        properties = st.dictionaries(names, inner, max_size=3)
        return st.one_of(
            properties.flatmap(
                lambda p: st.sets(st.sampled_from(sorted(p))) if p else st.just(set[str]())
                ).flatmap(lambda required: properties.map(
                    lambda p: {"type": "object", "properties": p,
                               "required": sorted(required & set(p)),
                               "additionalProperties": False})),
            inner.map(lambda items: {"type": "array", "items": items, "maxItems": 3}),
            st.lists(inner, min_size=1, max_size=2).map(lambda some: {"anyOf": some}),
        )  # fmt: skip

    return st.recursive(leaves, nested, max_leaves=6)


@settings(max_examples=150, deadline=None)
@given(schema=schemas(), seed=st.integers(0, 1000))
def test_json_of_a_schema_validates(
    compiler: GrammarCompiler, tokenizer: ChatTokenizer, schema: dict[str, Any], seed: int
) -> None:
    text = walk(compiler.json_schema(schema), tokenizer, random.Random(seed))
    jsonschema.validate(json.loads(text), schema)


def test_white_space_is_bounded(compiler: GrammarCompiler, tokenizer: ChatTokenizer) -> None:
    grammar = compiler.json_schema({"type": "object"})
    assert accepts(grammar, tokenizer, '{"a": [1, 2]}')
    assert not accepts(grammar, tokenizer, '{"a":  1}')
    assert not accepts(grammar, tokenizer, '{ "a": 1}')
    assert not accepts(grammar, tokenizer, '{"a": 1}\n')


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "strng"}, "strng"),
        ({"not": {"type": "null"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "http://example.com/schema"}, "example.com"),
        ({"type": "string", "pattern": "("}, "("),
        ({"properties": 3}, ""),
    ],
)
def test_a_schema_that_cannot_be_guaranteed_is_refused(
    compiler: GrammarCompiler, schema: dict[str, Any], word: str
) -> None:
    with pytest.raises(GrammarError) as caught:
        compiler.json_schema(schema)
    assert word in str(caught.value) and str(caught.value)


def test_a_schema_that_is_too_complex_fails_during_generation(
    compiler: GrammarCompiler, tokenizer: ChatTokenizer
) -> None:
    state = compiler.json_schema(TOO_COMPLEX).begin()
    [opening] = [i for i, data in enumerate(tokenizer.token_bytes) if data == b"{"]
    assert opening in allowed_ids(state.allowed(), tokenizer.vocab_size)
    with pytest.raises(FormatTooComplexError, match="2200 items"):
        state.accept(opening)


def test_two_completions_of_one_grammar_are_independent(
    compiler: GrammarCompiler, tokenizer: ChatTokenizer
) -> None:
    grammar = compiler.json_schema({"enum": ["left", "right"]})
    one, other = grammar.begin(), grammar.begin()
    before = other.allowed()
    one.accept(tokenizer.encode_text('"')[0])
    assert other.allowed() == before != one.allowed()


# --- calls of tools -------------------------------------------------------------------

CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京", "days": 3}}\n</tool_call>'
)
TIME = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "is_required", "is_parallel", "fits"),
    [
        (CALL, True, True, True),
        (CALL, False, False, True),
        (f"{CALL}\n{TIME}", True, True, True),
        (f"{CALL}\n{TIME}", True, False, False),
        (f"{CALL}\n{TIME}", False, True, True),
        (f"{CALL}\n{TIME}", False, False, False),
        ("Hello!", True, True, False),
        ("Hello!", False, True, True),
        ("", False, True, True),
        ("a < b <tool", False, True, True),
        (f"Let me look.\n{CALL}", False, True, True),
        (f"Let me look.\n{CALL}", True, True, False),
        ("<tool_call>hello", False, True, False),
        (f"{CALL} and more", False, True, False),
        (CALL.replace("get_weather", "get_time"), False, True, False),
        (CALL.replace("city", "town"), True, True, False),
    ],
)
def test_calls_have_exactly_the_form_that_is_parsed(
    compiler: GrammarCompiler, tokenizer: ChatTokenizer,
    text: str, is_required: bool, is_parallel: bool, fits: bool,
) -> None:  # fmt: skip
    grammar = compiler.tool_calls(
        [WEATHER, CLOCK], is_required=is_required, is_parallel=is_parallel
    )
    assert accepts(grammar, tokenizer, text) == fits


BARE = '{"name": "get_weather", "arguments": {"city": "北京", "days": 3}\n}'
BARE_TIME = '{\n    "name": "clock",\n    "arguments": {}\n}'


@pytest.mark.parametrize(
    ("text", "is_parallel", "fits"),
    [
        (BARE, False, True),
        (BARE_TIME, False, True),
        (f"Sure: {BARE}", False, True),
        (f"```json\n{BARE}\n```", False, True),
        (f"```\n{BARE}\n```", False, True),
        (f"[{BARE}\n]", False, True),
        (f"{BARE}\n{BARE_TIME}", True, True),
        (f"{BARE}\n{BARE_TIME}", False, False),
        (f"```json\n[\n  {BARE},\n  {BARE_TIME}\n]\n```", True, True),
        (f"```json\n{BARE}\n```\n\n```json\n{BARE_TIME}\n```", True, True),
        (f"{BARE} and more", True, False),
        (BARE.replace("city", "town"), True, False),
        # Text, unless it names a tool.
        (BARE.replace("get_weather", "get_time"), True, True),
        ('{"name": "Bob", "age": 3}', True, True),
        ('{"name": "get_weather", "input": {}}', True, True),
    ],
)
def test_json_that_names_a_tool_is_a_call_where_any_text_is_allowed(
    compiler: GrammarCompiler, tokenizer: ChatTokenizer, text: str, is_parallel: bool, fits: bool
) -> None:
    output = OutputFormat(tools=[WEATHER, CLOCK], is_parallel=is_parallel)
    grammar = compiler.compile(output)
    assert grammar is not None
    assert accepts(grammar, tokenizer, text) == fits
    if not fits:
        return
    # `Answer` finds calls exactly where the grammar has some.
    answer = Answer(output.call_opening)
    answer.add(text)
    answer.end()
    called = re.findall('"name": "(get_weather|clock)",\\s+"arguments"', text)
    assert [call.name for call in answer.calls] == called
    assert answer.text == (text if not called else "Sure: " if "Sure: " in text else "")
    for call in answer.calls:
        [tool] = [tool for tool in (WEATHER, CLOCK) if tool.name == call.name]
        jsonschema.validate(json.loads(call.arguments), tool.parameters)


@pytest.mark.parametrize("is_required", [False, True])
def test_where_the_answer_is_json_or_a_call_calls_have_their_tags(
    compiler: GrammarCompiler, tokenizer: ChatTokenizer, is_required: bool
) -> None:
    schema = None if is_required else {"type": "object"}
    output = OutputFormat(schema, [CLOCK], is_required)
    grammar = compiler.compile(output)
    assert grammar is not None
    quoted = '{"name": "clock", "arguments": {}}'
    assert accepts(grammar, tokenizer, quoted) != is_required
    answer = Answer(output.call_opening)
    assert [answer.add(quoted), answer.end()] == [[TextDelta(quoted)], []]


def test_many_tools_may_be_called_without_tags(
    compiler: GrammarCompiler, tokenizer: ChatTokenizer
) -> None:
    tools = [Tool(f"tool-{i}", CLOCK.parameters) for i in range(128)]
    grammar = compiler.compile(OutputFormat(tools=tools))
    assert grammar is not None
    for name, fits in [("tool-1", True), ("tool-127", True), ("tool-128", False)]:
        text = f'{{"name": "{name}", "arguments": {{}}\n}} and more'
        assert accepts(grammar, tokenizer, text) != fits


@pytest.mark.parametrize(
    ("text", "fits"), [(CALL, True), ('{"a": 1}', True), ("Hello!", False), ("{}", False)]
)
def test_an_answer_in_place_of_calls_fits_its_schema(
    compiler: GrammarCompiler, tokenizer: ChatTokenizer, text: str, fits: bool
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    grammar = compiler.tool_calls([WEATHER], is_required=False, is_parallel=True, answer=schema)
    assert accepts(grammar, tokenizer, text) == fits


@pytest.mark.parametrize("seed", range(20))
def test_required_calls_are_read_back_and_fit_their_schema(
    compiler: GrammarCompiler, tokenizer: ChatTokenizer, seed: int
) -> None:
    grammar = compiler.tool_calls([WEATHER, CLOCK], is_required=True, is_parallel=True)
    text = walk(grammar, tokenizer, random.Random(seed))
    answer = Answer(OutputFormat(tools=[WEATHER, CLOCK], is_call_required=True).call_opening)
    for char in text:
        answer.add(char)
    assert not answer.end() and not answer.text
    [call] = answer.calls
    [tool] = [tool for tool in (WEATHER, CLOCK) if tool.name == call.name]
    jsonschema.validate(json.loads(call.arguments), tool.parameters)


def test_an_added_token_that_is_not_special_is_text_to_a_grammar() -> None:
    bundled = Qwen2Tokenizer.from_pretrained(BUNDLED_FOLDER)
    assert isinstance(bundled, PreTrainedTokenizerFast)
    bundled.add_tokens(["<tool_call>", "</tool_call>"], special_tokens=False)
    tokenizer = ChatTokenizer(bundled)
    compiler = GrammarCompiler(tokenizer, [tokenizer.marker_id("<|im_end|>")])
    grammar = compiler.tool_calls([CLOCK], is_required=True, is_parallel=False)
    ids = tokenizer.encode_own_text(TIME)
    assert tokenizer.marker_id("<tool_call>") == ids[0] != tokenizer.encode_text(TIME)[0]
    state = grammar.begin()
    for token_id in ids:
        assert token_id in allowed_ids(state.allowed(), tokenizer.vocab_size)
        state.accept(token_id)
    # A special one is none, whatever a schema says.
    quoting = compiler.json_schema({"const": "<|im_end|></tool_call>"})
    assert walk(quoting, tokenizer, random.Random(0)) == '"<|im_end|></tool_call>"'


def test_a_tool_with_parameters_that_cannot_be_guaranteed_is_named(
    compiler: GrammarCompiler,
) -> None:
    tool = Tool("odd_one", {"type": "object", "properties": {"a": {"not": {}}}})
    with pytest.raises(GrammarError, match="odd_one"):
        compiler.tool_calls([WEATHER, tool], is_required=True, is_parallel=True)


# --- formats --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "fitting", "wrong"),
    [
        (OutputFormat(schema={"const": 1}), "1", "2"),
        (OutputFormat(tools=[CLOCK]), "Hello!", f"{TIME} and more"),
        (OutputFormat(tools=[CLOCK], is_call_required=True), TIME, "Hello!"),
        (OutputFormat(tools=[CLOCK], is_parallel=False), TIME, f"{TIME}\n{TIME}"),
        (OutputFormat(tools=[CLOCK], schema={"const": 1}), "1", "Hello!"),
    ],
)
def test_every_part_of_a_format_counts(
    compiler: GrammarCompiler, tokenizer: ChatTokenizer,
    output: OutputFormat, fitting: str, wrong: str,
) -> None:  # fmt: skip
    grammar = compiler.compile(output)
    assert grammar is not None
    assert accepts(grammar, tokenizer, fitting) and not accepts(grammar, tokenizer, wrong)


def test_where_any_text_is_allowed_there_is_no_grammar(compiler: GrammarCompiler) -> None:
    assert compiler.compile(OutputFormat()) is None


# --- what is kept ---------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts of all grammars that are compiled from here on."""
    texts: list[str] = []

    class Spy:
        grammar_from_lark = staticmethod(LLMatcher.grammar_from_lark)
        grammar_from_json_schema = staticmethod(LLMatcher.grammar_from_json_schema)

        def __call__(self, tokenizer: Any, text: str, **options: Any) -> LLMatcher:
            texts.append(text)
            return LLMatcher(tokenizer, text, **options)

    monkeypatch.setattr(grammar_module, "LLMatcher", Spy())
    return texts


def copy_of(compiler: GrammarCompiler) -> GrammarCompiler:
    """A compiler that has compiled nothing yet."""
    fresh = GrammarCompiler(compiler._chat_tokenizer, compiler._eos_token_ids)
    fresh.__dict__["_tokenizer"] = compiler._tokenizer  # takes seconds to make
    return fresh


@pytest.fixture
def forgetful(compiler: GrammarCompiler) -> GrammarCompiler:
    return copy_of(compiler)


def test_the_same_tools_are_compiled_once(
    forgetful: GrammarCompiler, tokenizer: ChatTokenizer, compiled: list[str]
) -> None:
    first = forgetful.compile(OutputFormat(tools=[WEATHER, CLOCK]))
    # Equal, but not the same objects: as the next request brings them.
    again = forgetful.compile(OutputFormat(tools=copy.deepcopy([WEATHER, CLOCK])))
    assert first is again and len(compiled) == 1
    forgetful.compile(OutputFormat(tools=[CLOCK]))
    forgetful.compile(OutputFormat(tools=[WEATHER, CLOCK], is_parallel=False))
    assert len(compiled) == 3
    # Using a grammar does not change it.
    assert first is not None
    for _ in range(2):
        assert accepts(first, tokenizer, TIME)


def test_the_most_recently_used_grammars_are_cached(
    forgetful: GrammarCompiler, compiled: list[str]
) -> None:
    for number in [*range(MAX_KEPT), 0, MAX_KEPT, 0]:
        forgetful.json_schema({"const": number})
    assert len(compiled) == MAX_KEPT + 1
    forgetful.json_schema({"const": 1})
    assert len(compiled) == MAX_KEPT + 2


def test_a_grammar_that_is_very_long_is_not_cached(
    compiler: GrammarCompiler, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "MAX_KEPT_CHARS", 1000)
    forgetful = copy_of(compiler)
    for schema in [{"const": "a" * 1000}, {"const": "a"}] * 2:
        forgetful.json_schema(schema)
    assert len(compiled) == 3


def test_a_grammar_that_fails_is_not_cached(
    forgetful: GrammarCompiler, compiled: list[str]
) -> None:
    for _ in range(2):
        with pytest.raises(GrammarError):
            forgetful.json_schema({"not": {}})
    assert len(compiled) == 2
    assert not forgetful._cache


def test_threads_may_compile_at_once(forgetful: GrammarCompiler) -> None:
    with ThreadPoolExecutor(8) as pool:
        schemas = [{"const": number % 5} for number in range(200)]
        grammars = list(pool.map(forgetful.json_schema, schemas))
    assert len(forgetful._cache) == 5
    assert len({id(grammar) for grammar in grammars[100:]}) == 5


def test_forced_text_keeps_its_unicode_form(
    compiler: GrammarCompiler, tokenizer: ChatTokenizer
) -> None:
    word = "cafe\u0301"  # not composed
    state, written = compiler.json_schema({"const": word}).begin(), b""
    end = tokenizer.marker_id("<|im_end|>")
    while end not in (ids := allowed_ids(state.allowed(), tokenizer.vocab_size)):
        state.accept(ids[0])
        written += tokenizer.token_bytes[ids[0]]
    assert json.loads(written) == word


# --- pieces of a text -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "is_allowed"),
    [
        (["耳机"], True),
        (["耳机", "sounds great"], True),
        (["耳机", "耳机"], True),  # the reader of the lines drops repeats
        (["机"], False),  # half a word
        (["耳机的音质，"], False),
        (["音质sounds"], False),
        (["great"], True),
        (["gre"], False),
        (["sounds great for 2.5"], False),  # four words
        (["great for 2.5"], True),
        (["😄"], False),
        (["手机"], False),
        (["耳机", "音质", "great"], False),  # one too many
        ([], False),
    ],
)
def test_pieces_are_whole_words_of_the_text(
    compiler: GrammarCompiler, tokenizer: ChatTokenizer, lines: list[str], is_allowed: bool
) -> None:
    grammar = compiler.pieces("这款耳机的音质，sounds great for 2.5 euros😄", 2)
    assert grammar is not None
    text = "".join(f"{line}\n" for line in lines)
    assert follows(grammar, tokenizer, text) is is_allowed


def follows(grammar: Grammar, tokenizer: ChatTokenizer, text: str) -> bool:
    """Whether the grammar allows the text, and its end."""
    state = grammar.begin()
    for token_id in tokenizer.encode_own_text(text):
        if token_id not in allowed_ids(state.allowed(), tokenizer.vocab_size):
            return False
        state.accept(token_id)
    end = tokenizer.marker_id("<|im_end|>")
    return end in allowed_ids(state.allowed(), tokenizer.vocab_size)


def test_a_word_that_was_cut_is_not_joined_again(
    compiler: GrammarCompiler, tokenizer: ChatTokenizer
) -> None:
    grammar = compiler.pieces("w" * (MAX_WORD_CHARS + 1), 1)
    assert grammar is not None
    assert follows(grammar, tokenizer, "w" * MAX_WORD_CHARS + "\n")
    assert not follows(grammar, tokenizer, "w" * (MAX_WORD_CHARS + 1) + "\n")


def test_a_text_without_letters_has_no_pieces(compiler: GrammarCompiler) -> None:
    assert compiler.pieces("……😄 !", 5) is None
