"""Public linear maps between a delta and what travels: a shared random selection, and a randomised Hadamard rotation.

Only maps that are linear and the same for every device survive a sum. Both are drawn from the round's public seed by
AES-256 in counter mode, so that a device in any language finds the same ones.

The rotation spreads a delta's energy evenly over all numbers, so that one fixed scale suits a 16-bit ring (Suresh et
al. 2017, arXiv 1611.00429). It works in blocks of 4,096; block j takes the numbers j, j + blocks, j + 2 blocks, ... so
that every layer is spread over every block. Each block is `H X H` with the orthogonal 64 x 64 Hadamard matrix H: the
Kronecker form of a 4,096-point transform, as two matrix products.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

_SIDE: Final = 64
BLOCK: Final = _SIDE * _SIDE
RANGE: Final = 4.5
"""After a rotation a number exceeds RANGE * norm / sqrt(numbers) about seven times in a million."""


def padded(numbers: int) -> int:
    """How many numbers a rotated vector has: a multiple of the block."""
    return -(-numbers // BLOCK) * BLOCK


@dataclass(frozen=True, slots=True)
class Transform:
    """The way from `size` numbers of a delta to `numbers` that travel, and back."""

    size: int
    sent: int
    """How many of them are selected; all, if equal to `size`."""
    rotated: bool
    seed: bytes

    @property
    def numbers(self) -> int:
        """How many numbers travel."""
        return padded(self.sent) if self.rotated else self.sent

    def scale_for(self, level: int, clip: float) -> float:
        """The factor that maps a delta of norm `clip` into ±level."""
        if not self.rotated:
            return level / clip
        return level * math.sqrt(max(self.numbers, 1)) / (RANGE * clip)

    def forward(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """`numbers` float32 from `size`; not written to, may be `vector` itself."""
        if self.sent < self.size:
            vector = vector[_selection(self.size, self.sent, self.seed)]
        return _rotate(vector, self.numbers, self.seed) if self.rotated else vector

    def backward(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """Undo `forward`; numbers that weren't selected are zero."""
        if self.rotated:
            vector = _rotate_back(vector, self.sent, self.seed)
        if self.sent < self.size:
            full = np.zeros(self.size, np.float32)
            full[_selection(self.size, self.sent, self.seed)] = vector
            return full
        return vector


def _keystream(purpose: bytes, seed: bytes, length: int) -> bytes:
    key = hashlib.sha256(b"umbel-2agg/1/" + purpose + b"\0" + seed).digest()
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(length))


@lru_cache(maxsize=2)
def _signs(numbers: int, seed: bytes) -> NDArray[np.float32]:
    bits = np.unpackbits(np.frombuffer(_keystream(b"signs", seed, -(-numbers // 8)), np.uint8), bitorder="little")
    signs = bits[:numbers].astype(np.float32)
    signs *= -2
    signs += 1
    signs.flags.writeable = False
    return signs


@lru_cache(maxsize=2)
def _selection(size: int, sent: int, seed: bytes) -> NDArray[np.intp]:
    """The `sent` indices with the smallest 64-bit words of the key stream, in rising order."""
    words = np.frombuffer(_keystream(b"selection", seed, 8 * size), "<u8")
    chosen = np.sort(np.argsort(words, kind="stable")[:sent])
    chosen.flags.writeable = False
    return chosen


@lru_cache(maxsize=1)
def _hadamard() -> NDArray[np.float32]:
    matrix: NDArray[np.float32] = np.ones((1, 1), np.float32)
    while len(matrix) < _SIDE:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix /= np.float32(math.sqrt(_SIDE))
    return matrix


def _rotate(vector: NDArray[np.float32], numbers: int, seed: bytes) -> NDArray[np.float32]:
    signed = np.empty(numbers, np.float32)
    np.multiply(vector, _signs(vector.size, seed), out=signed[: vector.size])
    signed[vector.size :] = 0
    blocks = np.ascontiguousarray(signed.reshape(BLOCK, -1).T).reshape(-1, _SIDE, _SIDE)
    return _blockwise(blocks).reshape(-1)


def _rotate_back(vector: NDArray[np.float32], sent: int, seed: bytes) -> NDArray[np.float32]:
    blocks = _blockwise(vector.reshape(-1, _SIDE, _SIDE)).reshape(-1, BLOCK)
    signed = np.ascontiguousarray(blocks.T).reshape(-1)[:sent]
    return signed * _signs(sent, seed)


def _blockwise(blocks: NDArray[np.float32]) -> NDArray[np.float32]:
    """H X H for each block X; its own inverse."""
    hadamard = _hadamard()
    # Products this small run on one thread; a tall one would wake BLAS's others, which costs a busy device more.
    both: NDArray[np.float32] = np.matmul(hadamard, np.matmul(blocks, hadamard))
    return both
