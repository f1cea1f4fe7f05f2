"""Has the fleet's data changed, or has the model got worse on it? Told from what rounds sum up, and from nothing else.

Two windows of rounds are compared: the rounds of one are a reference, those of the other are recent. The examples of
one device hang together, so a test that counts examples calls every cohort another world, and a fixed limit on a
distance (0.1 or 0.25 of the PSI are usual) doesn't see half a fleet that has moved a little. So rounds are the units:
how far the windows are apart is held against how far they would be if the same rounds were parted in any other way (a
permutation test; Pitman 1937, "Significance tests which may be applied to samples from any populations"; Good 2005,
"Permutation, Parametric and Bootstrap Tests of Hypotheses"). Devices may differ as they will, and sums may have noise
in them that makes counts negative: the other ways have both too.

No bound on weights holds for counts: a device may tell of a million examples. So each round has one voice, whatever
stands in it: its shares of examples, or its rank among the rounds. A device that lies in one round spoils one voice of
its window, and makes hardly an alarm of it, for of all ways a good part takes that round into the recent window.

Pure: which rounds there are, and what they measured, stands in `umbel_server.drift_report`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain, combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from umbel.histograms import Histogram
from umbel.randomness import generator
from umbel.update import Metrics

LOSS: Final = "loss per example"
ACCURACY: Final = "right answers"
"""What is compared beside histograms, by names that no histogram can have."""

_EXACT: Final = 10_000
"""Up to so many ways are gone through; of more, so many are drawn."""
_TIE: Final = 1e-9
"""What differs by less than this share differs by rounding."""
_EMPTY: Final = 1e-4
"""The share that a bin counts as, for the PSI, which is empty or negative by noise."""

Numbers = NDArray[np.float64]


class Verdict(Enum):
    """What can be said of one thing."""

    DRIFT = "drift"
    STEADY = "steady"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Splits:
    """Ways to part rounds into two windows; the first is how they are parted."""

    taken: Numbers
    """1 where a way takes a round into the recent window, else 0. [ways, rounds], the rounds of the reference first"""

    @classmethod
    def of(cls, reference: int, recent: int) -> Splits:
        """All ways to choose `recent` of the rounds if these are few, else some thousands drawn by a fixed seed."""
        rounds = reference + recent
        ways = math.comb(rounds, recent)
        if ways > _EXACT:
            taken = np.zeros((_EXACT + 1, rounds), bool)
            taken[:, reference:] = True
            generator("drift", reference, recent).permuted(taken[1:], axis=1, out=taken[1:])
            return cls(taken.astype(np.float64))
        chosen = chain.from_iterable(combinations(reversed(range(rounds)), recent))  # the newest rounds come first
        matrix = np.zeros((ways, rounds))
        places = np.fromiter(chosen, np.intp, ways * recent).reshape(ways, recent)
        np.put_along_axis(matrix, places, 1.0, axis=1)
        return cls(matrix)

    @property
    def least(self) -> float:
        """The smallest p-value that can come of them."""
        return 1 / len(self.taken)

    def p_value(self, apart: Numbers, tie: float) -> float:
        """The share of ways that put the windows at least as far apart as the first does, which is one of them.

        With drawn ways that is (1 + b) / (1 + m), which is never too small (Phipson and Smyth 2010). A way that gives
        no number counts as far.
        """
        return float(np.mean(~(apart < apart[0] - tie)))

    def windows(self, values: Numbers) -> tuple[Numbers, Numbers]:
        """The means of the reference and of the recent window, as they are. [...] of [rounds, ...]"""
        reference = len(values) - int(self.taken[0].sum())
        return values[:reference].mean(axis=0), values[reference:].mean(axis=0)


@dataclass(frozen=True, slots=True)
class Finding:
    """How one thing was, how it is, and whether that is chance."""

    what: str
    """A histogram's name, `LOSS` or `ACCURACY`."""
    p_value: float
    verdict: Verdict
    before: float
    after: float
    """The mean bin, counted from 0; the loss; or the share of right answers. NaN for what nobody measured."""
    psi: float | None = None
    """Of a histogram: the population stability index (Siddiqi 2006, "Credit Risk Scorecards")."""
    edges: tuple[float, ...] = ()
    reference: tuple[float, ...] = ()
    recent: tuple[float, ...] = ()
    """Shares of examples, by bin: means over the rounds, which noise may have made negative."""


