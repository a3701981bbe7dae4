"""What GET /metrics tells Prometheus. No label holds what a user wrote."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from stages.serving.asking import Queue, Usage

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Figures:
    """The figures of one server; `registry` holds them all."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.registry = CollectorRegistry()
        self.requests = Counter("docsmith_requests", "Requests by route and status", ["route", "status"], registry=self.registry)
        self.first_token_s = Histogram(
            "docsmith_first_token_seconds",
            "From a request's arrival to the first token of its streamed answer",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.tokens = Counter("docsmith_tokens", "Tokens of prompts and of answers", ["of"], registry=self.registry)
        ProcessCollector(registry=self.registry)
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second line for each of ours
        self.registry.register(self)  # type: ignore[arg-type]

    def count(self, usage: Usage | None) -> None:
        if usage is not None:
            self.tokens.labels("prompts").inc(usage.prompt_tokens)
            self.tokens.labels("answers").inc(usage.completion_tokens)

    def collect(self) -> Iterator[Metric]:
        """What others keep count of, read when it is asked for."""
        engine: Any = self.queue.engine
        yield GaugeMetricFamily("docsmith_open_questions", "Questions that are answered or wait", self.queue.open)
        yield CounterMetricFamily("docsmith_engine_restarts", "Restarts of the engine", engine.restarts)
        yield GaugeMetricFamily("docsmith_ready", "1 while a model answers", int(engine.ready))
        yield GaugeMetricFamily("docsmith_replicas", "Engines that answer", engine.replicas)
        model = GaugeMetricFamily("docsmith_model", "The version of the model that answers", labels=["version"])
        if engine.served is not None:
            model.add_metric([engine.served.version], 1)
        yield model
