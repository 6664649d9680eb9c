"""Pieces of text from token bytes, for any boundaries between the tokens."""

import itertools
from collections.abc import Iterator, Sequence

import pytest
import regex

from server.core.text.detokenizer import Detokenizer


def every_split(data: bytes) -> Iterator[list[bytes]]:
    """All ways to cut the bytes into tokens: 2 ** (len - 1) of them."""
    for cuts in itertools.product((False, True), repeat=len(data) - 1):
        borders = [0, *(i for i, is_cut in enumerate(cuts, 1) if is_cut), len(data)]
        yield [data[begin:end] for begin, end in itertools.pairwise(borders)]


def read(tokens: Sequence[bytes], stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    """The results of every push and, unless it stopped, of the flush; and whether it stopped."""
    detokenizer = Detokenizer(tokens, stop)
    pieces = [detokenizer.push(token_id) for token_id in range(len(tokens))]
    pieces.append("" if detokenizer.is_stopped else detokenizer.flush())
    return pieces, detokenizer.is_stopped


# --- stop strings ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abSTOPcd", ["STOP"], "ab"),
        ("STOPabcd", ["STOP"], ""),
        ("abcdSTOP", ["STOP"], "abcd"),
        ("STOP", ["STOP"], ""),
        ("aXbXc", ["X"], "a"),
        ("one\n\ntwo", ["\n\n"], "one"),
        # The stop string begins again inside its own beginning.
        ("aaaab", ["aab"], "aa"),
        ("abababc", ["ababc"], "ab"),
        ("SSTSTOP!", ["STOP"], "SST"),
        # Chinese: three bytes a character.
        ("你好。再", ["。"], "你好"),
        ("你好再", ["好再"], "你"),
        ("好好再", ["好再"], "好"),
        # 你 and 佡 share their first two bytes, and so do 好 and 女.
        ("佡女你", ["你"], "佡女"),
        # Emoji: four bytes a character; both begin with the same three.
        ("a😀b", ["😀"], "a"),
        ("😁😀b", ["😀b"], "😁"),
        ("é😀", ["😀"], "é"),
        # Several at once: the first in the text counts, whatever their order in the list.
        ("a12b34", ["34", "12"], "a"),
        ("a34b12", ["34", "12"], "a"),
        ("xabcdx", ["abc", "ab"], "x"),
        ("xabcdx", ["bcd", "cd"], "xa"),
        ("xabcdx", ["abc", "bcd"], "x"),
        ("xabd", ["abc", "bd"], "xa"),
        ("好x😀", ["😀", "x"], "好"),
    ],
)
def test_a_stop_string_ends_the_text_for_any_token_boundaries(
    text: str, stop: list[str], expected: str
) -> None:
    for tokens in every_split(text.encode()):
        pieces, is_stopped = read(tokens, stop)
        assert is_stopped, tokens
        assert "".join(pieces) == expected, tokens


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("abST", ["STOP"]),
        ("abSTO!", ["STOP"]),
        ("STSTSTO", ["STOP"]),
        ("stop", ["STOP"]),
        ("你好再", ["再见"]),
        ("a😀", ["😀😀"]),
        ("😁😂", ["😀"]),
        ("abcab", ["abd", "cb", "abca!"]),
        ("one\ntwo", ["\n\n"]),
    ],
)
def test_text_that_only_resembles_a_stop_string_comes_whole(text: str, stop: list[str]) -> None:
    for tokens in every_split(text.encode()):
        pieces, is_stopped = read(tokens, stop)
        assert not is_stopped, tokens
        assert "".join(pieces) == text, tokens


@pytest.mark.parametrize("stop", [["abcd", "bc"], ["bc", "abcd"], ["再见吗", "见"]])
def test_the_text_is_the_same_for_all_boundaries_if_one_stop_string_contains_another(
    stop: list[str],
) -> None:
    text = "x" + max(stop, key=len)
    texts = {"".join(read(tokens, stop)[0]) for tokens in every_split(text.encode())}
    assert len(texts) == 1, texts


def test_no_piece_contains_the_beginning_of_a_stop_string() -> None:
    for tokens in every_split("ab😀STOP".encode()):
        given = ""
        for piece in read(tokens, ["😀STOP"])[0]:
            given += piece
            assert "ab".startswith(given), tokens


def test_text_is_held_back_only_as_long_as_it_may_become_a_stop_string() -> None:
    tokens = [b"ab", b"S", b"T", b"x", b"S", b"OS"]
    pieces, _ = read(tokens, ["STOP"])
    assert pieces == ["ab", "", "", "STx", "", "SO", "S"]


