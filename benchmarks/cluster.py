"""The throughput of a cluster's replicas, and the cost of its entrance, over HTTP.

Deploys the server on a Ray cluster of this machine: first one replica, then two, each with one
thread. Measures labels and chats of 60 tokens per second, and the CPU time of Serve's proxy and the
entrance for each. Then times how long an entrance takes to route among many replicas and to write
their /metrics. Prints a table and, last, one line of JSON.

    python -m benchmarks.cluster --model DIR
"""

import argparse
import asyncio
import itertools
import json
import socket
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import ray
from prometheus_client import CollectorRegistry, generate_latest
from ray import serve
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.request_router import PendingRequest, ReplicaID

from server.cluster.deployment import build
from server.cluster.overview import Families, labelled
from server.cluster.routing import ConversationRouter
from server.cluster.settings import ClusterSettings
from server.metrics import SECONDS, Metrics
from server.routes import ROUTES

NUM_TEXTS, NUM_ANSWER_TOKENS = 32, 60
# Concurrent requests per replica in each case.
CASES = {"labels": 2, "chats": 8, "known_labels": 16}
SECONDS_EACH = 7
NUM_CHOICES = 200
IDLE, FULL = 0, 80
PROXY, ENTRANCE = "ray::ProxyActor", "ray::ServeReplica:qwen:Entrance"


class Cases:
    """Each method sends one request and returns its number of units of work."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client, self._model, self._numbers = client, model, itertools.count()

    def _text(self) -> str:
        return (
            f"今天的第{next(self._numbers)}件事终于做完了，可是我一点也高兴不起来，只想早点回家。"
        )

    async def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        response = await self._client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response

    async def labels(self) -> float:
        await self._post("/v1/classify", {"input": [self._text() for _ in range(NUM_TEXTS)]})
        return NUM_TEXTS

    async def known_labels(self) -> float:
        await self._post("/v1/classify", {"input": "好"})
        return 1

    async def chats(self) -> float:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": self._text()}],
            "max_tokens": NUM_ANSWER_TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        events = (await self._post("/v1/chat/completions", body)).text.strip().split("\n\n")
        usage = json.loads(events[-2].removeprefix("data: "))["usage"]
        return float(usage["completion_tokens"] / NUM_ANSWER_TOKENS)


async def rate(
    case: Callable[[], Awaitable[float]], num_clients: int, seconds: float
) -> tuple[float, float]:
    """Units per second, and the number of units."""
    await case()
    begin = time.perf_counter()

    async def client() -> float:
        total = 0.0
        while time.perf_counter() < begin + seconds:
            total += await case()
        return total

    total = sum(await asyncio.gather(*(client() for _ in range(num_clients))))
    return total / (time.perf_counter() - begin), total


def cpu_s(name: str) -> float:
    """CPU time of all processes of that name."""
    total = 0.0
    for process in psutil.process_iter(["cmdline", "cpu_times"]):
        if (process.info["cmdline"] or [""])[0].strip() == name:
            total += sum(process.info["cpu_times"][:2])
    return total


async def measure(
    url: str, num_replicas: int, names: list[str], seconds: float
) -> dict[str, float]:
    """Throughput of the replicas, and CPU milliseconds of proxy and entrance per unit."""
    figures: dict[str, float] = {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        cases = Cases(client, model)
        for name in names:
            case, number = getattr(cases, name), CASES[name]
            before = {process: cpu_s(process) for process in (PROXY, ENTRANCE)}
            figures[f"{name}_per_s"], total = await rate(case, number * num_replicas, seconds)
            for process, label in ((PROXY, "proxy"), (ENTRANCE, "entrance")):
                cpu_ms = 1000 * (cpu_s(process) - before[process])
                figures[f"{label}_ms_per_{name}"] = cpu_ms / total
            rounded = {key: round(value, 2) for key, value in figures.items()}
            print(num_replicas, "replicas:", rounded, flush=True)
    return figures


def metrics_s(num_replicas: int) -> float:
    """Seconds in which an entrance writes /metrics, without the time to request them."""
    metrics = Metrics()
    for route in ROUTES:
        for status in (200, 400, 429):
            metrics.request_answered(route.path, status, SECONDS[0])
    all_metrics = [
        metric for i in range(num_replicas) for metric in labelled(metrics.registry, f"name{i}")
    ]
    begin = time.perf_counter()
    registry = CollectorRegistry()
    registry.register(Families(all_metrics))
    generate_latest(registry)
    return time.perf_counter() - begin


async def routing_us(num_replicas: int, num_requests: int) -> float:
    """Microseconds in which an entrance chooses a replica. num_requests: of each replica."""
    deployment = DeploymentID("Replica", "qwen")
    router = ConversationRouter(deployment, DeploymentHandleSource.REPLICA)
    router.initialize_state(max_num_seqs=16, max_requests=80)
    ids = [ReplicaID(f"name{i}", deployment) for i in range(num_replicas)]
    replicas: Any = [SimpleNamespace(replica_id=each) for each in ids]
    router._replicas = dict(zip(ids, replicas, strict=True))
    router._rebuild_ring(frozenset(ids))
    for each in ids:
        router.replica_queue_len_cache.update(each, num_requests)
    begin = time.perf_counter()
    for i in range(NUM_CHOICES):
        metadata = RequestMetadata("id", "id", session_id=f"conversation {i}")
        await router.choose_replicas(replicas, PendingRequest([], {}, metadata))
    return 1e6 * (time.perf_counter() - begin) / NUM_CHOICES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=SECONDS_EACH)
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(proxy_location="HeadOnly", http_options={"port": port})
    results: dict[int, dict[str, float]] = {}
    for number in (1, 2):
        settings = ClusterSettings(
            model=args.model, num_replicas=number, num_threads=1, log_level="error"
        )
        serve.run(build(settings), name="qwen")
        results[number] = asyncio.run(
            measure(f"http://127.0.0.1:{port}", number, args.cases, args.seconds)
        )
    serve.shutdown()
    ray.shutdown()
    for name, one in results[1].items():
        two = results[2][name]
        print(f"{name:28} one {one:8.2f}   two {two:8.2f}   ratio {two / one:5.2f}")
    sizes = {}
    for number in (10, 100, 1000):
        idle, full = (asyncio.run(routing_us(number, requests)) for requests in (IDLE, FULL))
        sizes[number] = {"metrics_s": metrics_s(number), "idle_us": idle, "full_us": full}
        print(
            f"{number:4} replicas: /metrics {sizes[number]['metrics_s']:.3f} s,"
            f" routing {idle:.0f} us, {full:.0f} us if all are full"
        )
    print(json.dumps({"model": args.model, "replicas": results, "sizes": sizes}))


if __name__ == "__main__":
    main()
