"""Chooses the language of an answer by the script of the text."""

import re

CHINESE, ENGLISH = "zh", "en"
LANGUAGES = (CHINESE, ENGLISH)
# Only the beginning of a text is read: a longer one would block the event loop.
MAX_CHARACTERS = 10_000

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
# Kana and Hangul: a text with many of them is Japanese or Korean, even if it has Han characters.
_KANA_OR_HANGUL = re.compile(r"[\u3040-\u30ff\uac00-\ud7af]")
_WORD = re.compile(r"[^\W\d_]+")


def language_of(text: str) -> str:
    """Returns "zh" for Chinese, "en" for all else: other scripts, code, numbers, only emoji.

    In a mixed text, Han characters are compared with words of other scripts. A text that begins
    with Han is Chinese unless it has more than twice as many words. Any other text is Chinese
    only if it has more than twice as many Han characters. So "iPhone屏幕碎了" is Chinese, and
    "What does 人山人海 mean?" is English. Only the first MAX_CHARACTERS are read.
    """
    text = text[:MAX_CHARACTERS]
    num_han = len(_HAN.findall(text))
    if not num_han or 2 * len(_KANA_OR_HANGUL.findall(text)) > num_han:
        return ENGLISH
    num_words = len(_WORD.findall(_HAN.sub(" ", text)))
    first = _WORD.search(text)
    if first is not None and _HAN.match(first[0]):
        return CHINESE if num_words <= 2 * num_han else ENGLISH
    return CHINESE if num_han > 2 * num_words else ENGLISH