def findings(splits: Splits, rounds: Sequence[Metrics], histograms: Sequence[Histogram], below: float) -> list[Finding]:
    """Hold two windows against each other: each histogram, and whether loss and right answers have got worse.

    Args:
        splits: of so many rounds into a reference and a recent window.
        rounds: what each round's cohort measured, the reference's first.
        histograms: of the model, the same for all these rounds.
        below: which p-value is drift.
    """
    return [
        *(_of_histogram(histogram, splits, rounds, below) for histogram in histograms),
        *_of_answers(splits, rounds, below),
    ]


def _of_histogram(histogram: Histogram, splits: Splits, rounds: Sequence[Metrics], below: float) -> Finding:
    shares = _shares(np.stack([histogram.counts(metrics) for metrics in rounds]))
    apart = _distances(splits, shares)
    p_value = splits.p_value(apart, _TIE * apart[0])
    was, now = splits.windows(shares)
    bins = np.arange(len(was))
    return Finding(
        histogram.name,
        p_value,
        _verdict(p_value, splits, below, bool(np.isfinite(apart[0]))),
        float(was @ bins),
        float(now @ bins),
        _psi(was, now),
        histogram.edges,
        tuple(was.tolist()),
        tuple(now.tolist()),
    )


def _shares(counts: Numbers) -> Numbers:
    """Counts as shares of their round's sum; NaN where noise has left no sum. [rounds, bins]"""
    sums = counts.sum(axis=1, keepdims=True)
    return counts / np.where(sums > 0, sums, np.nan)


def _distances(splits: Splits, shares: Numbers) -> Numbers:
    """How far the windows' mean shares are apart, by each way, in whatever unit. [ways]

    As in a chi-square, squared differences are measured by what chance does to a bin; but by how the rounds differ
    there, not by how many examples there are: so noise in bins that are nearly empty doesn't drown the others.
    """
    spread = shares.var(axis=0)
    weights = np.divide(1.0, spread, out=np.zeros_like(spread), where=~(spread < _TIE**2))
    # What one window is above the mean of all, the other is below.
    return np.asarray((splits.taken @ (shares - shares.mean(axis=0))) ** 2 @ weights)


def _psi(before: Numbers, after: Numbers) -> float:
    was, now = np.maximum(before, _EMPTY), np.maximum(after, _EMPTY)
    return float(((now - was) * np.log(now / was)).sum())


def _of_answers(splits: Splits, rounds: Sequence[Metrics], below: float) -> Iterator[Finding]:
    for what, metric, sign in ((LOSS, "loss", 1.0), (ACCURACY, "correct", -1.0)):
        if all(metric in metrics and "examples" in metrics for metrics in rounds):
            yield _of_mean(what, np.array([_mean(metrics, metric) for metrics in rounds]), sign, splits, below)


def _mean(metrics: Metrics, name: str) -> float:
    return metrics[name] / metrics["examples"] if metrics["examples"] > 0 else math.nan


def _of_mean(what: str, means: Numbers, sign: float, splits: Splits, below: float) -> Finding:
    """By ranks, as in the rank-sum test (Wilcoxon 1945), for a loss has no bound.

    One-sided: rounds of training make a model better, and that is no drift.
    """
    worse = sign * means
    ordered = np.sort(worse)
    ranks = np.searchsorted(ordered, worse) + np.searchsorted(ordered, worse, "right")  # twice; those alike share one
    p_value = splits.p_value(splits.taken @ ranks, 0.0)
    was, now = splits.windows(means)
    return Finding(
        what, p_value, _verdict(p_value, splits, below, bool(np.isfinite(means).all())), float(was), float(now)
    )


def _verdict(p_value: float, splits: Splits, below: float, known: bool) -> Verdict:
    if not known or splits.least >= below:
        return Verdict.UNKNOWN
    return Verdict.DRIFT if p_value < below else Verdict.STEADY
