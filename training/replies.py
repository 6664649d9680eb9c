"""Chooses replies that answer to the point, and makes more of the project's own."""

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

# What a counsellor says who knows the user from earlier sessions.
_SESSION = re.compile("咨询|来访|您|心理师|治疗|量表|上次|我们一起探讨|评估|疗法|医生")
# A piece that stands in more than this share of the replies tells no topic.
COMMON = 0.004
# How sure the teacher must be of a reply's mood for the pair to be left out.
SURE = 0.6
MAX_SUPPORT = 60  # characters
SWAPPED = 3  # pairs made of one by exchanging words, at most
# A word as such in English; in Chinese any place will do.
_WORD = {"zh": "{}", "en": r"\b{}\b"}


def reply_kind(row: ReplyRow) -> str | None:
    """Of what kind a row of the corpus is, or None if its tone is not wanted."""
    if row.source in ("openers", "templates"):
        return row.source
    if row.source == "ms_chitchat":
        return row.persona if row.persona in ("caring", "friendly") else None
    if row.source == "empathy_reddit":
        return "empathy"
    is_short = len(row.reply) <= MAX_SUPPORT and len(row.user) <= MAX_SUPPORT
    return "support" if is_short and not _SESSION.search(row.user + row.reply) else None


def wanted(rows: Sequence[ReplyRow]) -> list[ReplyRow]:
    """Rows of a wanted kind whose user's line is not near what measures."""
    measured = measured_lines()
    return [row for row in rows if reply_kind(row) and not measured.has_near(row.user)]


def shared(rows: Sequence[ReplyRow]) -> list[int]:
    """How many telling pieces each reply shares with the user's line."""
    numbers = [0] * len(rows)
    for lang in ("zh", "en"):
        of_replies = [pieces(row.reply) if row.lang == lang else frozenset() for row in rows]
        counts = Counter(piece for own in of_replies for piece in own)
        limit = COMMON * sum(row.lang == lang for row in rows)
        telling = {piece for piece, count in counts.items() if count <= limit}
        for i, (row, own) in enumerate(zip(rows, of_replies, strict=True)):
            if row.lang == lang:
                numbers[i] = len(own & telling & pieces(row.user))
    return numbers


def to_the_point(rows: Sequence[ReplyRow], teacher: Teacher) -> list[ReplyRow]:
    """Labelled rows of the corpus without those that speak past the user or in the wrong tone.

    Chit-chat answers what kind of line it is rather than its words, so of it only the tone counts.
    """
    numbers = shared(rows)
    moods = _judged([row.reply for row in rows], [row.lang for row in rows], teacher)
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
    """The same rows with the sentiment of the user's line: the known one, or the teacher's."""
    known = {row.text: row.label for row in texts}
    judged = _judged([row.user for row in replies], [row.lang for row in replies], teacher)
    return [
        replace(row, label=known.get(row.user, teacher.values[i]))
        for row, i in zip(replies, judged.argmax(-1).tolist(), strict=True)
    ]


def _judged(texts: Sequence[str], langs: Sequence[str], teacher: Teacher) -> Probabilities:
    result = np.zeros((len(texts), len(teacher.values)), dtype=np.float32)
    for lang in sorted(set(langs)):
        chosen = np.array([other == lang for other in langs])
        result[chosen] = teacher.judge(
            [t for t, o in zip(texts, langs, strict=True) if o == lang], lang
        )
    return result


def swapped(
    rows: Sequence[ReplyRow], rng: random.Random, folder: Path = OWN_DATA
) -> list[ReplyRow]:
    """More rows: a word of a line exchanged for another of its list, in the reply, too."""
    measured: Lines = measured_lines()
    lists = tomllib.loads((folder / "swaps.toml").read_text(encoding="utf-8"))
    having = {
        lang: re.compile(
            "|".join(_WORD[lang].format(w) for group in groups.values() for w in group)
        )
        for lang, groups in lists.items()
    }
    group_of = {
        lang: {word: group for group in groups.values() for word in group}
        for lang, groups in lists.items()
    }
    made: dict[ReplyRow, None] = {}
    for row in rows:
        for _ in range(SWAPPED):
            words = set(having[row.lang].findall(row.user))
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
                made[new] = None
    return list(made)


def by_kind(rows: Sequence[ReplyRow]) -> dict[tuple[str, str], list[ReplyRow]]:
    groups: dict[tuple[str, str], list[ReplyRow]] = defaultdict(list)
    for row in rows:
        groups[str(reply_kind(row)), row.lang].append(row)
    return groups
