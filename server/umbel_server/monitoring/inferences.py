"""Questions to models: how many, how they went, how long they took, and which version answers."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import Metric

from umbel_server.monitoring.families import SECONDS, counter, gauge, number
from umbel_server.serving.inference import Inferred
from umbel_server.serving.service import ModelService

_QUICK = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, *SECONDS)
_UNKNOWN = ""
"""In place of a model's name that isn't one's: what callers make up becomes no label."""


class Inferences:
    """What programs ask of models."""

    def __init__(self, models: ModelService, registry: CollectorRegistry) -> None:
        self._models = models
        words = "Questions to models, by how they went: answered, or Umbel's code of the refusal."
        self._questions = Counter("umbel_inferences", words, ("model", "outcome"), registry=registry)
        words = "Examples that models answered."
        self._examples = Counter("umbel_inference_examples", words, ("model",), registry=registry)
        words = "How long answered questions waited for their turn, and for their version to be loaded."
        self._waited = Histogram("umbel_inference_waited_seconds", words, ("model",), registry=registry, buckets=_QUICK)
        words = "How long answered questions were in the model."
        self._ran = Histogram("umbel_inference_ran_seconds", words, ("model",), registry=registry, buckets=_QUICK)
        models.tell(self.count)

    def count(self, record: Inferred) -> None:
        """One more question."""
        model = record.model if record.model in self._models.served.catalogue.models else _UNKNOWN
        self._questions.labels(model, record.outcome).inc()
        if record.answered:
            self._examples.labels(model).inc(record.examples)
            self._waited.labels(model).observe(record.waited)
            self._ran.labels(model).observe(record.ran)

    def now(self) -> Iterator[Metric]:
        """What is so at a scrape."""
        served, standing = self._models.served, dict(self._models.served.standing)  # read on a thread
        words = "Questions that are being answered, or wait."
        yield number("umbel_inferences_open", words, self._models.inference.open)
        words = "The version that answers for a channel."
        versions = {at: float(answering.version) for at, answering in standing.items()}
        yield gauge("umbel_inference_version", words, ("model", "channel"), versions)
        words = "Whether what answers for a channel is what it stands at; 0: that doesn't load."
        current = {
            (model, channel): float((model, channel) in standing and not served.why_not(release))
            for model, offered in served.catalogue.models.items()
            for channel, release in offered.channels.items()
        }
        yield gauge("umbel_inference_current", words, ("model", "channel"), current)
        words = "Records of questions that the disk had no room or no time for."
        yield counter("umbel_inference_records_dropped", words, (), {(): float(self._models.dropped)})
