"""What a client waits for: time to first token, tokens per second, texts per second, over HTTP.

Starts a server of its own, measures every case in turn for several rounds, and prints
minimum, median and maximum; ratios are taken round by round, because absolute numbers of a
shared machine are noisy. Prints a table for people and, last, one line of JSON.

    python -m benchmarks.latency --model mini --rounds 7
"""

import argparse
import asyncio
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from openai import AsyncOpenAI

NUM_STREAMS = 8
NUM_TEXTS = 64
MAX_TOKENS = 64
START = re.compile(r"Serving (\S+) on (http://\S+)")


@contextmanager
def server(model: str) -> Iterator[tuple[str, str]]:
    """Model id and base URL of a fresh server process."""
    command = [sys.executable, "-m", "server", "--port", "0", "--model", model]
    process = subprocess.Popen(
        [*command, "--log-level", "error"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := START.search(line):
                yield found[1], f"{found[2]}/v1"
                return
        raise RuntimeError("the server did not start")
    finally:
        process.terminate()
        process.wait()


class Cases:
    """Each method is one measurement; texts never repeat unless that is the point."""

    def __init__(self, client: AsyncOpenAI, model: str) -> None:
        self._client, self._model = client, model
        self._numbers = itertools.count()

    def _fresh_text(self) -> str:
        return (
            f"今天的第{next(self._numbers)}件事终于做完了，可是我一点也高兴不起来，只想早点回家。"
        )

    async def _ttft_ms(self, text: str, **options: object) -> float:
        begin = time.perf_counter()
        stream = await self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": text}],
            max_tokens=8,
            stream=True,
            **options,
        )
        first = None
        async for chunk in stream:
            if first is None and chunk.choices[0].delta.content:
                first = time.perf_counter()
        return ((first or time.perf_counter()) - begin) * 1000

    async def ttft_plain_ms(self) -> float:
        return await self._ttft_ms(self._fresh_text(), extra_body={"sentiment": False})

    async def ttft_fresh_sentiment_ms(self) -> float:
        return await self._ttft_ms(self._fresh_text())

    async def ttft_cached_label_ms(self) -> float:
        text = self._fresh_text()
        await self._client.post("/classify", cast_to=object, body={"input": text})
        return await self._ttft_ms(text)

    async def _tokens_per_s(self, num_streams: int) -> float:
        async def run() -> int:
            reply = await self._client.chat.completions.create(
                model=f"{self._model}:plain",
                messages=[{"role": "user", "content": self._fresh_text()}],
                max_tokens=MAX_TOKENS,
                temperature=1.5,
            )
            return reply.usage.completion_tokens if reply.usage else 0

        begin = time.perf_counter()
        counts = await asyncio.gather(*(run() for _ in range(num_streams)))
        return sum(counts) / (time.perf_counter() - begin)

    async def tokens_per_s_1_stream(self) -> float:
        return await self._tokens_per_s(1)

    async def tokens_per_s_8_streams(self) -> float:
        return await self._tokens_per_s(NUM_STREAMS)

    async def classify_texts_per_s(self) -> float:
        texts = [self._fresh_text() for _ in range(NUM_TEXTS)]
        begin = time.perf_counter()
        await self._client.post("/classify", cast_to=object, body={"input": texts})
        return NUM_TEXTS / (time.perf_counter() - begin)


CASES = [
    "ttft_plain_ms",
    "ttft_fresh_sentiment_ms",
    "ttft_cached_label_ms",
    "tokens_per_s_1_stream",
    "tokens_per_s_8_streams",
    "classify_texts_per_s",
]
RATIOS = [
    ("ttft_fresh_sentiment_ms", "ttft_plain_ms"),
    ("ttft_cached_label_ms", "ttft_plain_ms"),
    ("tokens_per_s_8_streams", "tokens_per_s_1_stream"),
]


async def measure(model: str, base_url: str, rounds: int) -> dict[str, list[float]]:
    """Every case once a round, after a round to warm up."""
    async with AsyncOpenAI(base_url=base_url, api_key="unused", timeout=600) as client:
        cases = Cases(client, model)
        figures: dict[str, list[float]] = {name: [] for name in CASES}
        for i in range(rounds + 1):
            for name in CASES:
                figure = await getattr(cases, name)()
                if i:
                    figures[name].append(figure)
    return figures


def summary(values: list[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    triple = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, 3) for name, value in triple.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with server(args.model) as (model, base_url):
        figures = asyncio.run(measure(model, base_url, args.rounds))
    rows = {name: summary(values) for name, values in figures.items()}
    for above, below in RATIOS:
        pairs = zip(figures[above], figures[below], strict=True)
        rows[f"{above} / {below}"] = summary([a / b for a, b in pairs])
    print(f"{'':52} {'min':>9} {'median':>9} {'max':>9}")
    for name, row in rows.items():
        print(f"{name:52} {row['min']:>9} {row['median']:>9} {row['max']:>9}")
    print(json.dumps({"model": model, "rounds": args.rounds, **rows}))


if __name__ == "__main__":
    main()
