"""What a client waits for: time to first token, tokens per second, texts per second, over HTTP.

Starts a server of its own and, with --peers, `transformers serve` on the same checkpoint or
a BERT-base classifier; measures every case in turns for several rounds. Ratios are taken
round by round, because absolute numbers of a shared machine are noisy. Prints a table for
people and, last, one line of JSON.

    python -m benchmarks.latency --model mini --rounds 7
"""

import argparse
import asyncio
import itertools
import json
import re
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from benchmarks.figures import print_table, summary
from benchmarks.worker import Worker

NUM_STREAMS = 8
NUM_TEXTS = 64
NUM_TEXT_TOKENS = 30
MAX_TOKENS = 64
START_S = 120
START = re.compile(r"Serving (\S+) on (http://\S+)")
Figures = dict[tuple[str, str], list[float]]


@dataclass(frozen=True)
class Server:
    """A running server that speaks OpenAI's protocol."""

    name: str
    model: str
    base_url: str
    process_id: int


@contextmanager
def our_server(model: str, *options: str, tree: Path | None = None) -> Iterator[Server]:
    """A fresh process of ours.

    options: as on the command line. tree: a checkout of another commit, whose server is run.
    """
    command = [sys.executable, "-m", "server", "--port", "0", "--model", model]
    process = subprocess.Popen(
        [*command, "--log-level", "error", *options], stdout=subprocess.PIPE, text=True, cwd=tree
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := START.search(line):
                _until_answered(found[2], process)
                yield Server(OURS, found[1], f"{found[2]}/v1", process.pid)
                return
        raise RuntimeError("the server did not start")
    finally:
        process.terminate()
        process.wait()


@contextmanager
def transformers_server(model: str) -> Iterator[Server]:
    """A fresh process of `transformers serve`, with the model loaded."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", model]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
        stdout=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        _until_answered(url, process)
        yield Server(SERVE, model, f"{url}/v1", process.pid)
    finally:
        process.terminate()
        process.wait()


def _until_answered(url: str, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(f"{url}/health")
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"no server answers at {url}")


class Cases:
    """Each method is one measurement; texts never repeat unless that is the point."""

    def __init__(self, server: Server) -> None:
        self._client = AsyncOpenAI(base_url=server.base_url, api_key="unused", timeout=600)
        self._model = server.model
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
            # Random weights have flat distributions: finding their nucleus takes longer than
            # anything real, and is not what is measured here.
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
    "classify_texts_per_s",
]
SERVE_CASES = ["ttft_plain_ms", "tokens_per_s_1_stream", "tokens_per_s_8_streams"]
OURS, SERVE, BERT = "ours", "transformers serve", "bert-base"
PEERS = (SERVE, BERT)
# Above, below, what to reach (at most for latencies, at least for the others).
RATIOS = [
    ((OURS, "ttft_fresh_sentiment_ms"), (OURS, "ttft_plain_ms"), 1.4),
    ((OURS, "ttft_cached_label_ms"), (OURS, "ttft_plain_ms"), 1.05),
    ((OURS, "tokens_per_s_8_streams"), (OURS, "tokens_per_s_1_stream"), 4.0),
    ((OURS, "classify_texts_per_s"), (BERT, "classify_texts_per_s"), 1.3),
    ((OURS, "ttft_plain_ms"), (SERVE, "ttft_plain_ms"), None),
    ((OURS, "tokens_per_s_1_stream"), (SERVE, "tokens_per_s_1_stream"), None),
    ((OURS, "tokens_per_s_8_streams"), (SERVE, "tokens_per_s_8_streams"), None),
]


async def measure(servers: list[Server], bert: Worker | None, rounds: int) -> Figures:
    """Every case of everyone once a round, after a round to warm up."""
    figures: Figures = defaultdict(list)
    cases = {server.name: Cases(server) for server in servers}
    for number in range(rounds + 1):
        for case in OUR_CASES:
            for server in servers:
                if server.name == OURS or case in SERVE_CASES:
                    figure = await getattr(cases[server.name], case)()
                    if number:
                        figures[server.name, case].append(figure)
        if bert is not None:
            request = {"case": "classify", "num_texts": NUM_TEXTS, "num_tokens": NUM_TEXT_TOKENS}
            figure = NUM_TEXTS / bert.ask(request)["seconds"]
            if number:
                figures[BERT, "classify_texts_per_s"].append(figure)
    return figures


def run(model: str, rounds: int, peers: Collection[str] = PEERS) -> dict[str, Any]:
    """Measures, prints the table, and returns all figures."""
    with ExitStack() as stack:
        servers = [stack.enter_context(our_server(model))]
        bert = None
        if SERVE in peers:
            servers.append(stack.enter_context(transformers_server(model)))
        if BERT in peers:
            bert = Worker(BERT, Path(model))
            stack.callback(bert.close)
        figures = asyncio.run(measure(servers, bert, rounds))
    rows = {f"{name}: {case}": summary(values) for (name, case), values in figures.items()}
    ratios = {}
    for above, below, goal in RATIOS:
        if above in figures and below in figures:
            pairs = zip(figures[above], figures[below], strict=True)
            name = f"{above[0]} {above[1]} / {below[0]} {below[1]}"
            ratios[name] = {**summary([a / b for a, b in pairs]), "goal": goal}
    print_table("over HTTP", rows)
    print_table("ratios, round by round", ratios)
    return {**rows, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=(), help="needs a checkpoint folder"
    )
    args = parser.parse_args()
    print(json.dumps(run(args.model, args.rounds, args.peers)))


if __name__ == "__main__":
    main()
