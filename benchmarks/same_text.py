"""Checks that a seed gives the same text, however a request is computed.

    python -m benchmarks.same_text --model DIR

Answers each of 100 conversations six times, with the checkpoint's default sampling and one seed:

- cold: without a prefix cache, so the whole prompt is computed;
- new: for the first time, alone, with a prefix cache;
- new, among others: for the first time, in parallel with eight others;
- again: with prompt and label cached;
- in pieces: the same, read as a stream;
- among others: the same, in parallel with eight others.

Prints for how many conversations all texts are equal, and, last, one line of JSON.
"""

import argparse
import asyncio
import json
import operator
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from benchmarks.reply_quality import (
    CONCURRENCY,
    read_abilities,
    read_openers,
    sampling_params,
)
from server.config import Settings
from server.loading import load_services
from server.protocol.messages import ChatMessage
from server.services import Services

NUM_CONVERSATIONS = 100
NUM_OTHERS = 8
SEED = 7
MAX_TOKENS = 48

Conversation = Sequence[dict[str, Any]]


def conversations() -> list[Conversation]:
    """Openers, then small tasks with a history."""
    openers: list[Conversation] = [
        [{"role": "user", "content": opener.text}] for opener in read_openers()
    ]
    return [*openers, *(ability.messages for ability in read_abilities())][:NUM_CONVERSATIONS]


async def answer(services: Services, messages: Conversation, *, in_pieces: bool = False) -> str:
    conversation = [ChatMessage.model_validate(message).for_template() for message in messages]
    params = replace(sampling_params(services, SEED), max_tokens=MAX_TOKENS)
    reply = await services.replier.reply(conversation, params, (), with_sentiment=True)
    if not in_pieces:
        [pieces] = await reply.read()
        return "".join(piece.text for piece in pieces)
    return "".join([piece.text async for _, piece in reply.pieces() if piece is not None])


async def answer_all(
    services: Services, all_messages: Sequence[Conversation], num_together: int = 1,
    *, in_pieces: bool = False,
) -> list[str]:  # fmt: skip
    """Answers every conversation once, `num_together` in parallel."""
    texts: list[str] = []
    for begin in range(0, len(all_messages), num_together):
        group = all_messages[begin : begin + num_together]
        answers = (answer(services, each, in_pieces=in_pieces) for each in group)
        texts += await asyncio.gather(*answers)
        print(f"\r{len(texts)} of {len(all_messages)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return texts


async def answer_cached(
    services: Services, all_messages: Sequence[Conversation]
) -> dict[str, list[str]]:
    """The texts of a server that has answered all conversations before."""
    return {
        "again": await answer_all(services, all_messages),
        "in pieces": await answer_all(services, all_messages, in_pieces=True),
        "among others": await answer_all(services, all_messages, 1 + NUM_OTHERS),
    }


def measure(settings: Settings, all_messages: Sequence[Conversation]) -> dict[str, list[str]]:
    """The texts of all conversations for each way to compute them."""
    texts: dict[str, list[str]] = {}
    with running(settings.model_copy(update={"max_prefix_mib": 0})) as services:
        texts["cold"] = asyncio.run(answer_all(services, all_messages))
    with running(settings) as services:
        texts["new, among others"] = asyncio.run(answer_all(services, all_messages, 1 + NUM_OTHERS))
    with running(settings) as services:
        texts["new"] = asyncio.run(answer_all(services, all_messages))
        texts |= asyncio.run(answer_cached(services, all_messages))
    return texts


@contextmanager
def running(settings: Settings) -> Iterator[Services]:
    services = load_services(settings)
    try:
        yield services
    finally:
        services.engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="auto", help="as the server's own option")
    parser.add_argument("--dtype", default="auto", help="as the server's own option")
    parser.add_argument("--num", type=int, default=NUM_CONVERSATIONS, help="conversations")
    args = parser.parse_args()
    settings = Settings(model=args.model, dtype=args.dtype, max_num_seqs=CONCURRENCY)
    texts = measure(settings, conversations()[: args.num])
    result: dict[str, Any] = {
        "conversations": len(texts["cold"]),
        "tokens at most": MAX_TOKENS,
        "same text each time": sum(len({*each}) == 1 for each in zip(*texts.values(), strict=True)),
    }
    for name, each in texts.items():
        result[f"as cold: {name}"] = sum(map(operator.eq, texts["cold"], each))
    for name, number in result.items():
        print(f"{name:28} {number}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
