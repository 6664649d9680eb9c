"""Health, readiness and metrics of a cluster, combined from those of its processes."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

# The cluster has the first of these states that any replica has.
READINESS = ("ready", "busy", "no engine", "stopping")


class Families(Collector):
    """Metrics of several processes, merged by family."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._families: dict[str, Metric] = {}
        for metric in metrics:
            family = self._families.setdefault(metric.name, metric)
            if family is not metric:
                family.samples += metric.samples

    def collect(self) -> Iterator[Metric]:
        """Each family once, with the samples of all processes."""
        yield from self._families.values()


def labelled(registry: CollectorRegistry, replica: str) -> list[Metric]:
    """The registry's metrics, each sample with the label `replica`."""
    metrics = list(registry.collect())
    for metric in metrics:
        metric.samples = [
            sample._replace(labels={**sample.labels, "replica": replica})
            for sample in metric.samples
        ]
    return metrics


def health_of(replicas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The cluster's /health: ok while one replica is.

    replicas: the /health of each.
    """
    healthy = [replica for replica in replicas if replica["status"] == "ok"]
    first = (healthy or replicas or [{}])[0]
    caches = [replica["sentiment_cache"] for replica in replicas]
    return {
        "status": "ok" if healthy else "stopped",
        "reason": None if healthy else first.get("reason", "no replica is running"),
        "model": first.get("model"),
        "warning": first.get("warning"),
        "sentiment_cache": {
            name: sum(cache[name] for cache in caches) for name in ("hits", "misses")
        },
        "replicas": list(replicas),
    }


def readiness_of(replicas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The cluster's /ready: ready while one replica is.

    replicas: the /ready of each.
    """
    states = {replica["status"] for replica in replicas}
    return {
        "status": next((state for state in READINESS if state in states), "stopping"),
        "requests": sum(replica["requests"] for replica in replicas),
        "replicas": list(replicas),
    }
