"""Chance is an argument: every generator is seeded by what it is for, never by the machine.

A run that is resumed, or told again elsewhere, draws the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from umbel.manifest import Manifest

SEED: Final = "seed"
"""The scalar input of a training graph that has dropout: a whole number from 0 up to 2**24."""


def generator(*purpose: str | int) -> np.random.Generator:
    """A generator for one purpose, such as `generator(seed, task, round, device)`.

    The parts are hashed with their types and lengths, so that ("ab", "c") and ("a", "bc") differ.
    """
    parts = [f"{type(part).__name__}:{part}".encode() for part in purpose]
    digest = hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()
    # The seed is this number; its words are the same to NumPy, and quicker, as long as the last one counts.
    words = np.frombuffer(digest, "<u4")
    return np.random.Generator(np.random.PCG64(words if words[-1] else int.from_bytes(digest, "little")))


def with_seed(manifest: Manifest, chosen: Mapping[str, float], *purpose: str | int) -> dict[str, float]:
    """Hyper-parameters for a training session: the chosen ones, and a seed for dropout where the model has some.

    A seed that was chosen stays.
    """
    if SEED not in manifest.hyperparameters or SEED in chosen:
        return dict(chosen)
    return {**chosen, SEED: float(generator(*purpose, "dropout").integers(2**24))}
