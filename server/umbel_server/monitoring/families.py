"""How a metric that is read at a scrape is written: a name, words, labels, and a number for each of their values."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

Labels = tuple[str, ...]
L = TypeVar("L", bound=Labels)

SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Buckets for what somebody waits for."""


def gauge(name: str, words: str, labels: Sequence[str], values: Mapping[L, float]) -> Metric:
    """Numbers that go up and down."""
    return _filled(GaugeMetricFamily(name, words, labels=labels), values)


def counter(name: str, words: str, labels: Sequence[str], values: Mapping[L, float]) -> Metric:
    """Numbers that only rise; `_total` is added to the name."""
    return _filled(CounterMetricFamily(name, words, labels=labels), values)


def number(name: str, words: str, value: float) -> Metric:
    """A gauge without labels."""
    return GaugeMetricFamily(name, words, value=value)


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[L, float]
) -> GaugeMetricFamily | CounterMetricFamily:
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


@dataclass(slots=True)
class Spread:
    """How many of something took how long; adds up."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    """One for each bound, and one for what is beyond the last."""
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """One more."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> Spread:
        """The same, to go on with."""
        return Spread(self.bounds, [*self.counts], self.total)

    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus counts: each bucket holds those before it."""
        found, below = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            below += count
            found.append((bound, float(below)))
        return found


def histogram(name: str, words: str, labels: Sequence[str], values: Iterable[tuple[L, Spread]]) -> Metric:
    """How many took how long."""
    family = HistogramMetricFamily(name, words, labels=labels)
    for these, spread in values:
        family.add_metric(these, spread.buckets(), spread.total)
    return family