def test_the_longest_possible_beginning_is_held_back_of_several_stop_strings() -> None:
    pieces, _ = read([b"xaab"], ["abc", "aabb", "b!"])
    assert pieces == ["x", "aab"]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("a<c>Xb", ["X"], "a<c>Xb"),
        ("aX<c>b", ["X"], "a"),
        ("<c>X<c>X", ["X"], "<c>X<c>X"),
        ("a<c>b", ["<c>b"], "a<c>b"),
        # What may become the text cuts it no more than what is part of it.
        ("a<c>b", ["<"], "a<c>b"),
        ("a<c>b", ["c"], "a<c>b"),
        ("a<c>b", ["c>"], "a<c>b"),
        ("a<d>b", ["<"], "a"),
        ("a<cd>b", ["c"], "a<"),
        ("<<c>X", ["<"], ""),
        ("a<c", ["X"], "a<c"),
        ("a<c", ["c"], "a<"),
        # Which begins first, where they overlap.
        ("a<c>b", ["a<"], ""),
        ("a<c>b", ["a<c>b"], "a<c>b"),
    ],
)
def test_stop_strings_count_only_before_the_pattern(
    text: str, stop: list[str], expected: str
) -> None:
    for tokens in every_split(text.encode()):
        detokenizer = Detokenizer(tokens, stop, stop_until=regex.compile("<c>"))
        pieces = [detokenizer.push(token_id) for token_id in range(len(tokens))]
        assert "".join(pieces) + detokenizer.flush() == expected, tokens
        assert detokenizer.is_stopped == (expected != text)


def test_nothing_comes_after_a_stop_string() -> None:
    detokenizer = Detokenizer([b"aXb", b"c"], ["X"])
    assert detokenizer.push(0) == "a"
    assert detokenizer.is_stopped
    assert detokenizer.push(1) == ""
    assert detokenizer.flush() == ""


def test_an_empty_stop_string_is_an_assertion_error() -> None:
    with pytest.raises(AssertionError):
        Detokenizer([b"a"], ["a", ""])


# --- characters -----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Hello", "你好吗", "a😀é", "👨‍👩", "\x00\n\ufeff!", "e\u0301x"])
def test_every_character_comes_at_once_when_its_last_byte_is_there(text: str) -> None:
    for tokens in every_split(text.encode()):
        pieces, _ = read(tokens)
        seen, given = b"", ""
        for token, piece in zip(tokens, pieces, strict=False):
            seen, given = seen + token, given + piece
            # What is not complete yet is ignored here, and so must it be there.
            assert given == seen.decode(errors="ignore"), tokens
        assert "".join(pieces) == text, tokens


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"a\xffb", id="a byte that no UTF-8 has"),
        pytest.param(b"\x80\xbfab", id="continuation bytes alone"),
        pytest.param(b"a\xe4\xbdb", id="a character cut short inside"),
        pytest.param(b"ab\xf0\x9f\x98", id="a character cut short at the end"),
        pytest.param(b"\xe4\xbd\xe4\xbd\xa0", id="a character cut short by itself"),
        pytest.param(b"a\xed\xa0\x80b", id="a surrogate"),
        pytest.param(b"a\xc0\xafb", id="an overlong slash"),
        pytest.param(b"a\xf4\x90\x80\x80b", id="beyond Unicode"),
        pytest.param(b"\xff\xfe\xf0\x9f\x98\x80\xf0", id="an emoji among rubbish"),
    ],
)
def test_bytes_that_are_not_utf_8_are_left_out(data: bytes) -> None:
    for tokens in every_split(data):
        pieces, _ = read(tokens)
        assert "".join(pieces) == data.decode(errors="ignore"), tokens
        assert "\ufffd" not in "".join(pieces)


def test_a_stop_string_is_found_across_left_out_bytes() -> None:
    for tokens in every_split(b"aS\xffT\xe4\xbdOPb"):
        pieces, is_stopped = read(tokens, ["STOP"])
        assert is_stopped and "".join(pieces) == "a", tokens


# --- flush ----------------------------------------------------------------------------


def test_flush_returns_what_was_held_back_once() -> None:
    detokenizer = Detokenizer([b"abST"], ["STOP"])
    assert detokenizer.push(0) == "ab"
    assert detokenizer.flush() == "ST"
    assert detokenizer.flush() == ""
    assert not detokenizer.is_stopped


def test_flush_returns_no_half_character() -> None:
    detokenizer = Detokenizer(["好".encode()[:2]])
    assert detokenizer.push(0) == ""
    assert detokenizer.flush() == ""


def test_a_token_without_bytes_has_no_effect() -> None:
    assert read(["好".encode()[:1], b"", "好".encode()[1:]])[0] == ["", "", "好", ""]


def test_an_untouched_detokenizer_flushes_nothing() -> None:
    assert read([]) == ([""], False)


def test_ids_are_looked_up_in_the_table() -> None:
    detokenizer = Detokenizer([b"a", b"b", b"c"])
    assert [detokenizer.push(token_id) for token_id in (2, 0, 2)] == ["c", "a", "c"]
