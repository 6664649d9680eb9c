"""What is told of a cluster as a whole, made from what is told of each of its processes."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

# The first that holds for any replica holds for the cluster.
READINESS = ("ready", "busy", "no engine", "stopping")


class Families(Collector):
    """Metrics of several processes, family by family."""

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
    """As one server tells it: sound while one replica is.

    replicas: each one's own /health.
    """
    sound = [replica for replica in replicas if replica["status"] == "ok"]
    about = (sound or replicas or [{}])[0]
    caches = [replica["sentiment_cache"] for replica in replicas]
    return {
        "status": "ok" if sound else "stopped",
        "reason": None if sound else about.get("reason", "no replica is running"),
        "model": about.get("model"),
        "warning": about.get("warning"),
        "sentiment_cache": {
            name: sum(cache[name] for cache in caches) for name in ("hits", "misses")
        },
        "replicas": list(replicas),
    }


def readiness_of(replicas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """As one server tells it: ready while one replica is.

    replicas: each one's own /ready.
    """
    states = {replica["status"] for replica in replicas}
    return {
        "status": next((state for state in READINESS if state in states), "stopping"),
        "requests": sum(replica["requests"] for replica in replicas),
        "replicas": list(replicas),
    }
