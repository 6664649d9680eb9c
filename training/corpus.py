"""Reads the training corpus and the project's own openers."""

import gzip
import itertools
import json
import random
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.similar import measured_lines

OWN_DATA = Path(__file__).parent / "data"
# How often a template is filled; equal texts are kept once.
FILLINGS = 20


@dataclass(frozen=True)
class SentimentRow:
    text: str
    label: str
    lang: str
    source: str


@dataclass(frozen=True)
class ReplyRow:
    user: str
    reply: str
    lang: str
    source: str
    persona: str | None = None
    label: str | None = None


def read_sentiment(path: Path) -> list[SentimentRow]:
    """Labelled texts of a gzipped JSON Lines file."""
    return [SentimentRow(r["text"], r["label"], r["lang"], r["source"]) for r in _read(path)]


def read_replies(path: Path) -> list[ReplyRow]:
    """Pairs of a user's line and a reply from a gzipped JSON Lines file."""
    return [
        ReplyRow(r["user"], r["reply"], r["lang"], r["source"], r.get("persona"))
        for r in _read(path)
    ]


def read_openers(folder: Path = OWN_DATA) -> list[ReplyRow]:
    """The project's own openers: every phrasing of a group with every reply of it.

    Leaves out phrasings similar to a line of the test data.
    """
    measured = measured_lines()
    paths = sorted(folder.glob("openers_*.jsonl"))
    return [r for path in paths for r in read_pairs(path) if not measured.has_near(r.user)]


def read_pairs(path: Path) -> list[ReplyRow]:
    """Every phrasing of a group with every reply of it."""
    groups = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [
        ReplyRow(user, reply, group["lang"], "openers", "caring", group["label"])
        for group in groups
        for user in group["users"]
        for reply in group["replies"]
    ]


def read_templates(folder: Path = OWN_DATA) -> list[ReplyRow]:
    """Pairs from templates, whose line and reply name the same thing.

    Leaves out lines similar to a line of the test data.
    """
    rng, measured = random.Random(0), measured_lines()
    rows = set()
    for path in sorted(folder.glob("templates*.toml")):
        for lang, section in tomllib.loads(path.read_text(encoding="utf-8")).items():
            rows |= set(_filled(lang, section, rng))
    return sorted(
        (r for r in rows if not measured.has_near(r.user)), key=lambda r: (r.user, r.reply)
    )


def _filled(lang: str, section: dict[str, Any], rng: random.Random) -> Iterator[ReplyRow]:
    """Every line of a group with every reply, with random values in their slots."""
    for group in section["pairs"]:
        for user, reply in itertools.product(group["users"], group["replies"]):
            names = sorted(set(re.findall(r"\{(\w+)\}", user + reply)))
            for _ in range(FILLINGS):
                filling = {name: rng.choice(section["slots"][name]) for name in names}
                yield ReplyRow(
                    user.format(**filling), _sentence(reply.format(**filling)), lang,
                    "templates", "caring", group["label"],
                )  # fmt: skip


def _sentence(text: str) -> str:
    return re.sub(r"(?:^|(?<=[.!?] ))[a-z]", lambda first: first[0].upper(), text)


def read_own_texts(folder: Path = OWN_DATA) -> list[SentimentRow]:
    """The project's own texts: templates with random values in their slots."""
    rng = random.Random(0)
    rows = set()
    for lang, section in tomllib.loads((folder / "texts.toml").read_text(encoding="utf-8")).items():
        slots = section.pop("slots")
        for label, templates in section.items():
            for template in templates * FILLINGS:
                parts = re.split(r"\{(\w+)\}", template)
                parts[1::2] = [rng.choice(slots[name]) for name in parts[1::2]]
                rows.add(SentimentRow("".join(parts), label, lang, "own"))
    return sorted(rows, key=lambda row: row.text)


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
