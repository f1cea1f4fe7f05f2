"""The parts of a secret sum, one type each, so that misuse doesn't type-check.

    Cleartext --mask--> LeaderShare        one device's numbers, and what the leader may hold of them
    LeaderShare + ... = LeaderTotal        what the leader adds up
    masks + noise     = HelperTotal        what the helper adds up
    LeaderTotal + HelperTotal = ClearSum   the cohort's sum, and the first moment that anything can be read

All lie in one buffer: lanes of 64 bits, then numbers of k bits. Nothing here prints its content.
"""

from __future__ import annotations

import hashlib
from typing import Final, Self

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from umbel.descriptor import LABEL, Layout
from umbel.errors import WeightsMismatch
from umbel.ring import RingVector, ring_dtype

SEED_BYTES: Final = 32
_BLOCK_BYTES: Final = 1 << 18
_ZEROS: Final = memoryview(bytes(_BLOCK_BYTES))


class Share:
    """Lanes and numbers modulo 2^64 and 2^k, in one buffer."""

    __slots__ = ("layout", "raw")

    def __init__(self, layout: Layout, raw: NDArray[np.uint8] | None = None) -> None:
        self.layout = layout
        self.raw = np.zeros(layout.size, np.uint8) if raw is None else raw
        if self.raw.size != layout.size:
            raise WeightsMismatch(f"a share of {self.raw.size} bytes; this round's have {layout.size}")

    @classmethod
    def from_bytes(cls, layout: Layout, data: bytes) -> Self:
        """A share of its own from bytes; raises `WeightsMismatch` for another length."""
        return cls(layout, np.frombuffer(data, np.uint8).copy())

    @property
    def lanes(self) -> NDArray[np.uint64]:
        """The lanes, a view."""
        return self.raw[: 8 * self.layout.lanes].view("<u8")

    @property
    def numbers(self) -> RingVector:
        """The numbers, a view."""
        return self.raw[8 * self.layout.lanes :].view(ring_dtype(self.layout.bits))

    @property
    def buffer(self) -> memoryview:
        """All bytes, writable, without a copy."""
        return self.raw.data

    def to_bytes(self) -> bytes:
        """All bytes, copied."""
        return self.raw.tobytes()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.raw.size} bytes)"


class Cleartext(Share):
    """One device's encoded update. It never leaves the device."""

    __slots__ = ()

    def mask(self, seed: bytes, header: bytes) -> LeaderShare:
        """Subtract the seed's mask in place; the cleartext is gone."""
        _apply_mask(self, seed, header, np.subtract)
        return LeaderShare(self.layout, self.raw)


class LeaderShare(Share):
    """A masked update: uniformly random to whoever lacks the seed."""

    __slots__ = ()


class LeaderTotal(Share):
    """The sum of masked updates."""

    __slots__ = ()

    def add(self, share: LeaderShare) -> None:
        """Count a share."""
        np.add(self.lanes, share.lanes, out=self.lanes)
        np.add(self.numbers, share.numbers, out=self.numbers)

    def remove(self, share: LeaderShare) -> None:
        """Take back a share that the helper refused."""
        np.subtract(self.lanes, share.lanes, out=self.lanes)
        np.subtract(self.numbers, share.numbers, out=self.numbers)

    def plus(self, other: HelperTotal) -> ClearSum:
        """Add the masks in place: the cohort's sum, with the helper's noise."""
        np.add(self.lanes, other.lanes, out=self.lanes)
        np.add(self.numbers, other.numbers, out=self.numbers)
        return ClearSum(self.layout, self.raw)


class HelperTotal(Share):
    """The sum of masks, and noise."""

    __slots__ = ()

    def add_mask(self, seed: bytes, header: bytes) -> None:
        """Count the mask of one report."""
        _apply_mask(self, seed, header, np.add)

    def add_noise(self, lane: int, noise: NDArray[np.int64]) -> None:
        """Add an integer [1] to a lane, modulo 2^64."""
        self.lanes[lane : lane + 1] += noise.astype("<u8")

    def add_number_noise(self, noise: NDArray[np.int64], start: int) -> None:
        """Add integers to the numbers from `start` on, modulo 2^k."""
        self.numbers[start : start + noise.size] += noise.astype(self.numbers.dtype)


class ClearSum(Share):
    """The sum over a cohort."""

    __slots__ = ()


def _apply_mask(share: Share, seed: bytes, header: bytes, operation: np.ufunc) -> None:
    """share = operation(share, AES-256-CTR(seed)), in cache-sized blocks; the header separates streams."""
    start = hashlib.sha256(LABEL + b"/mask\0" + header).digest()[:8] + bytes(8)
    stream = Cipher(algorithms.AES(seed), modes.CTR(start)).encryptor()
    block = np.empty(_BLOCK_BYTES, np.uint8)
    out = block.data
    for part in (share.lanes, share.numbers):
        words = block.view(part.dtype)
        step = words.size
        for begin in range(0, part.size, step):
            piece = part[begin : begin + step]
            stream.update_into(_ZEROS[: piece.nbytes], out[: piece.nbytes])
            operation(piece, words[: piece.size], out=piece)
