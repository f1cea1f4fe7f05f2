"""Integers from the discrete Gaussian: noise that lives in the ring, with nothing of a float left in it.

Structure after Canonne, Kamath and Steinke 2020 (arXiv 2004.00010, algorithms 2 and 3): a discrete Laplace proposal,
then rejection. Every decision has the form "is a uniform number below exp(-a/b)?" with integers a and b. It is first
asked in float64, with an error bound around the answer that is far wider than what numpy's division, product and exp
can be off by (a few units in the last place); the rare draw that falls inside the bound is decided exactly, by drawing
more bits and computing exp in as many decimal digits as it takes. So the sampler is exact as long as those three
operations are accurate to `_SLACK`, and as fast as numpy.

It isn't constant-time: its duration tells how many candidates were refused, which doesn't depend on anyone's data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Context, Decimal
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

from umbel.errors import OutOfBounds

Entropy = Callable[[int], bytes]
"""So many random bytes, such as `secrets.token_bytes`."""

MAX_VARIANCE: Final = 1 << 56
_SLACK: Final = 2.0**-44
"""Half-width of the zone around exp(-a/b) in which float64 isn't trusted."""


def discrete_gaussian(variance: int, size: int, entropy: Entropy, *, slack: float = _SLACK) -> NDArray[np.int64]:
    """`size` independent integers x with probability proportional to exp(-x^2 / (2 * variance)).

    Args:
        variance: the parameter sigma^2, a positive integer (the variance, but for a part below 1e-8 from 1 on).
        size: how many.
        entropy: where random bytes come from.
        slack: how near to a decision float64 is trusted; a wider one only makes it slower.

    Raises:
        OutOfBounds: a variance outside 1 to `MAX_VARIANCE`.
    """
    if not 1 <= variance <= MAX_VARIANCE:
        raise OutOfBounds(f"a noise variance of {variance}; it must lie between 1 and {MAX_VARIANCE}")
    out = np.empty(size, np.int64)
    filled = 0
    while filled < size:
        wanted = min(int((size - filled) * 2.4) + 32, 1 << 18)
        found = _candidates(variance, wanted, _Coin(entropy, slack))[: size - filled]
        out[filled : filled + found.size] = found
        filled += found.size
    return out


def _candidates(variance: int, count: int, coin: _Coin) -> NDArray[np.int64]:
    """One batch of proposals, those accepted."""
    scale = math.isqrt(variance) + 1
    low = coin.below(scale, count)
    low = low[coin.exp_minus(low, scale)]
    magnitude: NDArray[np.int64] = low + scale * coin.geometric(low.size)
    negative = coin.bits(magnitude.size)
    kept = ~(negative & (magnitude == 0))
    signed: NDArray[np.int64] = np.where(negative, -magnitude, magnitude)[kept]
    # exp(-(|y| - variance/scale)^2 / (2 variance)), over a common denominator.
    offset = np.abs(signed) * scale - variance
    return signed[coin.exp_minus_square(offset, scale, variance)]


class _Coin:
    """Decisions with exact probabilities, from random bytes."""

    def __init__(self, entropy: Entropy, slack: float) -> None:
        self._entropy = entropy
        self._slack = slack

    def _words(self, count: int) -> NDArray[np.uint64]:
        return np.frombuffer(self._entropy(8 * count), "<u8")

    def bits(self, count: int) -> NDArray[np.bool_]:
        """Fair coins."""
        packed = np.frombuffer(self._entropy(-(-count // 8)), np.uint8)
        return np.unpackbits(packed)[:count].astype(np.bool_)

    def below(self, bound: int, count: int) -> NDArray[np.int64]:
        """Uniform integers under `bound`: words beyond its last whole multiple are drawn again."""
        last = (1 << 64) - (1 << 64) % bound
        words = self._words(count).copy()
        while last < 1 << 64 and (over := words >= np.uint64(last)).any():
            words[over] = self._words(int(over.sum()))
        return (words % np.uint64(bound)).astype(np.int64)

    def geometric(self, count: int) -> NDArray[np.int64]:
        """Integers v with P(v >= j) = exp(-j)."""
        result = np.zeros(count, np.int64)
        alive = np.arange(count)
        while alive.size:
            alive = alive[self.exp_minus(np.ones(alive.size, np.int64), 1)]
            result[alive] += 1
        return result

    def exp_minus(self, numerator: NDArray[np.int64], denominator: int) -> NDArray[np.bool_]:
        """True with probability exp(-numerator/denominator), each."""
        exponent = numerator / np.float64(denominator)
        return self._decide(exponent, lambda index: Fraction(int(numerator[index]), denominator))

    def exp_minus_square(self, offset: NDArray[np.int64], scale: int, variance: int) -> NDArray[np.bool_]:
        """True with probability exp(-offset^2 / (2 * variance * scale^2)), each."""
        root = offset / np.float64(scale)
        exponent = root * root / np.float64(2 * variance)
        denominator = 2 * variance * scale * scale
        return self._decide(exponent, lambda index: Fraction(int(offset[index]) ** 2, denominator))

    def _decide(self, exponent: NDArray[np.float64], exactly: Callable[[int], Fraction]) -> NDArray[np.bool_]:
        prefix = self._words(exponent.size) >> np.uint64(11)
        distance = np.exp(-exponent) - prefix * 2.0**-53
        accepted: NDArray[np.bool_] = distance > 0
        for index in np.flatnonzero(np.abs(distance) <= self._slack):
            accepted[index] = self._below_exp(int(prefix[index]), exactly(int(index)))
        return accepted

    def _below_exp(self, prefix: int, exponent: Fraction) -> bool:
        """Whether a uniform number that begins with these 53 bits lies below exp(-exponent)."""
        bits, digits = 53, 30
        while True:
            context = Context(prec=digits)
            power = context.exp(-context.divide(Decimal(exponent.numerator), Decimal(exponent.denominator)))
            # Division and exp are each right to the last digit; the exponent itself is below 10^5.
            margin = Fraction(10) ** (7 - digits)
            lowest, highest = Fraction(power) - margin, Fraction(power) + margin
            if Fraction(prefix + 1, 1 << bits) <= lowest:
                return True
            if Fraction(prefix, 1 << bits) >= highest:
                return False
            prefix = prefix << 64 | int.from_bytes(self._entropy(8), "little")
            bits, digits = bits + 64, digits + 20
