"""Streams over HTTP, read by a client that uses hardly any CPU time.

Prompts are token ids, and a bias repeats one token, so that no answer ends early and every token is
a chunk. The same workload is measured on the engine without HTTP.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from benchmarks.engines.measuring import prompt
from benchmarks.servers import Server

NUM_CACHED, NUM_NEW = 100, 128
TOKEN_ID = 1000  # decodes to whole characters in any vocabulary
WORKLOAD = {"num_cached": NUM_CACHED, "num_new": NUM_NEW, "token_id": TOKEN_ID}


async def tokens_per_s(server: Server, seeds: Sequence[int]) -> float:
    """Throughput of all streams together, from the requests to the last token.

    seeds: of the prompts; use new ones for each call, because the server caches prompts.
    """
    begin = time.perf_counter()
    await asyncio.gather(*(_read_stream(server, seed) for seed in seeds))
    return len(seeds) * NUM_NEW / (time.perf_counter() - begin)


async def _read_stream(server: Server, seed: int) -> None:
    url = urlsplit(server.base_url)
    body = json.dumps({
        "model": server.model, "prompt": prompt(NUM_CACHED, seed), "stream": True,
        "max_tokens": NUM_NEW, "temperature": 0, "repetition_penalty": 1,
        "logit_bias": {str(TOKEN_ID): 100},
    })  # fmt: skip
    head = (
        f"POST {url.path}/completions HTTP/1.1\r\nHost: {url.netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    writer.write((head + body).encode())
    answer = bytearray()
    while part := await reader.read(65_536):
        answer += part
    writer.close()
    if answer.count(b"data: ") < NUM_NEW:
        raise RuntimeError(f"the server answered {bytes(answer[-500:])!r}")
