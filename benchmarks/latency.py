"""Time to first token, tokens per second and texts per second, over HTTP.

Starts a server and, with --peers, `transformers serve` on the same checkpoint, a BERT-base
classifier, or our engine without HTTP. Measures every case in turns for several rounds. Ratios are
taken within a round, because absolute numbers of a shared machine are noisy. Prints a table and,
last, one line of JSON.

    python -m benchmarks.latency --model mini --rounds 7
"""

import argparse
import asyncio
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from benchmarks import light_client
from benchmarks.engines import BERT
from benchmarks.figures import Figures, Goal, print_medians, report_goals, summary
from benchmarks.servers import OURS, SERVE, Server, our_server, transformers_server
from benchmarks.worker import Worker

NUM_STREAMS = 8
NUM_TEXTS = 64
NUM_TEXT_TOKENS = 30
MAX_TOKENS = 64


class Cases:
    """Each method is one measurement. Texts repeat only where a cached label is measured."""

    def __init__(self, server: Server) -> None:
        self._client = AsyncOpenAI(base_url=server.base_url, api_key="unused", timeout=600)
        self._server, self._model = server, server.model
        self._plain = f"{server.model}:plain" if server.name == OURS else server.model
        self._numbers = itertools.count()

    def _fresh_text(self) -> str:
        return (
            f"今天的第{next(self._numbers)}件事终于做完了，可是我一点也高兴不起来，只想早点回家。"
        )

    async def _ttft_ms(self, text: str, model: str) -> float:
        begin = time.perf_counter()
        stream = await self._client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": text}],
            max_tokens=8,
            # Random weights have flat distributions, whose nucleus takes unrealistically long to
            # find.
            temperature=0,
            stream=True,
        )
        first = None
        async for chunk in stream:
            if first is None and chunk.choices[0].delta.content:
                first = time.perf_counter()
        return ((first or time.perf_counter()) - begin) * 1000

    async def ttft_plain_ms(self) -> float:
        return await self._ttft_ms(self._fresh_text(), self._plain)

    async def ttft_fresh_sentiment_ms(self) -> float:
        return await self._ttft_ms(self._fresh_text(), self._model)

    async def ttft_cached_label_ms(self) -> float:
        text = self._fresh_text()
        await self._client.post("/classify", cast_to=object, body={"input": text})
        return await self._ttft_ms(text, self._model)

    async def _tokens_per_s(self, num_streams: int) -> float:
        async def run() -> int:
            reply = await self._client.chat.completions.create(
                model=self._plain,
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

    async def tokens_per_s_light_client(self) -> float:
        seeds = [next(self._numbers) for _ in range(NUM_STREAMS)]
        return await light_client.tokens_per_s(self._server, seeds)

    async def classify_texts_per_s(self) -> float:
        texts = [self._fresh_text() for _ in range(NUM_TEXTS)]
        begin = time.perf_counter()
        await self._client.post("/classify", cast_to=object, body={"input": texts})
        return NUM_TEXTS / (time.perf_counter() - begin)


OUR_CASES = [
    "ttft_plain_ms",
    "ttft_fresh_sentiment_ms",
    "ttft_cached_label_ms",
    "tokens_per_s_1_stream",
    "tokens_per_s_8_streams",
    "tokens_per_s_light_client",
    "classify_texts_per_s",
]
SERVE_CASES = ["ttft_plain_ms", "tokens_per_s_1_stream", "tokens_per_s_8_streams"]
ENGINE = "ours-int8"
PEERS = (SERVE, BERT, ENGINE)
# Requests to the peers that are not servers.
GENERATE = {"case": "generate", "num_streams": NUM_STREAMS, **light_client.WORKLOAD}
CLASSIFY = {"case": "classify", "num_texts": NUM_TEXTS, "num_tokens": NUM_TEXT_TOKENS}
WORKER_CASES = {
    ENGINE: ("tokens_per_s_light_client", GENERATE, NUM_STREAMS * light_client.NUM_NEW),
    BERT: ("classify_texts_per_s", CLASSIFY, NUM_TEXTS),
}


def ours_to(peer: str, case: str, reach: str | None = None) -> Goal:
    return Goal((OURS, case), [(peer, case)], reach)


GOALS = [
    ours_to(BERT, "classify_texts_per_s", "at least 1.8"),
    Goal((OURS, "ttft_fresh_sentiment_ms"), [(OURS, "ttft_plain_ms")], "at most 1.6"),
    Goal((OURS, "ttft_cached_label_ms"), [(OURS, "ttft_plain_ms")], "at most 1.05"),
    ours_to(ENGINE, "tokens_per_s_light_client", "at least 0.92"),
    ours_to(SERVE, "ttft_plain_ms"),
    ours_to(SERVE, "tokens_per_s_1_stream"),
    ours_to(SERVE, "tokens_per_s_8_streams"),
]


async def measure(servers: list[Server], workers: dict[str, Worker], rounds: int) -> Figures:
    """Measures all cases once per round, after a warm-up round."""
    figures: Figures = defaultdict(list)
    cases = {server.name: Cases(server) for server in servers}
    for number in range(rounds + 1):
        if number == 1:
            figures.clear()
        for case in OUR_CASES:
            for server in servers:
                if server.name == OURS or case in SERVE_CASES:
                    figure = await getattr(cases[server.name], case)()
                    figures[server.name, case].append(figure)
        for name, worker in workers.items():
            case, request, amount = WORKER_CASES[name]
            figures[name, case].append(amount / worker.ask(request)["seconds"])
    return figures


def run(model: str, rounds: int, peers: Collection[str] = PEERS) -> dict[str, Any]:
    """Measures, prints the tables, and returns all figures."""
    with ExitStack() as stack:
        servers = [stack.enter_context(our_server(model))]
        workers = {}
        if SERVE in peers:
            servers.append(stack.enter_context(transformers_server(model)))
        for name in WORKER_CASES:
            if name in peers:
                workers[name] = Worker(name, Path(model))
                stack.callback(workers[name].close)
        figures = asyncio.run(measure(servers, workers, rounds))
    print_medians("over HTTP, medians", figures)
    rows = {f"{name}: {case}": summary(values) for (name, case), values in figures.items()}
    return {**rows, **report_goals(figures, GOALS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=(), help="requires a checkpoint folder"
    )
    args = parser.parse_args()
    print(json.dumps(run(args.model, args.rounds, args.peers)))


if __name__ == "__main__":
    main()
