"""A cluster of two nodes on this machine, under load and with failures."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from server.core.engine.checkpoint import BUNDLED_FOLDER
from server.core.engine.generation_config import read_generation_defaults
from server.core.engine.gguf_file import open_source

ray = pytest.importorskip("ray", reason="Ray is not installed, which the extra 'cluster' brings")
from ray import serve  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from ray.serve.context import _get_global_client  # noqa: E402
from ray.serve.schema import ServeDeploySchema  # noqa: E402

CONFIG = yaml.safe_load((Path(__file__).parents[2] / "docs" / "cluster.yaml").read_text())
KEY = "a key"
MAX_NUM_SEQS, MAX_QUEUE, NUM_REPLICAS = 2, 1, 2
# A replica takes some seconds to import PyTorch, and a machine may be busy.
BOUND_S = 120
MODEL = "qwen-mini:plain"
END = "[DONE]"


class Deployment:
    """The configuration of docs/cluster.yaml, made small, and the cluster that runs it."""

    def __init__(self, port: int, entrance: dict[str, Any] | None = None) -> None:
        """entrance: Ray's options of its process."""
        self.url = f"http://127.0.0.1:{port}"
        self._config = deepcopy(CONFIG)
        self._config["proxy_location"] = "HeadOnly"  # both nodes are one machine
        self._config["http_options"]["port"] = port
        [app] = self._config["applications"]
        app["deployments"] = [
            {"name": "Replica"},
            {"name": "Entrance", "ray_actor_options": entrance or {"num_cpus": 0}},
        ]
        self.update(
            {"max_surge_percent": 100, "graceful_shutdown_wait_loop_s": 0.1},
            model="mini",
            api_key=KEY,
            num_replicas=NUM_REPLICAS,
            max_replicas=None,
            num_threads=1,
            max_num_seqs=MAX_NUM_SEQS,
            max_queue=MAX_QUEUE,
            max_kv_mib=128,
            max_prefix_mib=64,
        )

    def update(self, replica: dict[str, Any] | None = None, **args: Any) -> None:
        """Deploys another version.

        replica: Serve's own options of the deployment `Replica`. args: as in the file.
        """
        [app] = self._config["applications"]
        app["args"].update(args)
        app["deployments"][0].update(replica or {})
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(self._config))


@pytest.fixture(scope="module")
def deployment(monkeypatch_module: pytest.MonkeyPatch) -> Iterator[Deployment]:
    monkeypatch_module.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's processes would yield to the tests that run beside them.
    monkeypatch_module.setenv("RAY_worker_niceness", "0")
    monkeypatch_module.setenv("RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "0.1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        nodes.add_node(num_cpus=3)
        ray.init(address=nodes.address, log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options={"port": port})
        yield Deployment(port)
    finally:
        # Not Serve's own shutdown, which waits for running requests.
        ray.shutdown()
        nodes.shutdown()


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture
async def client(deployment: Deployment) -> AsyncIterator[httpx.AsyncClient]:
    """A client with the key, once all replicas run and are idle."""
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(
        base_url=deployment.url, headers=headers, timeout=BOUND_S
    ) as client:
        await until(lambda: has_replicas(client, NUM_REPLICAS))
        await until(lambda: has_inside(client, 0))
        yield client


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(BOUND_S):
        while not await is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def replicas(client: httpx.AsyncClient) -> set[str]:
    """The names of the replicas that work."""
    health = (await client.get("/health")).json()
    return {each["replica"] for each in health.get("replicas", ())}


async def has_replicas(client: httpx.AsyncClient, number: int) -> bool:
    try:
        return len(await replicas(client)) == number
    except (httpx.TransportError, json.JSONDecodeError):  # Serve starts
        return False


async def has_inside(client: httpx.AsyncClient, number: int) -> bool:
    """Whether the replicas have this number of requests."""
    requests: int = (await client.get("/ready")).json()["requests"]
    return requests == number


def chat(text: str, *more: dict[str, str], **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}, *more]
    return {"model": MODEL, "messages": messages, "seed": 1, **changes}


def endless(text: str, **changes: Any) -> dict[str, Any]:
    eos = read_generation_defaults(open_source(BUNDLED_FOLDER)).eos_token_ids
    bias = {str(token_id): -100 for token_id in eos}
    return chat(text, logit_bias=bias, stream=True, **changes)


