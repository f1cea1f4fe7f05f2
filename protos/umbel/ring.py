"""Numbers in the ring Z_2^k: how a delta becomes integers whose sum can be formed without anyone seeing one of them.

A device scales its clipped delta, rounds each number up or down at random (so that the mean stays unbiased), keeps it
within `level` times its weight, and stores it modulo 2^k. Sums wrap; the head-room rule makes sure that the true sum
never does:

    level * max_weight * maximum + 8 * sigma  <  2^(k-1)

A power-of-two ring is what numpy adds natively. Nothing here reads a clock or a random source.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from umbel.errors import NotFinite, OutOfBounds

RING_BITS: Final = (16, 32)
LANE_FRACTION_BITS: Final = 16
"""Metrics travel as 64-bit fixed-point numbers with so many bits after the point."""
LANE_BITS: Final = 64
NOISE_TAIL: Final = 8
"""So many standard deviations of noise are left room for; the chance of more is below 2e-15 a number."""

_BLOCK: Final = 1 << 13
"""Numbers worked on at a time: the scratch stays in the processor's cache, and BLAS doesn't wake its threads."""

_ZEROS: Final = memoryview(bytes(4 * _BLOCK))

RingVector = NDArray[np.uint16] | NDArray[np.uint32] | NDArray[np.uint64]
"""Numbers modulo 2^k."""


def ring_dtype(bits: int) -> np.dtype[np.unsignedinteger]:
    """The unsigned type that wraps at 2^bits.

    Raises:
        OutOfBounds: not one of `RING_BITS` or the lanes' 64.
    """
    if bits not in (*RING_BITS, LANE_BITS):
        raise OutOfBounds(f"a ring of {bits} bits; known are {', '.join(map(str, RING_BITS))}")
    return np.dtype(f"<u{bits // 8}")


def require_headroom(bits: int, level: float, max_weight: int, maximum: int, noise_variance: int) -> None:
    """Raise `OutOfBounds`, saying what to change, if a sum over `maximum` devices could wrap."""
    needed = level * max_weight * maximum + NOISE_TAIL * math.sqrt(noise_variance)
    if needed >= 2 ** (bits - 1):
        raise OutOfBounds(
            f"a sum of up to {maximum} reports of weight {max_weight} at level {level:g} with noise of deviation "
            f"{math.sqrt(noise_variance):g} needs {needed:g}, and a ring of {bits} bits holds less than "
            f"{2 ** (bits - 1)}; take a wider ring, a smaller cohort, smaller weights or less noise"
        )


def largest_level(bits: int, max_weight: int, maximum: int, noise_variance: int) -> int:
    """The finest level that the head-room rule allows; 0 when there is none."""
    room = (1 << (bits - 1)) - 1 - math.ceil(NOISE_TAIL * math.sqrt(noise_variance))
    return max(0, room // (max_weight * maximum))


def l2_norm(vector: NDArray[np.float32]) -> float:
    """The Euclidean norm, summed in float64.

    Raises:
        NotFinite: NaN or infinity in the vector.
    """
    total = 0.0
    for start in range(0, vector.size, _BLOCK):
        block = vector[start : start + _BLOCK].astype(np.float64)
        total += float(np.dot(block, block))
    if not math.isfinite(total):
        raise NotFinite("the delta holds NaN or infinity; it isn't sent")
    return math.sqrt(total)


def rounded_norm_bound(clip: float, scale: float, numbers: int) -> float:
    """The norm, in ring units, that a rounded vector of norm at most `clip` keeps with probability 1 - exp(-1/2).

    From Kairouz, Liu and Steinke 2021 (arXiv 2102.06387, proposition 22): a device that rounds again until it holds
    has made it hold always, so that it is the sensitivity that noise is measured against.
    """
    norm = clip * scale
    spread = norm * norm + numbers / 4 + (norm + math.sqrt(numbers) / 2)
    return min(math.sqrt(spread), norm + math.sqrt(numbers))


def quantise(
    vector: NDArray[np.float32], factor: float, limit: int, chance: np.random.Generator, out: RingVector
) -> None:
    """Round `factor * vector` stochastically to integers within ±`limit`, into `out` (any ring, same length).

    Raises:
        NotFinite: NaN or infinity in the vector; `out` is then partly written and must not be used.
        OutOfBounds: `out` has another length.
    """
    if out.size != vector.size:
        raise OutOfBounds(f"{vector.size} numbers don't go into {out.size}")
    # Up to 2^15 float32 counts exactly; above, its rounding would step over the limit.
    work = np.float32 if out.dtype.itemsize == 2 else np.float64
    dice = _Dice(chance, min(_BLOCK, vector.size), out.dtype, work)
    scratch: NDArray[np.floating] = np.empty(min(_BLOCK, vector.size), work)
    signed = out.view(np.dtype(f"<i{out.dtype.itemsize}"))
    for start in range(0, vector.size, _BLOCK):
        stop = min(start + _BLOCK, vector.size)
        block = scratch[: stop - start]
        np.multiply(vector[start:stop], work(factor), out=block)
        np.add(block, dice.roll(block.size), out=block)
        np.floor(block, out=block)
        least, most = float(block.min()), float(block.max())
        if not (math.isfinite(least) and math.isfinite(most)):
            raise NotFinite("the delta holds NaN or infinity, or overflows when scaled; it isn't sent")
        if least < -limit or most > limit:
            np.clip(block, -limit, limit, out=block)
        signed[start:stop] = block


class _Dice:
    """Uniform numbers from 0 to 1, as many bits fine as the ring has: AES in counter mode under a key from `chance`.

    Several times faster than numpy's generators; a mean is off by 2^-17 of a ring's unit at most, as float32 is anyway.
    """

    def __init__(
        self, chance: np.random.Generator, size: int, fine: np.dtype[np.unsignedinteger], work: type[np.floating]
    ) -> None:
        self._stream = Cipher(algorithms.AES(chance.bytes(32)), modes.CTR(bytes(16))).encryptor()
        self._words = np.empty(size, fine)
        self._uniform: NDArray[np.floating] = np.empty(size, work)
        self._unit = work(2.0 ** (-8 * fine.itemsize))

    def roll(self, count: int) -> NDArray[np.floating]:
        """So many, at most `size`; overwritten by the next roll."""
        words, uniform = self._words[:count], self._uniform[:count]
        self._stream.update_into(_ZEROS[: words.nbytes], words.data.cast("B"))
        np.copyto(uniform, words)
        uniform *= self._unit
        return uniform


def to_signed(vector: RingVector) -> NDArray[np.signedinteger]:
    """The same bits read as two's complement: the true sum, given head-room."""
    return vector.view(np.dtype(f"<i{vector.dtype.itemsize}"))


