"""A node of the cluster that dies under load."""

import asyncio
import socket
from collections.abc import Iterator

import httpx
import pytest

from tests.cluster.test_cluster import (
    BOUND_S,
    KEY,
    MAX_NUM_SEQS,
    Deployment,
    Stream,
    endless,
    error_of,
    has_replicas,
    ray,
    replicas,
    until,
)

from ray import serve  # isort: skip
from ray.cluster_utils import Cluster  # isort: skip

# A resource that only the entrance's node has.
HEAD = "head"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cluster, Deployment]]:
    """A head node, which runs the entrance and one replica."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nodes = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "resources": {HEAD: 1}},
    )
    try:
        ray.init(address=nodes.address, log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options={"port": port})
        yield nodes, Deployment(port, entrance={"num_cpus": 0, "resources": {HEAD: 0.1}})
    finally:
        ray.shutdown()
        nodes.shutdown()


@pytest.mark.soak
async def test_a_node_that_dies_ends_its_own_requests_only_and_its_replica_is_replaced(
    cluster: tuple[Cluster, Deployment],
) -> None:
    nodes, deployment = cluster
    worker = nodes.add_node(num_cpus=1)
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(
        base_url=deployment.url, headers=headers, timeout=BOUND_S
    ) as client:
        await until(lambda: has_replicas(client, 2))
        before = await replicas(client)
        # As many as both replicas run at once, so that they are spread evenly.
        streams = [
            await Stream(client, endless(f"number {i}", max_tokens=1000)).begun()
            for i in range(2 * MAX_NUM_SEQS)
        ]
        await asyncio.to_thread(nodes.remove_node, worker, allow_graceful=False)

        async def is_answered() -> bool:
            """Ray may send requests to the node until it sees that the node is gone."""
            response = await client.post("/v1/classify", json={"input": "and you?"})
            is_lost = response.status_code == 503
            assert not is_lost or response.json()["error"]["code"] == "replica_lost"
            return not is_lost and response.status_code == 200

        await until(is_answered)
        errors = sorted([str(error_of(await stream.end())) for stream in streams])
        assert errors == ["None"] * MAX_NUM_SEQS + ["replica_lost"] * MAX_NUM_SEQS
        await until(lambda: has_replicas(client, 1))
        nodes.add_node(num_cpus=1)
        await until(lambda: has_replicas(client, 2))
        assert len(before & await replicas(client)) == 1