class Stream:
    """A stream that is read in the background."""

    def __init__(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        self.events: list[str] = []
        self._has_begun = asyncio.Event()
        self._reading = asyncio.create_task(self._read(client, body))

    async def _read(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        try:
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                assert response.status_code == 200, await response.aread()
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        self.events.append(line.removeprefix("data: "))
                        self._has_begun.set()
        finally:
            self._has_begun.set()

    async def begun(self) -> "Stream":
        await self._has_begun.wait()
        return self

    async def end(self) -> list[str]:
        """All events, after the end of the stream."""
        async with asyncio.timeout(BOUND_S):
            await self._reading
        return self.events

    async def hang_up(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)


def error_of(events: list[str]) -> str | None:
    """The code of the error that ended the stream, if one did."""
    assert events[-1] == END
    last = json.loads(events[-2])
    return last["error"]["code"] if "error" in last else None


async def test_a_stream_sends_the_mood_first_and_frees_its_slot_on_disconnect(
    client: httpx.AsyncClient,
) -> None:
    stream = await Stream(client, {**endless("我失恋了，很难过"), "model": "qwen-mini"}).begun()
    assert json.loads(stream.events[0])["sentiment"]["label"] == "negative"
    assert await has_inside(client, 1)
    await stream.hang_up()
    await until(lambda: has_inside(client, 0))


async def test_the_entrance_checks_the_key(client: httpx.AsyncClient) -> None:
    for key, status in (("another key", 401), (KEY, 200)):
        headers = {"authorization": f"Bearer {key}", "x-request-id": "mine"}
        response = await client.post("/v1/classify", json={"input": "好"}, headers=headers)
        assert response.status_code == status
        assert response.headers.get_list("x-request-id") == ["mine"]


async def test_metrics_and_health_are_reported_per_replica(client: httpx.AsyncClient) -> None:
    names = await replicas(client)
    replicas_of = {}
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        replicas_of[family.name] = {sample.labels["replica"] for sample in family.samples}
    assert replicas_of["qwen_requests_inside"] == names
    assert len(replicas_of["qwen_requests"] - names) == 1  # the entrance
    health = (await client.get("/health")).json()
    assert health["status"] == "ok" and health["model"] == "qwen-mini"


async def test_a_full_cluster_answers_429(client: httpx.AsyncClient) -> None:
    room = NUM_REPLICAS * (MAX_NUM_SEQS + MAX_QUEUE)
    refusals: asyncio.Queue[httpx.Response] = asyncio.Queue()

    async def send_repeatedly(name: str) -> None:
        while True:
            body = endless(name) | {"stream": False}
            response = await client.post("/v1/chat/completions", json=body)
            if response.status_code != 200:
                refusals.put_nowait(response)
                await asyncio.sleep(0.05)

    sending = [asyncio.create_task(send_repeatedly(f"number {i}")) for i in range(room + 1)]
    async with asyncio.timeout(BOUND_S):
        refused = await refusals.get()
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
    await until(lambda: has_inside(client, room))
    assert (await client.get("/health")).status_code == 200
    for task in sending:
        task.cancel()
    await asyncio.gather(*sending, return_exceptions=True)


async def test_a_conversation_stays_with_the_replica_that_has_it_cached(
    client: httpx.AsyncClient,
) -> None:
    for i in range(16):
        body = chat(f"今天的第{i}件事", max_tokens=8)
        first = (await client.post("/v1/chat/completions", json=body)).json()
        more = [first["choices"][0]["message"], {"role": "user", "content": "然后呢？"}]
        body["messages"] += [{name: each[name] for name in ("role", "content")} for each in more]
        second = (await client.post("/v1/chat/completions", json=body)).json()
        cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached >= first["usage"]["prompt_tokens"]
    samples = [
        sample
        for family in text_string_to_metric_families((await client.get("/metrics")).text)
        for sample in family.samples
        if sample.name == "qwen_tokens_total" and sample.labels["kind"] == "cached"
    ]
    assert len(samples) == NUM_REPLICAS and all(sample.value > 0 for sample in samples)


async def test_a_replica_that_dies_ends_its_own_requests_only_and_is_replaced(
    client: httpx.AsyncClient,
) -> None:
    before = await replicas(client)
    # As many as all replicas run at once, so that they are spread evenly.
    streams = [
        await Stream(client, endless(f"number {i}", max_tokens=200)).begun()
        for i in range(NUM_REPLICAS * MAX_NUM_SEQS)
    ]
    dying = min(before)
    ray.kill(ray.get_actor(f"SERVE_REPLICA::qwen#Replica#{dying}", namespace="serve"))
    others = [client.post("/v1/classify", json={"input": f"{i}"}) for i in range(MAX_QUEUE)]
    assert [response.status_code for response in await asyncio.gather(*others)] == [200]
    errors = sorted([str(error_of(await stream.end())) for stream in streams])
    assert errors == ["None"] * MAX_NUM_SEQS + ["replica_lost"] * MAX_NUM_SEQS
    await until(lambda: has_replicas(client, NUM_REPLICAS))
    after = await replicas(client)
    assert dying not in after and before - {dying} < after


async def test_a_new_version_loses_no_stream(
    client: httpx.AsyncClient, deployment: Deployment
) -> None:
    before, is_replaced = await replicas(client), asyncio.Event()

    async def stream_after_stream(name: str) -> list[str | None]:
        errors: list[str | None] = []
        while not is_replaced.is_set():
            body = endless(f"{name} {len(errors)}", max_tokens=100)
            errors.append(error_of(await Stream(client, body).end()))
        return errors

    streaming = [asyncio.create_task(stream_after_stream(name)) for name in "ab"]
    deployment.update(persona="another one")
    async with asyncio.timeout(BOUND_S):
        while not before.isdisjoint(await replicas(client)):
            response = await client.post("/v1/classify", json={"input": str(time.time())})
            assert response.status_code == 200, response.text
    is_replaced.set()
    for errors in await asyncio.gather(*streaming):
        assert errors and set(errors) == {None}


@pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field")
async def test_the_number_of_replicas_follows_the_load(
    client: httpx.AsyncClient, deployment: Deployment
) -> None:
    speed = {"metrics_interval_s": 0.1, "look_back_period_s": 0.5}
    bounds = {"min_replicas": 1, "max_replicas": 2, "upscale_delay_s": 0, "downscale_delay_s": 0}
    deployment.update(
        {
            "num_replicas": "auto",
            "autoscaling_config": {**speed, **bounds, "target_ongoing_requests": 1},
        }
    )
    await until(lambda: has_replicas(client, 1))
    streams = [Stream(client, endless(f"number {i}")) for i in range(MAX_NUM_SEQS)]
    await until(lambda: has_replicas(client, 2))
    for stream in streams:
        await stream.hang_up()
