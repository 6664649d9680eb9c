"""Which language a text is answered in, told from its script."""

import re

CHINESE, ENGLISH = "zh", "en"
LANGUAGES = (CHINESE, ENGLISH)
# More would hold up the event loop, and change nothing.
MAX_CHARACTERS = 10_000

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
# Kana and Hangul: a text with many of them is Japanese or Korean, whatever Han it has.
_KANA_OR_HANGUL = re.compile(r"[\u3040-\u30ff\uac00-\ud7af]")
_WORD = re.compile(r"[^\W\d_]+")


def language_of(text: str) -> str:
    """Gives "zh" for Chinese, "en" for everything else: other scripts, code, numbers, emoji alone.

    In a mixed text every Han character counts, and every word in another script. A text that
    begins with Han is Chinese unless it has more than twice as many words; one that begins with
    a word is Chinese only if it has more than twice as many Han characters. So "iPhone屏幕碎了" is
    Chinese, and "What does 人山人海 mean?" is English. Of a long text the beginning decides.
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
