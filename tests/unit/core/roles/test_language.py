"""The language of an answer: the documented rule, script by script."""

import pytest

from server.core.roles.language import CHINESE, ENGLISH, language_of


@pytest.mark.parametrize(
    "text",
    [
        "你好",
        "好",
        "今天玩得真开心！😄",
        "  你好\n",
        "會議改到週三下午三點",  # traditional characters
        "㐀",  # of extension A
        "\U00020000\U0002a700",  # of extensions B and C
        "\uf900",  # a compatibility ideograph
    ],
)
def test_han_is_chinese(text: str) -> None:
    assert language_of(text) == CHINESE


@pytest.mark.parametrize(
    "text",
    ["Hello", "I love this song!", "hello 123 😄", "ＨＥＬＬＯ", "naïve café"],
)
def test_latin_is_english(text: str) -> None:
    assert language_of(text) == ENGLISH


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param(" \n\t\u3000", id="white space"),
        pytest.param("😄😄", id="emoji"),
        pytest.param("👍🏽👨‍👩‍👧❤️", id="joined emoji"),
        pytest.param("12345", id="digits"),
        pytest.param("3.14 + 2 = 5.14", id="a sum"),
        pytest.param("１２３", id="wide digits"),
        pytest.param("？！……", id="punctuation"),
        pytest.param("，。《》「」", id="Chinese punctuation alone"),
        pytest.param("_", id="an underline"),
        pytest.param(":-)", id="a smiley"),
    ],
)
def test_a_text_without_words_is_english(text: str) -> None:
    assert language_of(text) == ENGLISH


@pytest.mark.parametrize(
    "text",
    [
        "Привет, как дела?",
        "مرحبا كيف حالك",
        "γειά σου",
        "สวัสดีครับ",
        "नमस्ते",
        "Grüß Gott, schönes Wetter heute",
    ],
)
def test_every_other_script_is_english(text: str) -> None:
    assert language_of(text) == ENGLISH


@pytest.mark.parametrize(
    "text",
    [
        "こんにちは",
        "ありがとうございます",
        "コーヒー",
        "今日は楽しかった",
        "日本語を勉強しています",
        "明日の会議は何時からですか？",
    ],
)
def test_japanese_with_han_is_english(text: str) -> None:
    assert language_of(text) == ENGLISH


@pytest.mark.parametrize(
    "text", ["안녕하세요", "오늘 정말 행복해요", "大韓民國의 主權은 國民에게 있다"]
)
def test_korean_is_english(text: str) -> None:
    # The last has more Han than Hangul, but Hangul enough.
    assert language_of(text) == ENGLISH


@pytest.mark.parametrize(
    ("text", "language"),
    [
        # At most half as many kana or Hangul as Han.
        ("我喜欢の这", CHINESE),
        ("好吃の", CHINESE),
        ("好の", ENGLISH),
        ("好吃のの", ENGLISH),
        ("我在首尔学会了说사랑해", CHINESE),
    ],
)
def test_a_few_kana_or_hangul_leave_a_text_chinese(text: str, language: str) -> None:
    assert language_of(text) == language


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("我买了iPhone", CHINESE),
        ("今天的meeting取消了", CHINESE),
        ("请把 I would like to have a cup of coffee 翻译成中文", CHINESE),
        # Twice as many words as characters, and one more.
        ("好 one two", CHINESE),
        ("好 one two three", ENGLISH),
        ("哈哈 lol lol lol lol", CHINESE),
        ("哈哈 lol lol lol lol lol", ENGLISH),
    ],
)
def test_a_text_that_begins_with_han_is_chinese_up_to_twice_as_many_words(
    text: str, language: str
) -> None:
    assert language_of(text) == language


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("iPhone屏幕碎了", CHINESE),
        ("OK好的呀", CHINESE),
        ("hello是什么意思？", CHINESE),
        ("What does 人山人海 mean?", ENGLISH),
        ("I live in 北京", ENGLISH),
        # Twice as many characters as words, and one more.
        ("one 好的", ENGLISH),
        ("one 好的呀", CHINESE),
        ("one two 好的好的", ENGLISH),
        ("one two 好的好的呀", CHINESE),
        ("привет 你好", ENGLISH),
        ("привет是什么意思", CHINESE),
    ],
)
def test_a_text_that_begins_with_a_word_is_chinese_from_more_than_twice_as_many_han_on(
    text: str, language: str
) -> None:
    assert language_of(text) == language


@pytest.mark.parametrize(
    "text", ["5个苹果 for me and you", "😄 好的 so so", "“你好” to you all", "_1_ 好 so so"]
)
def test_digits_emoji_and_signs_do_not_count_as_the_beginning(text: str) -> None:
    # Begun with a word, each of them would be English.
    assert language_of(text) == CHINESE
    assert language_of(f"a {text}") == ENGLISH


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("He said “你好” to me and left.", ENGLISH),
        ("How do I write 谢谢你 by hand?", ENGLISH),
        ("“Carpe diem”这句话到底是什么意思？", CHINESE),
        ("他对我说：“I love you”", CHINESE),
        ("老师写的评语是“well done, keep going”，我好开心", CHINESE),
    ],
)
def test_a_quote_in_the_other_language_does_not_decide(text: str, language: str) -> None:
    assert language_of(text) == language


@pytest.mark.parametrize(
    "text",
    [
        "def double(x): return 2 * x",
        "SELECT name FROM users WHERE age > 3;",
        "print('你好')",
        "for row in rows:\n    total += row.price  # 总价",
        '<a href="https://example.org">关于</a>',
    ],
)
def test_code_is_english_even_with_a_little_chinese_in_it(text: str) -> None:
    assert language_of(text) == ENGLISH


def test_code_with_a_question_in_chinese_before_it_is_chinese() -> None:
    assert language_of("这段代码为什么报错？\nfor row in rows:\n    print(row)") == CHINESE
