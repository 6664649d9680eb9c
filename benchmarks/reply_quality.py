"""How good the second role's answers are: what goes wrong in them, and what small tasks it solves.

Counts are made by rules that anybody can read here; they do not replace reading the answers.
"""

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from server.core.engine.sequence import SamplingParams
from server.core.roles.language import language_of
from server.core.roles.reply import Replier
from server.core.roles.tasks import Task
from server.core.text.tools import Tool
from server.protocol.messages import ChatMessage
from server.services import Services

DATA = Path(__file__).parent / "data"
SEEDS = (1, 2, 3)
MAX_TOKENS = 96
CONCURRENCY = 16
# How alike an opener and the beginning of its answer may be.
ALIKE = 0.75

_NO_LETTERS = re.compile(r"[\W_]+")
_SENTENCE_END = re.compile(r"[。！？!?\n]|\.\s")
# I and you are exchanged where a model says after a user.
_PERSONS = re.compile(r"[我你您]|\b(i|you|my|your|me|am|are|i'm|you're)\b", re.IGNORECASE)
_REFUSALS = re.compile(
    "|".join(
        (
            r"作为(一个|一名|一款)?(人工智能|AI|语言模型|聊天机器人|智能)",
            r"我(只)?是(一个|一款|一名)?(人工智能|AI|语言模型)",
            r"我(无法|不能|没有办法)(提供|帮助|回答|进行|访问|获取|协助|执行|直接|实时|为您|为你|理解)",
            r"没有(个人)?(情感|感情|感受)",
            r"\bas an? (AI|artificial|language)",
            r"\bI('m| am) (just |only )?an? (AI|artificial|language model|computer)",
            r"\bI( can't| cannot| can not|( am|'m) (not able|unable) to)",
            r"\bI('m| am) sorry,? but I",
            r"\bI don't have (personal|feelings|emotions|access|the ability)",
        )
    ),
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Opener:
    """What somebody may say first, and in which mood."""

    text: str
    lang: str
    mood: str


@dataclass(frozen=True)
class Ability:
    """A small task. Regular expressions check its answer: some must be found, some must not."""

    name: str
    kind: str
    lang: str
    messages: list[dict[str, Any]]
    expect: list[str]
    reject: list[str]

    def is_solved_by(self, answer: str) -> bool:
        """Whether every expected expression is found in the answer, and no rejected one."""
        flags = re.IGNORECASE | re.DOTALL
        return all(re.search(each, answer, flags) for each in self.expect) and not any(
            re.search(each, answer, flags) for each in self.reject
        )


@dataclass(frozen=True)
class Answer:
    """One answer, the label it was given under, and the seed."""

    text: str
    label: str | None
    seed: int


def read_openers(path: Path = DATA / "openers.jsonl") -> list[Opener]:
    """The project's own openers, none of which any training saw."""
    return [Opener(**row) for row in read_rows(path)]


def read_abilities(path: Path = DATA / "abilities.jsonl") -> list[Ability]:
    """The project's own small tasks."""
    return [Ability(**row) for row in read_rows(path)]


async def answers(
    services: Services, conversations: Sequence[Sequence[dict[str, Any]]], *,
    with_sentiment: bool, seeds: Sequence[int] = SEEDS, replier: Replier | None = None,
) -> list[list[Answer]]:  # fmt: skip
    """The answers to each conversation, one for each seed, sampled as a client gets them."""
    gate = asyncio.Semaphore(CONCURRENCY)

    async def answer(messages: Sequence[dict[str, Any]], seed: int) -> Answer:
        params = sampling_params(services, seed)
        said = [ChatMessage.model_validate(message).for_template() for message in messages]
        async with gate:
            reply = await (replier or services.replier).reply(
                said, params, (), with_sentiment=with_sentiment, tools=_tools_of(said)
            )
            [pieces] = await reply.read()
        label = reply.sentiment.label.value if reply.sentiment else None
        return Answer("".join(piece.text for piece in pieces), label, seed)

    groups = (asyncio.gather(*(answer(m, seed) for seed in seeds)) for m in conversations)
    return await asyncio.gather(*groups)


def _tools_of(messages: Sequence[dict[str, Any]]) -> list[Tool]:
    """The tools that were called, as the client that called them would offer them again."""
    return [
        Tool(
            call["function"]["name"],
            {
                "type": "object",
                "properties": {key: {"type": "string"} for key in call["function"]["arguments"]},
            },
        )
        for message in messages
        for call in message.get("tool_calls", ())
    ]


def sampling_params(services: Services, seed: int) -> SamplingParams:
    """As of a request that gives nothing but a seed, at most so many tokens long."""
    defaults = services.defaults
    return SamplingParams(
        max_tokens=MAX_TOKENS,
        temperature=defaults.temperature,
        top_p=defaults.top_p,
        top_k=defaults.top_k,
        repetition_penalty=defaults.repetition_penalty,
        seed=seed,
        stop_token_ids=defaults.eos_token_ids,
    )


def is_in_wrong_language(opener: Opener, answer: str) -> bool:
    return language_of(answer) != opener.lang


def repeats(opener: Opener, answer: str) -> bool:
    """Whether the answer's beginning says again what the user said."""
    said, begin = _bare(opener.text), _bare(_SENTENCE_END.split(answer.strip(), maxsplit=1)[0])
    if not said or not begin:
        return not begin
    return SequenceMatcher(None, said, begin, autojunk=False).ratio() >= ALIKE


def leaks(task: Task, answer: str) -> bool:
    """Whether the answer quotes a cue, or names a label as such: alone, in quotes, as a value.

    The words themselves do not count: "stay positive" is something to say.
    """
    words = "|".join(re.escape(x) for label in task.labels for x in (label.value, label.text))
    cues = [_bare(cue) for label in task.labels for cue in (label.cue or {}).values()]
    if any(cue in _bare(answer) for cue in cues):
        return True
    return bool(
        re.fullmatch(rf"\W*({words})\W*", answer, re.IGNORECASE)
        or re.search(rf"[“\"'‘「]({words})[”\"'’」]", answer, re.IGNORECASE)
        or re.search(
            r"(心情|情绪|情感|mood|sentiment|emotion) *(是|为|is)? *[:：]", answer, re.IGNORECASE
        )
    )


def refuses(answer: str) -> bool:
    """Whether the answer says what an AI is not, or cannot do."""
    return _REFUSALS.search(answer) is not None


def shares(
    task: Task, openers: Sequence[Opener], all_answers: Sequence[Sequence[Answer]]
) -> dict[str, float]:
    """Shares of answers that are in the wrong language, repeat, leak, refuse; and mean length."""
    pairs = [(o, a.text) for o, group in zip(openers, all_answers, strict=True) for a in group]
    counts = {
        "wrong language": [is_in_wrong_language(o, a) for o, a in pairs],
        "repeats": [repeats(o, a) for o, a in pairs],
        "leaks": [leaks(task, a) for _, a in pairs],
        "refuses": [refuses(a) for _, a in pairs],
    }
    return {
        "answers": len(pairs),
        **{name: round(sum(each) / len(each), 4) for name, each in counts.items()},
        "characters": round(sum(len(a) for _, a in pairs) / len(pairs), 1),
    }


def solved(
    abilities: Sequence[Ability], all_answers: Sequence[Sequence[Answer]]
) -> dict[str, float]:
    """Share of answers that solve their task: in all, by kind and by language."""
    groups: dict[str, list[bool]] = {}
    for ability, group in zip(abilities, all_answers, strict=True):
        for answer in group:
            for name in ("all", ability.kind, ability.lang):
                groups.setdefault(name, []).append(ability.is_solved_by(answer.text))
    return {name: round(sum(each) / len(each), 4) for name, each in groups.items()}


def _bare(text: str) -> str:
    """Without punctuation, and without the words for I and you."""
    return _NO_LETTERS.sub("", _PERSONS.sub("", text)).lower()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
