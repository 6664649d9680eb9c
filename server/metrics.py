"""The metrics at /metrics, for Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.core.engine.engine import Engine
from server.core.engine.sequence import Sequence
from server.core.roles.classifier import Classifier
from server.gate import Gate

SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 30, 60, 300)


class Metrics:
    """The metrics of one server, an observer of its engine. Thread-safe."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "qwen_requests", "Requests answered.", ["route", "status"], registry=self.registry
        )
        self._request_seconds = Histogram(
            "qwen_request_seconds", "From the request to the end of its answer.", ["route"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self._first_token_seconds = Histogram(
            "qwen_first_token_seconds", "From a sequence's submission to its first token.",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self._next_token_seconds = Histogram(
            "qwen_next_token_seconds", "Between two tokens of a sequence.",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self._tokens = Counter(
            "qwen_tokens", "Tokens: of prompts, of these the cached ones, and generated ones.",
            ["kind"], registry=self.registry,
        )  # fmt: skip

    def request_answered(self, route: str, status: int, seconds: float) -> None:
        """route: from the route table, so that clients cannot create new label values."""
        self._requests.labels(route, status).inc()
        self._request_seconds.labels(route).observe(seconds)

    def token_sampled(self, seconds: float, *, is_first: bool) -> None:
        """seconds: since the sequence was submitted, or since its last token."""
        histogram = self._first_token_seconds if is_first else self._next_token_seconds
        histogram.observe(seconds)

    def sequence_ended(self, sequence: Sequence) -> None:
        """Counts the sequence's tokens."""
        self._tokens.labels("prompt").inc(len(sequence.prompt_ids))
        self._tokens.labels("cached").inc(sequence.num_cached or 0)
        self._tokens.labels("generated").inc(len(sequence.completion_ids))


class StateCollector(Collector):
    """Collects the server's state at the time of the scrape."""

    def __init__(self, engine: Engine, classifier: Classifier, gate: Gate) -> None:
        self._engine, self._classifier, self._gate = engine, classifier, gate

    def collect(self) -> Iterator[Metric]:
        """One family for each metric."""
        sequences = GaugeMetricFamily(
            "qwen_sequences", "Sequences in the engine.", labels=["state"]
        )
        sequences.add_metric(["running"], self._engine.num_running)
        sequences.add_metric(["waiting"], self._engine.num_waiting)
        yield sequences
        yield GaugeMetricFamily(
            "qwen_requests_inside", "Requests being served.", self._gate.num_requests
        )
        if (num_kv_tokens := self._engine.num_kv_tokens) is not None:
            yield GaugeMetricFamily(
                "qwen_kv_tokens", "Tokens that the KV memory has room for now.", num_kv_tokens
            )
        results = CounterMetricFamily(
            "qwen_classifications", "Texts judged, by source of the result.", labels=["source"]
        )
        results.add_metric(["cache"], self._classifier.num_hits)
        results.add_metric(["model"], self._classifier.num_misses)
        yield results
        labels = CounterMetricFamily(
            "qwen_labels", "Labels given by the server's tasks.", labels=["task", "label"]
        )
        for (task, label), count in self._classifier.label_counts.items():
            labels.add_metric([task, label], count)
        yield labels
