"""Values that add: what one device contributes, and the sum over a cohort.

Aggregation is a fold from `Aggregate.zero(shapes)`, in the order of arrival. Only an `Aggregate` can be turned into a
mean, so that a single update can't be taken for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from umbel.errors import OutOfBounds
from umbel.histograms import is_bin
from umbel.weights import Shapes, Weights, require_shapes

Metrics = Mapping[str, float]
"""Sums over examples, so that they add over devices: `loss`, `correct`, `examples`, …"""

_COUNTS: Final = frozenset({"correct", "examples", "train_examples"})

_BLOCK: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Update:
    """One device's contribution: its delta (new minus old), its weight, and its metric sums.

    An evaluation contributes metrics only; its delta is empty.
    """

    delta: Weights
    weight: float
    metrics: Metrics


def is_count(metric: str) -> bool:
    """Whether a metric counts examples, by its name: it is never negative."""
    return metric in _COUNTS or is_bin(metric)


def add_metrics(left: Metrics, right: Metrics) -> dict[str, float]:
    """Add sums by name; a name that one side lacks counts as zero there."""
    return {name: left.get(name, 0.0) + right.get(name, 0.0) for name in sorted({*left, *right})}


@dataclass(slots=True)
class Aggregate:
    """The running sum of weighted deltas over a cohort: O(model) memory, whatever the cohort's size."""

    shapes: Shapes
    total: NDArray[np.float32]
    """Sum of weight * delta, flat, in the order of `Weights.to_vector`."""
    weight: float
    count: int
    metrics: Metrics

    @classmethod
    def zero(cls, shapes: Shapes) -> Aggregate:
        """The sum over nobody."""
        size = sum(int(np.prod(shape)) for shape in shapes.values())
        return cls(dict(shapes), np.zeros(size, np.float32), 0.0, 0, {})

    def accumulate(self, update: Update) -> None:
        """Add one update in place.

        Raises:
            WeightsMismatch: the update is of another model.
        """
        require_shapes(update.delta.shapes, self.shapes)
        weight, scaled = np.float32(update.weight), np.empty(_BLOCK, np.float32)
        offset = 0
        for array in update.delta.arrays.values():
            flat = array.ravel()
            # By blocks, so that the product is added while it is still in the cache, and nothing is allocated.
            for start in range(0, flat.size, _BLOCK):
                part = flat[start : start + _BLOCK]
                product = np.multiply(part, weight, out=scaled[: part.size])
                total = self.total[offset + start : offset + start + part.size]
                np.add(total, product, out=total)
            offset += flat.size
        self.weight += update.weight
        self.count += 1
        self.metrics = add_metrics(self.metrics, update.metrics)

    def __add__(self, other: Aggregate) -> Aggregate:
        require_shapes(other.shapes, self.shapes)
        return Aggregate(
            self.shapes,
            self.total + other.total,
            self.weight + other.weight,
            self.count + other.count,
            add_metrics(self.metrics, other.metrics),
        )

    def mean(self) -> Weights:
        """The weighted mean delta.

        Raises:
            OutOfBounds: nobody has contributed any weight.
        """
        if not self.weight > 0:
            raise OutOfBounds("a mean over no weight at all; close the round as abandoned instead")
        return Weights.from_vector(self.total / np.float32(self.weight), self.shapes)
