"""`/metrics`: the engine's numbers for Prometheus, and the times that requests took."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from duo_jax.serve.engine import Engine

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
# Name, help, and the field of `duo_jax.serve.engine.Metrics`.
GAUGES = (
    ("rows", "Requests that can decode together", "rows"),
    ("requests_running", "Requests with a row", "running"),
    ("requests_waiting", "Requests that wait for a row", "waiting"),
    ("pages", "Pages of the KV cache", "pages"),
    ("pages_free", "Pages that nothing uses", "pages_free"),
    ("pages_prefix", "Pages of known prefixes", "pages_prefix"),
    ("snapshots", "Copies of rings that known prefixes and replies have", "snapshots"),
    ("kv_bytes", "Bytes of keys and values in use", "kv_bytes"),
    ("kv_full_bytes", "Bytes that full attention would hold for the same tokens", "full_kv_bytes"),
)
COUNTERS = (
    ("prompts", "Prompts that began to be computed", "prompts"),
    ("prefix_hits", "Prompts that began with a known prefix", "hits"),
    ("prompt_tokens", "Tokens of prompts", "prompt_tokens"),
    ("cached_tokens", "Tokens of prompts that were not computed again", "cached_tokens"),
    ("reply_tokens", "Tokens of replies", "reply_tokens"),
    ("preemptions", "Times that a request lost its pages for a while", "preemptions"),
)


class _EngineNumbers(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """The numbers of now."""
        metrics = self._engine.metrics()
        for name, text, field in GAUGES:
            yield GaugeMetricFamily(f"duo_{name}", text, value=getattr(metrics, field))
        for name, text, field in COUNTERS:
            yield CounterMetricFamily(f"duo_{name}", text, value=getattr(metrics, field))
        finished = CounterMetricFamily("duo_replies", "Replies that have ended, by the reason", labels=["reason"])
        for reason, count in metrics.finished.items():
            finished.add_metric([reason], count)
        yield finished


class Measurements:
    """What `/metrics` shows."""

    def __init__(self, engine: Engine) -> None:
        """In a registry of their own, so that a process can have several servers."""
        self._registry = CollectorRegistry()
        self._registry.register(_EngineNumbers(engine))
        settings: dict[str, Any] = {"registry": self._registry, "buckets": SECONDS}
        self.first_token = Histogram("duo_first_token_seconds", "From a request to its first token", **settings)
        self.whole = Histogram("duo_request_seconds", "From a request to the end of its last reply", **settings)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)
