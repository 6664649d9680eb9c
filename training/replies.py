"""Selects replies that are to the point, and augments the project's own pairs."""

import random
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from training.corpus import OWN_DATA, ReplyRow, SentimentRow
from training.similar import Lines, measured_lines, pieces
from training.teacher import Probabilities, Teacher

# Phrases of a counsellor in a series of sessions.
_SESSION = re.compile("咨询|来访|您|心理师|治疗|量表|上次|我们一起探讨|评估|疗法|医生")
# A piece in more than this share of the replies says nothing about the topic.
COMMON = 0.004
# A pair is left out if the teacher gives the opposite mood of the reply more than this probability.
SURE = 0.6
MAX_SUPPORT = 60  # characters
SWAPPED = 3  # new pairs made from one by swapping words, at most
# Patterns of a word: whole words in English, anywhere in Chinese.
_WORD = {"zh": "{}", "en": r"\b{}\b"}


def reply_kind(row: ReplyRow) -> str | None:
    """The kind of a row of the corpus, or None if its tone is not suitable."""
    if row.source in ("openers", "templates"):
        return row.source
    if row.source == "ms_chitchat":
        return row.persona if row.persona in ("caring", "friendly") else None
    if row.source == "empathy_reddit":
        return "empathy"
    is_short = len(row.reply) <= MAX_SUPPORT and len(row.user) <= MAX_SUPPORT
    return "support" if is_short and not _SESSION.search(row.user + row.reply) else None


def suitable_rows(rows: Sequence[ReplyRow]) -> list[ReplyRow]:
    """Rows of a suitable kind whose user's line is not similar to one of the test data."""
    measured = measured_lines()
    return [row for row in rows if reply_kind(row) and not measured.has_near(row.user)]


def shared(rows: Sequence[ReplyRow]) -> list[int]:
    """The number of topical pieces that each reply shares with the user's line."""
    numbers = [0] * len(rows)
    for lang in ("zh", "en"):
        reply_pieces = [pieces(row.reply) if row.lang == lang else frozenset() for row in rows]
        counts = Counter(piece for each in reply_pieces for piece in each)
        limit = COMMON * sum(row.lang == lang for row in rows)
        topical = {piece for piece, count in counts.items() if count <= limit}
        for i, (row, each) in enumerate(zip(rows, reply_pieces, strict=True)):
            if row.lang == lang:
                numbers[i] = len(each & topical & pieces(row.user))
    return numbers


def to_the_point(rows: Sequence[ReplyRow], teacher: Teacher) -> list[ReplyRow]:
    """The labelled rows whose reply is on the user's topic and has the right tone.

    Chit-chat replies to the kind of line rather than to its words, so only its tone is checked.
    """
    numbers = shared(rows)
    moods = _probabilities([row.reply for row in rows], [row.lang for row in rows], teacher)
    at = {value: i for i, value in enumerate(teacher.values)}
    kept = []
    for row, number, mood in zip(rows, numbers, moods, strict=True):
        opposite = {"positive": "negative", "negative": "positive"}.get(str(row.label))
        if opposite and mood[at[opposite]] > SURE:
            continue
        if number or reply_kind(row) not in ("support", "empathy"):
            kept.append(row)
    return kept


def label_replies(
    replies: Sequence[ReplyRow], texts: Sequence[SentimentRow], teacher: Teacher
) -> list[ReplyRow]:
    """The rows with the label of the user's line: the known one, or the teacher's."""
    known = {row.text: row.label for row in texts}
    users, langs = [row.user for row in replies], [row.lang for row in replies]
    labels = _probabilities(users, langs, teacher).argmax(-1)
    return [
        replace(row, label=known.get(row.user, teacher.values[i]))
        for row, i in zip(replies, labels.tolist(), strict=True)
    ]


def _probabilities(texts: Sequence[str], langs: Sequence[str], teacher: Teacher) -> Probabilities:
    """The teacher's label probabilities: (N, labels)."""
    result = np.zeros((len(texts), len(teacher.values)), dtype=np.float32)
    for lang in sorted(set(langs)):
        in_language = np.array([each == lang for each in langs])
        result[in_language] = teacher.judge(
            [text for text, each in zip(texts, langs, strict=True) if each == lang], lang
        )
    return result


def swapped(
    rows: Sequence[ReplyRow], rng: random.Random, folder: Path = OWN_DATA
) -> list[ReplyRow]:
    """New rows: words of a line replaced by others of their list, in the reply, too."""
    measured: Lines = measured_lines()
    lists = tomllib.loads((folder / "swaps.toml").read_text(encoding="utf-8"))
    patterns = {
        lang: re.compile(
            "|".join(_WORD[lang].format(w) for group in groups.values() for w in group)
        )
        for lang, groups in lists.items()
    }
    group_of = {
        lang: {word: group for group in groups.values() for word in group}
        for lang, groups in lists.items()
    }
    new_rows: dict[ReplyRow, None] = {}
    for row in rows:
        for _ in range(SWAPPED):
            words = set(patterns[row.lang].findall(row.user))
            if not words:
                break
            new = row
            for word in sorted(words):
                other = rng.choice(group_of[row.lang][word])
                pattern = re.compile(_WORD[row.lang].format(word))
                new = replace(
                    new, user=pattern.sub(other, new.user), reply=pattern.sub(other, new.reply)
                )
            if new.user != row.user and not measured.has_near(new.user):
                new_rows[new] = None
    return list(new_rows)


def by_kind(rows: Sequence[ReplyRow]) -> dict[tuple[str, str], list[ReplyRow]]:
    groups: dict[tuple[str, str], list[ReplyRow]] = defaultdict(list)
    for row in rows:
        groups[str(reply_kind(row)), row.lang].append(row)
    return groups
