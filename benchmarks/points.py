"""Checks answers by rules: their tone, their topic, and whether they admit ignorance.

The openers are the project's own and are not in the training data. The rules are coarse: an answer
is "to the point" if it contains a word of the topic.
"""

import asyncio
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reply_quality import DATA, Answer, read_rows
from server.core.roles.reply import with_cue
from server.core.roles.tasks import text_in
from server.core.text.tokenizer import Message
from server.services import Services

CELEBRATES, COMFORTS = "celebrates", "comforts"
CONCURRENCY = 8

_TONES = {
    CELEBRATES: (
        r"恭喜|祝贺|太好了|太棒了|真棒|好棒|可喜可贺|好消息|替你(高兴|开心)"
        r"|为你(们)?(感到)?(高兴|开心|骄傲)|真让人高兴|沾沾喜气|好幸福|真幸福|太厉害|真厉害",
        r"\bcongrat|\bhooray|\byay\b|well done|good for you|(great|good|wonderful|amazing) news"
        r"|(so|very|really|truly) (happy|glad|pleased|proud) (for|of|to hear)|happy for you"
        r"|proud of you|how (wonderful|lovely|exciting|sweet|delightful|delicious|nice|fun|cute)\b"
        r"|that('s| is| sounds) (so |really |just |absolutely )?"
        r"(great|wonderful|fantastic|awesome|amazing|lovely|exciting|brilliant)\b"
        r"|glad to hear|what a (joy|treat|win|wonderful|lovely|great|beautiful|precious)",
    ),
    COMFORTS: (
        r"遗憾|难过|心疼|抱抱|节哀|委屈|难受|糟心|太糟|真倒霉|心烦|想哭|憋屈|扎心|可惜|灰心|煎熬|失落"
        r"|沮丧|心酸|揪心|别太自责|不好受|听到这个.{0,4}抱歉|很抱歉听",
        r"\bsorry (to|that|you|for|about)\b|\bI'm (so |really |very )?sorry\."
        r"|condolence|hang in there|must (hurt|sting|be (hard|tough|awful|painful|so hard))"
        r"|(that|it)('s| is| sounds| must be| must feel) (so |really |very |incredibly )?"
        r"(hard|tough|rough|awful|terrible|painful|frustrating|disappointing|exhausting|stressful"
        r"|upsetting|unfair|heavy|scary|lonely|miserable|heartbreaking|annoying)\b|heartbreaking"
        r"|what a (shame|pity|letdown|awful|terrible|horrible)",
    ),
}  # fmt: skip
_ADMITS = re.compile(
    r"不知道|不清楚|没法|无法|没办法|没有办法|查不到|查不了|看不到|看不见|听不到|猜不[出到准]|说不[准好]|不了解"
    r"|不太懂|不懂|不会算|算不[准好]|不擅长|做不到|办不到|帮不[了上]|不能(帮|替|联网|上网|直接|保证|预测)"
    r"|预测不了|订不了|放不了|打不了|播不了|没有.{0,6}(功能|能力|本事)|以.{1,12}为准|拿不准|难住我"
    r"|\b(can't|cannot|can not|couldn't|don't know|do not know|no idea|not sure|unable|not able"
    r"|no way|wouldn't know|won't be able|beyond me|not good (at|with)|only (chat|talk)|no access"
    r"|wish I could"
    r"|I don't have|I have no|I'm not (the|a) )",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Opener:
    """The first message of a conversation.

    never: tones that an answer must not have.
    topic: regular expression that matches in an answer to the point.
    admits: whether an answer should admit that it cannot know or do something.
    truth: regular expression that matches in the correct answer, which is also accepted then.
    """

    text: str
    lang: str
    mood: str
    never: list[str]
    topic: str
    admits: bool = False
    truth: str = "(?!)"


def read_openers(path: Path = DATA / "points.jsonl") -> list[Opener]:
    """The project's own openers with their topics."""
    return [Opener(**row) for row in read_rows(path)]


def read_pairs(path: Path = DATA / "pairs.jsonl") -> list[dict[str, Any]]:
    """Groups of `users` and `replies` with `label` and `lang`, not in the training data."""
    return read_rows(path)


def tones(answer: str) -> set[str]:
    """The tones of the answer: celebrating, comforting, both or none."""
    return {
        tone for tone, rules in _TONES.items()
        if any(re.search(rule, answer, re.IGNORECASE) for rule in rules)
    }  # fmt: skip


def has_right_tone(opener: Opener, answer: str) -> bool:
    return not tones(answer) & set(opener.never)


def is_to_the_point(opener: Opener, answer: str) -> bool:
    return re.search(opener.topic, answer, re.IGNORECASE) is not None


def admits(opener: Opener, answer: str) -> bool:
    """Whether the answer says that it does not know or cannot do it, or is correct."""
    return _ADMITS.search(answer) is not None or re.search(opener.truth, answer) is not None


def shares(openers: Sequence[Opener], all_answers: Sequence[Sequence[Answer]]) -> dict[str, float]:
    """Shares of answers with the right tone, to the point, and, if they should, admitting."""
    pairs = [(o, a.text) for o, group in zip(openers, all_answers, strict=True) for a in group]
    result: dict[str, float] = {"answers": len(pairs)}
    for name, rule in (("tone agrees", has_right_tone), ("to the point", is_to_the_point)):
        for lang in ("", "zh", "en"):
            hits = [rule(o, a) for o, a in pairs if not lang or o.lang == lang]
            result[f"{name} {lang}".strip()] = _share(hits)
    result["admits"] = _share([admits(o, a) for o, a in pairs if o.admits])
    return result


def _share(hits: Sequence[bool]) -> float:
    return round(sum(hits) / max(1, len(hits)), 4)


async def pair_loss(services: Services) -> dict[str, float]:
    """Log-loss (nats per token) of held-out replies, given the cue of their true label.

    Figures are comparable between models with the same tokenizer.
    """
    task = services.tasks["sentiment"]
    semaphore = asyncio.Semaphore(CONCURRENCY)
    labels = {label.value: label for label in task.labels}
    persona, position = services.replier.style.persona, services.replier.style.cue_position

    async def score(group: dict[str, Any], user: str, reply: str) -> tuple[str, float, int]:
        cue = labels[group["label"]].cue or {}
        messages: list[Message] = [
            {"role": "system", "content": text_in(persona, group["lang"])},
            {"role": "user", "content": user},
        ]
        if cue:
            messages = with_cue(messages, text_in(cue, group["lang"]), position)
        ids = services.tokenizer.encode_text(reply)
        prompt_ids = services.tokenizer.encode_chat(messages)
        async with semaphore:
            scores = await services.engine.score(prompt_ids, [ids])
        return group["lang"], scores.logprobs[0], len(ids)

    results = await asyncio.gather(
        *(score(g, user, reply) for g in read_pairs() for user in g["users"][:2]
          for reply in g["replies"])
    )  # fmt: skip
    losses = {}
    for lang in ("", "zh", "en"):
        chosen = [(p, n) for each, p, n in results if not lang or each == lang]
        loss = -sum(p for p, _ in chosen) / max(1, sum(n for _, n in chosen))
        losses[f"log-loss {lang}".strip()] = round(loss, 4) if math.isfinite(loss) else math.inf
    return {"pairs": len(results), **losses}
