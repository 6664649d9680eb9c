"""Health, readiness and metrics of several replicas together."""

from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.cluster.overview import Families, health_of, labelled, readiness_of
from server.metrics import Metrics


def state(name: str, status: str, **fields: Any) -> dict[str, Any]:
    caches = {"sentiment_cache": {"hits": 2, "misses": 1}}
    return {"replica": name, "status": status, "requests": 3, **caches, **fields}


def test_each_family_is_listed_once_with_the_samples_of_all() -> None:
    all_metrics = []
    for name in ("a", "b"):
        metrics = Metrics()
        metrics.request_answered("/v1/classify", 200, 0.1)
        all_metrics += labelled(metrics.registry, name)
    registry = CollectorRegistry()
    registry.register(Families(all_metrics))
    text = generate_latest(registry).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert text.count("# TYPE qwen_requests_total counter") == 1
    samples = [each for each in families["qwen_requests"].samples if "_total" in each.name]
    assert [(each.labels["replica"], each.value) for each in samples] == [("a", 1), ("b", 1)]


def test_a_cluster_is_healthy_while_one_replica_is() -> None:
    broken = state("a", "stopped", reason="the engine broke down")
    sound = state("b", "ok", reason=None, model="qwen", warning=None)
    health = health_of([broken, sound])
    assert (health["status"], health["reason"], health["model"]) == ("ok", None, "qwen")
    assert health["sentiment_cache"] == {"hits": 4, "misses": 2}
    assert health["replicas"] == [broken, sound]
    assert health_of([broken])["reason"] == "the engine broke down"
    assert health_of([])["reason"] == "no replica is running"


@pytest.mark.parametrize(
    ("states", "status"),
    [
        (["busy", "ready"], "ready"),
        (["busy", "stopping"], "busy"),
        (["stopping", "no engine"], "no engine"),
        (["stopping"], "stopping"),
        ([], "stopping"),
    ],
)
def test_a_cluster_is_ready_while_one_replica_is(states: list[str], status: str) -> None:
    readiness = readiness_of([state("a", each) for each in states])
    assert readiness["status"] == status and readiness["requests"] == 3 * len(states)