def signed_norm(vector: RingVector) -> float:
    """The Euclidean norm of the numbers read as two's complement."""
    signed, total = to_signed(vector), 0.0
    for start in range(0, signed.size, _BLOCK):
        block = signed[start : start + _BLOCK].astype(np.float64)
        total += float(np.dot(block, block))
    return math.sqrt(total)


def largest_magnitude(vector: RingVector) -> int:
    """The largest absolute value of the numbers read as two's complement; 0 for none."""
    signed = to_signed(vector)
    return max(int(signed.max()), -int(signed.min())) if signed.size else 0


def dequantise(vector: RingVector, factor: float) -> NDArray[np.float32]:
    """The numbers read as two's complement, times `factor`."""
    signed = to_signed(vector)
    out = np.empty(vector.size, np.float32)
    for start in range(0, signed.size, _BLOCK):
        out[start : start + _BLOCK] = signed[start : start + _BLOCK] * np.float64(factor)
    return out


def to_lane(value: float, bound: float) -> int:
    """A metric as a 64-bit lane: fixed point, kept within ±bound (and not rounded over it), modulo 2^64.

    Raises:
        NotFinite: NaN or infinity.
    """
    if not math.isfinite(value):
        raise NotFinite(f"a metric is {value}; it isn't sent")
    unit = 1 << LANE_FRACTION_BITS
    scaled, most = value * unit, math.floor(bound * unit)  # noise is measured against the bound: it must hold in units
    return round(min(max(scaled, -most), most)) % (1 << LANE_BITS)


def from_lane(lane: int) -> float:
    """Undo `to_lane`, for a sum of lanes."""
    signed = lane - (1 << LANE_BITS) if lane >= 1 << (LANE_BITS - 1) else lane
    return signed / (1 << LANE_FRACTION_BITS)
