"""Words and sentences: what they are, and that they are pieces of the text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.core.text.spans import MAX_WORD_CHARS, Span, sentences, words


def parts(text: str, spans: list[Span]) -> list[str]:
    return [span.of(text) for span in spans]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("这款耳机的音质很好。", ["这", "款", "耳机", "的", "音质", "很", "好"]),
        ("It's 2.5 times e-mail, R&D!", ["It's", "2.5", "times", "e-mail", "R&D"]),
        ("iPhone15屏幕碎了😭😭", ["iPhone15", "屏幕", "碎", "了", "😭😭"]),
        ("cafe\u0301 naïve Привет 안녕", ["cafe\u0301", "naïve", "Привет", "안녕"]),
        ("👨‍👩‍👧 ok", ["👨‍👩‍👧", "ok"]),
        ("\x00…！？、 \t", []),
        ("", []),
    ],
)
def test_words_are_those_a_reader_sees(text: str, expected: list[str]) -> None:
    assert parts(text, words(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("不错。但是服务太差了！！还来吗？", ["不错。", "但是服务太差了！！", "还来吗？"]),
        ("他说：“今天真好。”我也这么想。", ["他说：“今天真好。”", "我也这么想。"]),
        ('Dr. Lee paid $3.50. "Great!" she said.', ["Dr. Lee paid $3.50.", '"Great!" she said.']),
        ("  一行 \r\n\n两行", ["一行", "两行"]),
        ("😀好。𠀀坏。", ["😀好。", "𠀀坏。"]),
        ("好！😄 坏。😡😡", ["好！😄", "坏。😡😡"]),
        ("没有标点", ["没有标点"]),
        (" \n", []),
    ],
)  # fmt: skip
def test_sentences_end_where_a_reader_ends_them(text: str, expected: list[str]) -> None:
    assert parts(text, sentences(text, "zh")) == expected
    assert parts(text, sentences(text, "en")) == expected


@given(st.text())
def test_sentences_leave_out_only_white_space(text: str) -> None:
    end = 0
    for span in sentences(text, "en"):
        assert not text[end : span.offset].strip()
        assert span.of(text) == span.of(text).strip() != ""
        end = span.end
    assert not text[end:].strip()


@given(st.text())
def test_words_are_in_order_and_bounded(text: str) -> None:
    end = 0
    for span in words(text):
        assert span.offset >= end
        assert span.length > 0
        assert not any(map(str.isspace, span.of(text)))
        end = span.end
    assert end <= len(text)


def test_a_very_long_word_is_cut() -> None:
    assert [span.length for span in words("a" * 70)] == [MAX_WORD_CHARS, MAX_WORD_CHARS, 6]
