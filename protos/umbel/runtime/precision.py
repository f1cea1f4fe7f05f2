"""Which graph answers: the one in fewer bits where a bundle has it and it holds here, else the one in float32.

A quantised graph was judged by its maker with other weights, and on another processor. So it is tried once more
whenever weights are bound: its answers to the golden inputs are compared with those of the float32 graph, with the same
weights on this machine. It never stands in for the golden check itself, for judging or for training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from umbel.errors import RuntimeFailure
from umbel.manifest import FLOAT32
from umbel.runtime import InferSession, Runtime
from umbel.weights import Weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from umbel.bundle import Bundle


def fastest(runtime: Runtime, bundle: Bundle, weights: Weights) -> tuple[InferSession, str]:
    """A session that answers with these weights, and the kind of numbers it does so in.

    Raises:
        WeightsMismatch: `weights` are not of this model.
        RuntimeFailure: the float32 graph doesn't load.
    """
    exact = runtime.infer(bundle, weights)
    precision = bundle.manifest.precision.get(runtime.name)
    if precision is None or precision.kind == FLOAT32:
        return exact, FLOAT32
    inputs = bundle.golden().inputs
    try:
        quantised = runtime.infer(bundle.quantised(runtime.name), weights)
        off = largest_difference(quantised(inputs), exact(inputs))
    except RuntimeFailure:
        return exact, FLOAT32
    return (quantised, precision.kind) if off <= precision.tolerance else (exact, FLOAT32)


def largest_difference(found: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> float:
    """The largest difference of any output, relative to that output's largest number; infinite if one is no number."""
    worst = 0.0
    for name, array in expected.items():
        gap = np.abs(found[name].astype(np.float64) - array)
        if not np.isfinite(gap).all():
            return float("inf")
        size = float(np.max(np.abs(array), initial=0.0))
        worst = max(worst, float(np.max(gap, initial=0.0)) / (size or 1.0))
    return worst
