"""Compares the answers of vLLM behind this server with those of the local engine.

    python -m benchmarks.agreement --model DIR --engine http://HOST:PORT

Both answer 100 conversations at temperature 0, ten at a time, the local engine in `--dtype`. Both
judge moods by label scores minus the prior, because vLLM returns no hidden states. Without --engine
the local engine is compared with itself, answering one conversation at a time: this shows the
effect of the type alone. `make vllm` installs vLLM; start it with

    VLLM_CPU_KVCACHE_SPACE=2 benchmarks/cache/vllm/bin/vllm serve DIR \\
        --dtype bfloat16 --enforce-eager --max-model-len 4096 --port 8100

Prints in how many conversations labels, texts and both are equal, and, last, one line of JSON. The
gap at the first different token is the local engine's log-probability (nats) of its own token minus
that of the other's token. A bfloat16 logit of 16 to 32 has a step of 0.125.
"""

import argparse
import asyncio
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal

from benchmarks.reply_quality import sampling_params
from benchmarks.same_text import NUM_CONVERSATIONS, Conversation, conversations
from server.config import Settings
from server.core.engine.sequence import TokenEvent
from server.judge_loading import PriorLoader
from server.loading import assemble, find_model, load_engine, load_services
from server.protocol.messages import ChatMessage
from server.services import Services

SEED, MAX_TOKENS = 0, 24
NUM_TOGETHER = 10
# The first tokens of the texts are also compared.
BEGINNINGS = (4, 8, 16)


@dataclass(frozen=True)
class Answer:
    """The answer to a conversation, and its label."""

    label: str | None
    confidence: float
    tokens: tuple[TokenEvent, ...]

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    def num_shared(self, other: "Answer") -> int:
        """The number of tokens before the first difference."""
        pairs = zip(self.token_ids, other.token_ids, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def gap(self, other: "Answer") -> float | None:
        """At the first different token; None if there is none or a text ends there."""
        for own, theirs in zip(self.tokens, other.tokens, strict=False):
            if own.token_id != theirs.token_id:
                assert own.logprob is not None
                return own.logprob - dict(own.top_logprobs).get(theirs.token_id, -math.inf)
        return None


@dataclass(frozen=True)
class Side:
    """A server's services, and how many conversations they answer at a time."""

    services: Services
    num_together: int


@contextmanager
def own_engine(model: str, dtype: Literal["bfloat16", "float32"]) -> Iterator[Services]:
    """The local engine, without heads."""
    settings = Settings(model=model, dtype=dtype)
    loaded = find_model(settings)
    engine, _ = load_engine(loaded, settings)
    try:
        judges = PriorLoader(engine, loaded.tokenizer, max_context=loaded.max_context)
        judges.load(loaded.chat_tasks)
        yield assemble(loaded, settings, engine, judges)
    finally:
        engine.close()


@contextmanager
def other_side(own: Services, model: str, engine: str | None) -> Iterator[Side]:
    if engine is None:
        yield Side(own, 1)
        return
    services = load_services(Settings(model=model, engine=engine))
    try:
        yield Side(services, NUM_TOGETHER)
    finally:
        services.engine.close()


async def answer(services: Services, messages: Conversation, max_tokens: int) -> Answer:
    conversation = [ChatMessage.model_validate(message).for_template() for message in messages]
    params = replace(
        sampling_params(services, SEED), temperature=0.0, max_tokens=max_tokens, num_logprobs=20
    )
    reply = await services.replier.reply(conversation, params, (), with_sentiment=True)
    [pieces] = await reply.read()
    sentiment = reply.sentiment
    return Answer(
        label=sentiment.label.value if sentiment else None,
        confidence=sentiment.confidence if sentiment else 0.0,
        tokens=tuple(token for piece in pieces for token in piece.tokens),
    )


def is_same(a: Answer, b: Answer, num_tokens: int | None = None) -> bool:
    """num_tokens: compares only the first tokens; None: all."""
    return a.label == b.label and a.token_ids[:num_tokens] == b.token_ids[:num_tokens]


def text_of(side: Side, answer: Answer) -> str:
    return side.services.tokenizer.decode(answer.token_ids)


async def answer_group(side: Side, group: Sequence[Conversation], max_tokens: int) -> list[Answer]:
    answers: list[Answer] = []
    for begin in range(0, len(group), side.num_together):
        together = group[begin : begin + side.num_together]
        answers += await asyncio.gather(
            *(answer(side.services, each, max_tokens) for each in together)
        )
    return answers


async def answer_all(
    sides: Sequence[Side], all_messages: Sequence[Conversation], max_tokens: int
) -> list[tuple[Answer, Answer]]:
    """Answers with both sides in turn, group by group."""
    pairs: list[tuple[Answer, Answer]] = []
    for begin in range(0, len(all_messages), NUM_TOGETHER):
        group = all_messages[begin : begin + NUM_TOGETHER]
        own, other = [await answer_group(side, group, max_tokens) for side in sides]
        for a, b in zip(own, other, strict=True):
            pairs.append((a, b))
            if not is_same(a, b):
                lines = [
                    [each.label, round(each.confidence, 3), text_of(sides[0], each)]
                    for each in (a, b)
                ]
                print(f"{len(pairs):3} gap {a.gap(b)}", *lines, sep="\n    ", flush=True)
        num_same = sum(is_same(a, b) for a, b in pairs)
        print(f"{len(pairs)} of {len(all_messages)}, {num_same} the same", file=sys.stderr)
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="as the server's own option")
    parser.add_argument("--engine", help="as the server's own option; default: the local engine")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--num", type=int, default=NUM_CONVERSATIONS, help="conversations")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="per answer")
    args = parser.parse_args()
    chosen = conversations()[: args.num]
    with (
        own_engine(args.model, args.dtype) as own,
        other_side(own, args.model, args.engine) as other,
    ):
        sides = (Side(own, NUM_TOGETHER), other)
        pairs = asyncio.run(answer_all(sides, chosen, args.max_tokens))
    gaps = [gap for a, b in pairs if a.label == b.label and (gap := a.gap(b)) is not None]
    result = {
        "conversations": len(pairs),
        "tokens at most": args.max_tokens,
        "same label": sum(a.label == b.label for a, b in pairs),
        "same text": sum(a.token_ids == b.token_ids for a, b in pairs),
        "same label and text": sum(is_same(a, b) for a, b in pairs),
        **{
            f"same label and {number} tokens": sum(is_same(a, b, number) for a, b in pairs)
            for number in BEGINNINGS
        },
        "largest difference of confidence": max(abs(a.confidence - b.confidence) for a, b in pairs),
        "same label, different texts": len(gaps),
        "median gap": statistics.median(gaps) if gaps else 0.0,
        "largest gap": max(gaps, default=0.0),
        "tokens before the first difference": sum(a.num_shared(b) for a, b in pairs),
    }
    for name, number in result.items():
        print(f"{name:34} {number:.4g}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
