"""Evidence as wealth: e-values, which grow by chance no more than once in 1 / alpha times beyond 1 / alpha.

Each of these is a mean of wealths won by betting against a claim, and so a wealth itself (Ramdas et al.,
"Game-theoretic statistics and safe anytime-valid inference", 2023): it may be looked at as often as one likes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

_TIMES_WORSE: Final = (1.5, 2.0, 3.0, 4.0, 6.0, 10.0)
"""The alternatives that a test bets on, in equal parts: failures so many times more frequent than they should be."""
_STAKES: Final = (0.05, 0.1, 0.2, 0.4, 0.7)
"""Shares of the largest safe bet, for measured values; in equal parts."""


def share_evidence(canary_failures: int, control_failures: int, odds: float) -> float:
    """How strongly failures speak for canaries that fail more often than controls do.

    Args:
        canary_failures: how many canaries failed.
        control_failures: how many controls did.
        odds: exposed canaries over exposed controls.
    """
    fair = odds / (1 + odds)
    wealth = 0.0
    for times in _TIMES_WORSE:
        biased = times * odds / (1 + times * odds)
        wealth += _likelihood_ratio(canary_failures, control_failures, biased, fair)
    return wealth / len(_TIMES_WORSE)


def mean_evidence(values: Sequence[float], limit: float, low: float, high: float) -> float:
    """How strongly values, cut to [low, high], speak for a mean above `limit` (an e-value by betting).

    Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", 2024: each value x multiplies
    the wealth by 1 + stake (x - limit), which is never negative and doesn't grow on average unless the mean is above.
    """
    largest = 1 / (limit - low)
    wealth = 0.0
    for share in _STAKES:
        stake = share * largest
        wealth += _exp(math.fsum(math.log1p(stake * (min(high, max(low, x)) - limit)) for x in values))
    return wealth / len(_STAKES)


def above_evidence(failures: int, count: int, expected: float) -> float:
    """How strongly so many failures of `count` speak for more than the share `expected`."""
    worse = [min(times * expected, (1 + expected) / 2) for times in _TIMES_WORSE]
    return sum(_likelihood_ratio(failures, count - failures, share, expected) for share in worse) / len(worse)


def below_evidence(failures: int, count: int, limit: float) -> float:
    """How strongly so many failures of `count` speak for less than the share `limit`."""
    better = [limit / times for times in _TIMES_WORSE]
    return sum(_likelihood_ratio(failures, count - failures, share, limit) for share in better) / len(better)


def _likelihood_ratio(hits: int, misses: int, share: float, null: float) -> float:
    return _exp(hits * math.log(share / null) + misses * math.log((1 - share) / (1 - null)))


def _exp(logarithm: float) -> float:
    return math.exp(min(logarithm, 700.0))


def ratio_evidence(counts: Sequence[int], weights: Sequence[float]) -> float:
    """How strongly an experiment's arms speak for a split other than by their weights (sample-ratio check).

    The likelihood of the counts under every split in equal parts, over that under the split by weights: a wealth of
    1 to begin with, that may be looked at after every device (Lindon and Malek, "Anytime-valid inference for
    multinomial count data", 2022).
    """
    total, arms = sum(counts), len(counts)
    shares = [weight / math.fsum(weights) for weight in weights]
    mixed = math.lgamma(arms) - math.lgamma(arms + total) + math.fsum(math.lgamma(1 + count) for count in counts)
    return _exp(mixed - math.fsum(count * math.log(share) for count, share in zip(counts, shares, strict=True)))
