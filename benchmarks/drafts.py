"""Tokens per second of one stream with and without drafts from the text before it.

    python -m benchmarks.drafts --model DIR

There are three kinds of conversation: *chat* (openers.jsonl), *copy* (repeat a paragraph with one
change) and *JSON* (write records as JSON). Each round answers the conversations of a kind one by
one, with drafts and then without. Both must give the same texts. Prints tokens per second, and the
median ratio of the rounds.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.reply_quality import read_openers, sampling_params
from server.config import Settings
from server.loading import load_services
from server.protocol.messages import ChatMessage
from server.services import Services

NUM_CHATS = 12
SEED = 7
MAX_TOKENS = 160
PARAGRAPHS = (
    "The library opens at nine on weekdays. Readers may borrow six books for four weeks and renew "
    "them twice. Reference books stay in the reading room. The reading room closes at eight.",
    "小店每天早上八点开门，晚上九点关门。周三上午盘点，不营业。会员可以提前一天预订新鲜面包，"
    "预订以后请在中午以前来取。小店不接受退货，但是可以换货。",
)
RECORDS = (
    "Anna Berg, 31, Oslo, nurse; Ben Cole, 45, Leeds, driver; Cara Diaz, 28, Madrid, teacher; "
    "Dan Egger, 52, Graz, baker; Eva Falk, 39, Malmö, editor",
    "apples 12 kg 3.40; pears 7 kg 4.10; plums 20 kg 2.80; cherries 3 kg 9.90; grapes 9 kg 5.20",
)

Conversation = list[dict[str, Any]]


def conversations() -> dict[str, list[Conversation]]:
    copies = [
        "Repeat this text word for word, but write the first sentence in capital letters:\n\n"
        + paragraph
        for paragraph in PARAGRAPHS
    ]
    records = [
        "Write these records as a JSON list of objects with the same keys, no other text:\n\n"
        + each
        for each in RECORDS
    ]
    openers = [opener.text for opener in read_openers()[:NUM_CHATS]]
    kinds = {"chat": openers, "copy": copies, "JSON": records}
    return {
        kind: [[{"role": "user", "content": text}] for text in texts]
        for kind, texts in kinds.items()
    }


async def answer(services: Services, messages: Conversation) -> tuple[str, int]:
    """The text and its number of tokens."""
    conversation = [ChatMessage.model_validate(message).for_template() for message in messages]
    params = replace(sampling_params(services, SEED), max_tokens=MAX_TOKENS)
    reply = await services.replier.reply(conversation, params, (), with_sentiment=False)
    pieces = [piece async for _, piece in reply.pieces() if piece is not None]
    text = "".join(piece.text for piece in pieces)
    return text, len(services.tokenizer.encode_text(text))


async def speed(services: Services, kind: Sequence[Conversation]) -> tuple[float, list[str]]:
    """Tokens per second of all conversations, answered one by one, and the texts."""
    begin = time.perf_counter()
    answers = [await answer(services, messages) for messages in kind]
    seconds = time.perf_counter() - begin
    return sum(num_tokens for _, num_tokens in answers) / seconds, [text for text, _ in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="auto", help="as the server's own option")
    parser.add_argument("--dtype", default="auto", help="as the server's own option")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    settings = Settings(model=args.model, dtype=args.dtype)
    with_drafts = load_services(settings)
    without = load_services(settings.model_copy(update={"max_draft_tokens": 0}))
    result: dict[str, Any] = {}
    for kind, messages in conversations().items():
        rounds = []
        for number in range(args.rounds + 1):
            speed_with, texts = asyncio.run(speed(with_drafts, messages))
            speed_without, expected = asyncio.run(speed(without, messages))
            if texts != expected:
                raise SystemExit(f"{kind}: a text depends on the drafts")
            if number:  # the first round fills the prefix caches
                rounds.append((speed_with, speed_without))
        medians = [statistics.median(speeds) for speeds in zip(*rounds, strict=True)]
        ratio = statistics.median(a / b for a, b in rounds)
        result[kind] = {"with": medians[0], "without": medians[1], "ratio": ratio}
        print(
            f"{kind:5} {medians[0]:6.1f} tokens/s, without {medians[1]:6.1f}, ratio {ratio:.2f}",
            file=sys.stderr,
        )
    with_drafts.engine.close()
    without.engine.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
