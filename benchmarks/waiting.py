"""Measures waiting times of a server's clients, alone or beside a load. Uses the public API only.

A load is a list of functions that write a request. Within the block `beside`, each sends its next
request when the last one is answered.
"""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx

from benchmarks.heavy import Request, Writer

# A longer wait counts as this.
MAX_WAIT_S = 15.0
WINDOW_S = 6.0
NUM_SAMPLES = 8
PROBE_EVERY_S = 0.01
TIMEOUT_S = 120  # a server that is not idle after this time is broken

Load = Sequence[Callable[[], Request]]


class Waiting:
    """Measures one server. Every measurement starts when the server is idle."""

    def __init__(self, http: httpx.AsyncClient, writer: Writer) -> None:
        """http: a client with the API's base URL and without a timeout."""
        self._http, self._writer = http, writer
        self._root = str(http.base_url).removesuffix("/").removesuffix("/v1")

    async def ttfts_ms(self, load: Load = ()) -> list[float]:
        """Times to first token of short chats, sent one by one."""
        await self.idle()
        async with self.beside(load):
            measured, begin = list[float](), time.perf_counter()
            while len(measured) < NUM_SAMPLES and time.perf_counter() - begin < WINDOW_S:
                measured.append(await self._ttft_ms())
        return measured

    async def _ttft_ms(self) -> float:
        begin, tokens = time.perf_counter(), self._tokens(self._writer.short_chat())
        with suppress(TimeoutError):
            async with asyncio.timeout(MAX_WAIT_S):
                await anext(tokens, None)
        seconds = time.perf_counter() - begin
        await tokens.aclose()
        return min(seconds, MAX_WAIT_S) * 1000

    async def longest_pause_ms(self, load: Load) -> float:
        """The longest pause between two tokens of a stream that starts before the load."""
        await self.idle()
        arrivals = Arrivals()
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(self._read_on(arrivals))
            await arrivals.until(10)
            begin = time.perf_counter()
            async with self.beside(load):
                await asyncio.sleep(WINDOW_S)
                with suppress(TimeoutError):
                    async with asyncio.timeout(MAX_WAIT_S):
                        await arrivals.until(arrivals.number + 1)
                end = time.perf_counter()
            reader.cancel()
        return min(arrivals.longest_pause_s(begin, end), MAX_WAIT_S) * 1000

    async def _read_on(self, arrivals: "Arrivals") -> None:
        """Reads streams one by one; a stream ends when its context is full."""
        while True:
            arrivals.begin_stream()
            async for at in self._tokens(self._writer.stream()):
                arrivals.add(at)

    async def _tokens(self, request: Request) -> AsyncGenerator[float, None]:
        """The arrival time of each piece of text."""
        async with self._http.stream("POST", request.path, json=request.body) as response:
            async for line in response.aiter_lines():
                if _has_content(line):
                    yield time.perf_counter()

    async def seconds(self, request: Request) -> float:
        """Seconds from the request to its complete response.

        Raises:
            RuntimeError: the server refuses the request.
        """
        begin = time.perf_counter()
        response = await self._http.post(request.path, json=request.body)
        if response.status_code != 200:
            raise RuntimeError(f"{request.path}: {response.status_code} {response.text[:300]}")
        return time.perf_counter() - begin

    @asynccontextmanager
    async def probed(self) -> AsyncIterator["Probe"]:
        """Measures the latency of /health during the block."""
        probe = Probe()
        is_over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._probe(probe, is_over))
            yield probe
            is_over.set()  # the pending request is still counted

    async def _probe(self, probe: "Probe", is_over: asyncio.Event) -> None:
        """Uses a plain socket: an HTTP client would use a tenth of a core."""
        url = urlsplit(self._root)
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        try:
            while not is_over.is_set():
                begin = time.perf_counter()
                writer.write(f"GET /health HTTP/1.1\r\nhost: {url.netloc}\r\n\r\n".encode())
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                assert head.startswith("http/1.1 200 "), head
                await reader.readexactly(int(head.split("content-length:")[1].split()[0]))
                answered = time.perf_counter()
                probe.answers_ms.append((answered - begin) * 1000)
                pause_s = max(0.0, PROBE_EVERY_S - (answered - begin))
                await asyncio.sleep(pause_s)
                probe.own_lags_ms.append((time.perf_counter() - answered - pause_s) * 1000)
        finally:
            writer.close()

    @asynccontextmanager
    async def beside(self, load: Load) -> AsyncIterator[None]:
        """Runs the block beside the load, once all its requests are admitted; then cancels them."""
        num_inside = await self._num_inside() + len(load)

        async def is_inside() -> bool:
            return await self._num_inside() >= num_inside

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._send_on(write)) for write in load]
            await _until(is_inside)
            yield
            for task in tasks:
                task.cancel()

    async def _send_on(self, write: Callable[[], Request]) -> None:
        while True:
            await self.seconds(write())

    async def idle(self) -> None:
        """Waits until the server has no request and the engine no sequence."""
        await _until(self._is_idle)

    async def _is_idle(self) -> bool:
        lines = (await self._http.get(f"{self._root}/metrics")).text.splitlines()
        sequences = [
            float(line.split()[-1]) for line in lines if line.startswith("qwen_sequences{")
        ]
        return not any(sequences) and not await self._num_inside()

    async def _num_inside(self) -> int:
        inside: int = (await self._http.get(f"{self._root}/ready")).json()["requests"]
        return inside


@dataclass
class Probe:
    """Latencies of /health, and how late this process itself was woken."""

    answers_ms: list[float] = field(default_factory=list)
    own_lags_ms: list[float] = field(default_factory=list)


class Arrivals:
    """Arrival times of the tokens of several streams, read one by one."""

    def __init__(self) -> None:
        self.number = 0
        self._streams: list[list[float]] = []

    def begin_stream(self) -> None:
        self._streams.append([])

    def add(self, at: float) -> None:
        self._streams[-1].append(at)
        self.number += 1

    async def until(self, number: int) -> None:
        """Waits until this number of tokens has arrived."""

        async def has_arrived() -> bool:
            return self.number >= number

        await _until(has_arrived)

    def longest_pause_s(self, begin: float, end: float) -> float:
        """The longest pause that overlaps this interval, even if it has not ended."""
        last = self._streams[-1]
        streams = [*self._streams[:-1], [*last, end] if last else last]
        pairs = ((a, b) for times in streams for a, b in itertools.pairwise(times))
        return max(b - a for a, b in pairs if a < end and b > begin)


async def _until(is_so: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not await is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def _has_content(line: str) -> bool:
    """Whether a line of a stream contains text.

    Raises:
        RuntimeError: it contains an error.
    """
    if not line.startswith("data: {"):
        return False
    chunk = json.loads(line.removeprefix("data: "))
    if "error" in chunk:
        raise RuntimeError(line)
    return any(choice["delta"].get("content") for choice in chunk["choices"])
