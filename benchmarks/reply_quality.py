"""The quality of the answers: errors in them, and small tasks solved.

The counts are made by the rules below; they do not replace reading the answers.
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
# An answer whose beginning is at least this similar to the opener repeats it.
MIN_SIMILARITY = 0.75

_NO_LETTERS = re.compile(r"[\W_]+")
_SENTENCE_END = re.compile(r"[。！？!?\n]|\.\s")
# A model that repeats a user exchanges "I" and "you".
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
    """The first message of a conversation, and its mood."""

    text: str
    lang: str
    mood: str


@dataclass(frozen=True)
class Ability:
    """A small task. expect, reject: regular expressions that must match, or not, in the answer."""

    name: str
    kind: str
    lang: str
    messages: list[dict[str, Any]]
    expect: list[str]
    reject: list[str]

    def is_solved_by(self, answer: str) -> bool:
        """Whether all of `expect` and none of `reject` match in the answer."""
        flags = re.IGNORECASE | re.DOTALL
        return all(re.search(each, answer, flags) for each in self.expect) and not any(
            re.search(each, answer, flags) for each in self.reject
        )


@dataclass(frozen=True)
class Answer:
    """An answer, the label of the user's message, and the seed."""

    text: str
    label: str | None
    seed: int


def read_openers(path: Path = DATA / "openers.jsonl") -> list[Opener]:
    """The project's own openers, which are not in the training data."""
    return [Opener(**row) for row in read_rows(path)]


def read_abilities(path: Path = DATA / "abilities.jsonl") -> list[Ability]:
    """The project's own small tasks."""
    return [Ability(**row) for row in read_rows(path)]


async def answers(
    services: Services, conversations: Sequence[Sequence[dict[str, Any]]], *,
    with_sentiment: bool, seeds: Sequence[int] = SEEDS, replier: Replier | None = None,
) -> list[list[Answer]]:  # fmt: skip
    """The answers to each conversation, one per seed, sampled as for a client."""
    semaphore = asyncio.Semaphore(CONCURRENCY)

    async def answer(messages: Sequence[dict[str, Any]], seed: int) -> Answer:
        params = sampling_params(services, seed)
        conversation = [ChatMessage.model_validate(message).for_template() for message in messages]
        tools = _tools_of(conversation)
        async with semaphore:
            reply = await (replier or services.replier).reply(
                conversation, params, (), with_sentiment=with_sentiment, tools=tools
            )
            [pieces] = await reply.read()
        label = reply.sentiment.label.value if reply.sentiment else None
        return Answer("".join(piece.text for piece in pieces), label, seed)

    groups = (asyncio.gather(*(answer(m, seed) for seed in seeds)) for m in conversations)
    return await asyncio.gather(*groups)


def _tools_of(messages: Sequence[dict[str, Any]]) -> list[Tool]:
    """The tools called in the messages, as the client would send them again."""
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
    """The parameters of a request with only a seed, and at most MAX_TOKENS tokens."""
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
    """Whether the answer begins by repeating the user's message."""
    text, begin = _bare(opener.text), _bare(_SENTENCE_END.split(answer.strip(), maxsplit=1)[0])
    if not text or not begin:
        return not begin
    return SequenceMatcher(None, text, begin, autojunk=False).ratio() >= MIN_SIMILARITY


def leaks(task: Task, answer: str) -> bool:
    """Whether the answer quotes a cue, or a label alone, in quotes or as a value.

    A label's word within a sentence does not count, as in "stay positive".
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
    """Whether the answer is a refusal, such as "as an AI …" or "I cannot …"."""
    return _REFUSALS.search(answer) is not None


def shares(
    task: Task, openers: Sequence[Opener], all_answers: Sequence[Sequence[Answer]]
) -> dict[str, float]:
    """Shares of answers in the wrong language, that repeat, leak or refuse; and the mean length."""
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
    """Share of answers that solve their task: overall, by kind and by language."""
    groups: dict[str, list[bool]] = {}
    for ability, group in zip(abilities, all_answers, strict=True):
        for answer in group:
            for name in ("all", ability.kind, ability.lang):
                groups.setdefault(name, []).append(ability.is_solved_by(answer.text))
    return {name: round(sum(each) / len(each), 4) for name, each in groups.items()}


def _bare(text: str) -> str:
    """The text without punctuation and without words for "I" and "you"."""
    return _NO_LETTERS.sub("", _PERSONS.sub("", text)).lower()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
