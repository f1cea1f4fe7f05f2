"""Examples that the packaged model can learn within a second: each class swings at a frequency of its own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from umbel.randomness import generator

CLASSES = 7


def recordings(count: int, *seed: str | int, shift: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Windows [count, 6, 100] and their classes [count]; `shift` renames the classes, as another person might."""
    chance = generator("recordings", *seed)
    classes = np.arange(count) % CLASSES
    time = np.arange(100) / 100
    phases = chance.normal(0, 0.2, (count, 6, 1))
    swings = np.sin(2 * np.pi * (1 + 2 * classes[:, None, None]) * time + phases)
    noise = chance.normal(0, 0.05, (count, 6, 100))
    return (swings + noise).astype(np.float32), ((classes + shift) % CLASSES).astype(np.int64)
