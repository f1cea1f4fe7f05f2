"""What a device runs for a task, for how long, and within which limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from umbel.errors import OutOfBounds
from umbel.fields import MAX_COUNT

_BOUNDS: Final = {
    "epochs": (0, 2**32 - 1),
    "batch_size": (1, 2**32 - 1),
    "max_steps": (0, 2**32 - 1),
    "max_examples": (0, MAX_COUNT),
    "min_examples": (0, MAX_COUNT),
    "seed": (0, 2**64 - 1),
}
"""Least and greatest that travel."""


class Kind(Enum):
    """What a task asks of a device."""

    TRAIN = "train"
    EVALUATE = "evaluate"


@dataclass(frozen=True, slots=True)
class Plan:
    """One device's share of a task.

    Every plan first evaluates the version it was handed on the device's held-back examples, so that each round also
    tells how good its parent is; a TRAIN plan then trains and reports a delta.
    """

    kind: Kind = Kind.TRAIN
    epochs: int = 1
    """How often each training example is seen."""
    batch_size: int = 16
    max_steps: int = 0
    """Stop after so many steps; 0 means no such limit."""
    max_examples: int = 0
    """Use only so many of the newest training examples; 0 means all."""
    min_examples: int = 1
    """A device with fewer training (or, to evaluate, held-back) examples doesn't take part."""
    max_seconds: float = 0.0
    """Stop training after so long; 0 means no such limit."""
    clip_norm: float = 0.0
    """Largest norm of a delta, made to hold on the device; 0 means no clipping."""
    max_weight: float = 10_000.0
    """Largest weight (number of examples) with which one device may count."""
    hyperparameters: Mapping[str, float] = field(default_factory=dict)
    """Scalar inputs of the training graph by name (`lr`, `mu`, …); others keep the manifest's values."""
    seed: int = 0
    """The task's seed; a device draws from (seed, task, round, device)."""

    def __post_init__(self) -> None:
        for name, (least, most) in _BOUNDS.items():
            if not least <= getattr(self, name) <= most:
                raise OutOfBounds(f"{name} is {getattr(self, name)}; it must lie between {least} and {most}")
        numbers = {
            "max_seconds": self.max_seconds,
            "clip_norm": self.clip_norm,
            "max_weight": self.max_weight,
        }
        for name, value in (numbers | dict(self.hyperparameters)).items():
            if not math.isfinite(value) or value < 0:
                raise OutOfBounds(f"{name} is {value}; it must be a number that isn't negative")
