"""Chance is an argument: every generator is seeded by what it is for, never by the machine.

A run that is resumed, or told again elsewhere, draws the same numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np


def generator(*purpose: str | int) -> np.random.Generator:
    """A generator for one purpose, such as `generator(seed, task, round, device)`.

    The parts are hashed with their types and lengths, so that ("ab", "c") and ("a", "bc") differ.
    """
    digest = hashlib.sha256()
    for part in purpose:
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest.digest(), "little")))
