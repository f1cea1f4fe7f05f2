"""Judging weights on many examples, on a machine that has more room than a device."""

from __future__ import annotations

import math
from typing import Final

from umbel.bundle import Bundle
from umbel.runtime import Runtime
from umbel.update import Metrics
from umbel.weights import Weights
from umbel_client import trainer
from umbel_client.examples import Examples

AT_ONCE: Final = 128
"""Examples in a batch. More are quicker for small models only, fewer for large ones only."""
SAMPLE: Final = 2000


def evaluate(bundle: Bundle, weights: Weights, examples: Examples, runtime: Runtime) -> Metrics:
    """Metric sums over `examples`; nothing over none."""
    return trainer.evaluate(bundle, weights, examples, runtime, at_once=AT_ONCE)


def sample(examples: Examples) -> Examples:
    """Two thousand of them at most, evenly spread, for a model on its way; its last version is judged on all."""
    if examples.count <= SAMPLE:
        return examples
    return examples.take(slice(None, None, math.ceil(examples.count / SAMPLE)))
