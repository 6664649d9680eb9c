"""Whether a seed gives the same text, however a request is computed.

    python -m benchmarks.same_text --model DIR

Each of 100 conversations is answered with the checkpoint's default sampling and one seed: for the
first time, alone; again, with its prompt and label known; read in pieces; and among eight others.
Prints how many conversations got one and the same text each time, and, last, one line of JSON.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
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
from server.protocol.messages import Message
from server.services import Services

NUM_CONVERSATIONS = 100
NUM_OTHERS = 8
SEED = 7
MAX_TOKENS = 48

Conversation = Sequence[dict[str, Any]]


def conversations() -> list[Conversation]:
    """Openers, then small tasks with a history."""
    openers = [[{"role": "user", "content": opener.text}] for opener in read_openers()]
    return [*openers, *(ability.messages for ability in read_abilities())][:NUM_CONVERSATIONS]


async def answer(services: Services, messages: Conversation, *, in_pieces: bool = False) -> str:
    said = [Message.model_validate(message).for_template() for message in messages]
    params = replace(sampling_params(services, SEED), max_tokens=MAX_TOKENS)
    reply = await services.replier.reply(said, params, (), with_sentiment=True)
    if not in_pieces:
        [pieces] = await reply.read()
        return "".join(piece.text for piece in pieces)
    return "".join([piece.text async for _, piece in reply.pieces() if piece is not None])


async def among_others(services: Services, all_messages: Sequence[Conversation], i: int) -> str:
    others = [all_messages[(i + j) % len(all_messages)] for j in range(1, NUM_OTHERS + 1)]
    texts = await asyncio.gather(*(answer(services, each) for each in [all_messages[i], *others]))
    return texts[0]


async def measure(services: Services, all_messages: Sequence[Conversation]) -> list[list[str]]:
    """For each conversation its texts: the first, again, in pieces, among others."""
    texts = []
    for i, messages in enumerate(all_messages):
        texts.append(
            [
                await answer(services, messages),
                await answer(services, messages),
                await answer(services, messages, in_pieces=True),
                await among_others(services, all_messages, i),
            ]
        )
        print(f"\r{i + 1} of {len(all_messages)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="auto", help="as the server's own option")
    parser.add_argument("--dtype", default="auto", help="as the server's own option")
    parser.add_argument("--num", type=int, default=NUM_CONVERSATIONS, help="of conversations")
    args = parser.parse_args()
    settings = Settings(model=args.model, dtype=args.dtype, max_num_seqs=CONCURRENCY)
    services = load_services(settings)
    try:
        texts = asyncio.run(measure(services, conversations()[: args.num]))
    finally:
        services.engine.close()
    names = ("again", "in pieces", "among others")
    result: dict[str, Any] = {
        "conversations": len(texts),
        "tokens at most": MAX_TOKENS,
        "same text each time": sum(len(set(each)) == 1 for each in texts),
        **{f"as the first: {name}": sum(each[0] == each[i] for each in texts)
           for i, name in enumerate(names, start=1)},
    }  # fmt: skip
    for name, number in result.items():
        print(f"{name:24} {number}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
