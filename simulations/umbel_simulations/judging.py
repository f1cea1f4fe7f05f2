"""Judging weights on many examples, on a machine that has more room than a device."""

from __future__ import annotations

from typing import Final

from umbel.bundle import Bundle
from umbel.runtime import Runtime
from umbel.update import Metrics
from umbel.weights import Weights
from umbel_client import trainer
from umbel_client.examples import Examples

AT_ONCE: Final = 128
"""Examples in a batch. More are quicker for small models only, fewer for large ones only."""


def evaluate(bundle: Bundle, weights: Weights, examples: Examples, runtime: Runtime) -> Metrics:
    """Metric sums over `examples`; nothing over none."""
    return trainer.evaluate(bundle, weights, examples, runtime, at_once=AT_ONCE)
