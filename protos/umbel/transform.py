"""Public linear maps between a delta and what travels: a shared random selection, and a randomised Hadamard rotation.

Only maps that are linear and the same for every device survive a sum. Both are drawn from the round's public seed by
AES-256 in counter mode, so that a device in any language finds the same ones.

The rotation spreads a delta's energy evenly over all numbers, so that one fixed scale suits a 16-bit ring (Suresh et
al. 2017, arXiv 1611.00429). It works in blocks of 4,096; block j takes the numbers j, j + blocks, j + 2 blocks, ... so
that every layer is spread over every block. Each block is `H X H` with the orthogonal 64 x 64 Hadamard matrix H: the
Kronecker form of a 4,096-point transform, as two matrix products, which are quicker than butterflies in numpy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

_SIDE: Final = 64
BLOCK: Final = _SIDE * _SIDE
_COLUMNS: Final = 32
"""Blocks worked on at a time: half a megabyte, and as much to work in, which stays in the cache."""
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

    def pieces(self, vector: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        """`numbers` float32 from `size`, in pieces that stay in the processor's cache; each overwrites the last."""
        if self.sent < self.size:
            vector = vector[_selection(self.size, self.sent, self.seed)]
        return _rotated(vector, self.numbers, self.seed) if self.rotated else iter((vector,))

    def forward(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """All pieces as one array."""
        return np.concatenate([piece.copy() for piece in self.pieces(vector)])

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


def _signs(numbers: int, seed: bytes) -> NDArray[np.uint8]:
    """1 for each number whose sign is flipped, else 0."""
    packed = np.frombuffer(_keystream(b"signs", seed, -(-numbers // 8)), np.uint8)
    return np.unpackbits(packed, count=numbers, bitorder="little")


@lru_cache(maxsize=2)
def _selection(size: int, sent: int, seed: bytes) -> NDArray[np.intp]:
    """The `sent` indices with the smallest 64-bit words of the key stream, in rising order."""
    words = np.frombuffer(_keystream(b"selection", seed, 8 * size), "<u8")
    # Several times quicker than sorting them all.
    last = np.partition(words, sent - 1)[sent - 1]
    taken = words < last
    taken[np.flatnonzero(words == last)[: sent - int(taken.sum())]] = True
    chosen = np.flatnonzero(taken)
    chosen.flags.writeable = False
    return chosen


@lru_cache(maxsize=1)
def _hadamard() -> NDArray[np.float32]:
    matrix: NDArray[np.float32] = np.ones((1, 1), np.float32)
    while len(matrix) < _SIDE:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix /= np.float32(math.sqrt(_SIDE))
    return matrix


def _rotated(vector: NDArray[np.float32], numbers: int, seed: bytes) -> Iterator[NDArray[np.float32]]:
    """The rotated vector, some blocks at a time.

    As a matrix of `BLOCK` rows, the padded vector has a block in each column; so a few columns are gathered with their
    signs, turned, and transformed.
    """
    count, signs = numbers // BLOCK, _signs(vector.size, seed)
    whole, rest = divmod(vector.size, count)
    rows, flips = vector[: whole * count].reshape(whole, count), signs[: whole * count].reshape(whole, count)
    blocks, scratch = _scratch(min(_COLUMNS, count))
    for first in range(0, count, _COLUMNS):
        last = min(first + _COLUMNS, count)
        turned, spare = blocks[: last - first], scratch[: last - first]
        columns, bits = (one.reshape(BLOCK, last - first) for one in (spare, turned))
        np.copyto(columns[:whole], rows[:, first:last])
        _flip(columns[:whole], flips[:, first:last], bits[:whole])
        columns[whole:] = 0
        if first < rest:
            some, tail = min(last, rest) - first, whole * count + first
            columns[whole, :some] = vector[tail : tail + some]
            _flip(columns[whole, :some], signs[tail : tail + some], bits[whole, :some])
        np.copyto(turned.reshape(-1, BLOCK), columns.T)
        yield _transformed(turned, spare).reshape(-1)


def _rotate_back(vector: NDArray[np.float32], sent: int, seed: bytes) -> NDArray[np.float32]:
    count = vector.size // BLOCK
    matrix = np.empty((BLOCK, count), np.float32)
    blocks, scratch = _scratch(min(_COLUMNS, count))
    for first in range(0, count, _COLUMNS):
        last = min(first + _COLUMNS, count)
        turned = blocks[: last - first]
        np.copyto(turned.reshape(-1, BLOCK), vector.reshape(count, BLOCK)[first:last])
        matrix[:, first:last] = _transformed(turned, scratch[: last - first]).reshape(-1, BLOCK).T
    signed = matrix.reshape(-1)[:sent]
    _flip(signed, _signs(sent, seed), np.empty_like(signed))
    return signed


def _scratch(width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    return np.empty((width, _SIDE, _SIDE), np.float32), np.empty((width, _SIDE, _SIDE), np.float32)


def _flip(numbers: NDArray[np.float32], flips: NDArray[np.uint8], spare: NDArray[np.float32]) -> None:
    """Turn the signs of those numbers over, in place: the topmost of 32 bits."""
    view, bits = numbers.view(np.uint32), spare.view(np.uint32)
    np.copyto(bits, flips)
    np.left_shift(bits, 31, out=bits)
    np.bitwise_xor(view, bits, out=view)


def _transformed(blocks: NDArray[np.float32], scratch: NDArray[np.float32]) -> NDArray[np.float32]:
    """H X H for each block X, in place; its own inverse."""
    hadamard = _hadamard()
    # Products this small run on one thread; a tall one would wake BLAS's others, which costs a busy device more.
    np.matmul(blocks, hadamard, out=scratch)
    return np.matmul(hadamard, scratch, out=blocks)
