"""Which of a device's examples a model can use: whole numbers may lie outside what it has labels or room for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from umbel.bundle import Bundle
from umbel.errors import InputMismatch, RuntimeFailure
from umbel.runtime import Runtime
from umbel_client.examples import Examples, Split
from umbel_client.predictor import require_labels
from umbel_client.trainer import EVALUATE_BATCH

Rows = NDArray[np.intp]


def usable(found: Split, bundle: Bundle, runtime: Runtime, before_each: Callable[[], None]) -> Split:
    """Only those examples that the model's labels name and its `evaluate` graph takes.

    Args:
        found: the examples.
        bundle: the model.
        runtime: runs its graph: what numbers that takes stands nowhere else.
        before_each: called before each batch.
    """
    session = runtime.evaluate(bundle, bundle.shared_weights())

    def taken(examples: Examples, rows: Rows) -> Rows:
        batch = examples.take(rows)
        try:
            require_labels(bundle.manifest, batch.targets)
            session(batch.inputs, batch.targets)
        except (InputMismatch, RuntimeFailure):
            if len(rows) == 1:
                return rows[:0]
            return np.concatenate([taken(examples, half) for half in np.array_split(rows, 2)])
        return rows

    def only(examples: Examples) -> Examples:
        kept = []
        for start in range(0, examples.count, EVALUATE_BATCH):
            before_each()
            kept.append(taken(examples, np.arange(start, min(start + EVALUATE_BATCH, examples.count))))
        return examples.take(np.concatenate(kept)) if kept else examples

    return Split(only(found.training), only(found.held_back))
