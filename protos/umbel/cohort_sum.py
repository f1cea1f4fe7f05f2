"""The end of a private round: over which set of reports it is summed, and what the two totals make together.

Both aggregators check the set; the helper answers for one set only. The leader then adds the helper's total to its own
and believes the result only if this cohort can have made it: one corrupted share makes all numbers uniformly random,
which no bound survives.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from umbel.clip_vote import WITHIN_CLIP, share_within
from umbel.descriptor import LABEL, RoundDescriptor
from umbel.errors import CohortTooSmall, OutOfBounds, SetRefused, SumImplausible
from umbel.ring import NOISE_TAIL, dequantise, from_lane, largest_magnitude, signed_norm
from umbel.shares import ClearSum, HelperTotal, LeaderTotal
from umbel.signatures import verify_signature
from umbel.update import Metrics, is_count


@dataclass(frozen=True, slots=True)
class HelperAnswer:
    """The helper's total, as it travels."""

    total: bytes
    signature: bytes

    def __repr__(self) -> str:
        return f"HelperAnswer({len(self.total)} bytes)"


@dataclass(frozen=True, slots=True, eq=False)
class CohortSum:
    """What a private round gives: sums over the cohort, and nothing about any one device."""

    total: NDArray[np.float32]
    """Sum of weight * delta, flat."""
    weight: int
    count: int
    metrics: Metrics
    within_clip: float | None = None
    """Which share of the cohort stayed within the round's clip, with the noise on it; None if nobody was asked."""


def require_set(descriptor: RoundDescriptor, ids: Sequence[bytes]) -> None:
    """Check the form of a set of reports: distinct, rising, as many as agreed.

    Raises:
        SetRefused: not in rising order, or one twice.
        CohortTooSmall, OutOfBounds: too few or too many.
    """
    if any(left >= right for left, right in pairwise(ids)):
        raise SetRefused("the set must name each report once, in rising order")
    if len(ids) < descriptor.minimum:
        raise CohortTooSmall(f"a sum over {len(ids)} reports; at least {descriptor.minimum} were agreed")
    if len(ids) > descriptor.maximum:
        raise OutOfBounds(f"a sum over {len(ids)} reports; at most {descriptor.maximum} were agreed")


def set_digest(rd: bytes, ids: Sequence[bytes]) -> bytes:
    """The name of a set of reports."""
    return hashlib.sha256(LABEL + b"/set\0" + rd + b"".join(ids)).digest()


def answer_statement(rd: bytes, ids: Sequence[bytes], total: bytes) -> bytes:
    """What the helper signs of its answer."""
    return LABEL + b"/answer\0" + rd + set_digest(rd, ids) + hashlib.sha256(total).digest()


def combine(
    descriptor: RoundDescriptor, rd: bytes, identity: bytes, total: LeaderTotal, ids: Sequence[bytes],
    answer: HelperAnswer,
) -> CohortSum:  # fmt: skip
    """Add the two totals over the same set and check what comes out; `total` is used up.

    Raises:
        SignatureInvalid: the answer isn't the helper's, or is for another round or set.
        WeightsMismatch: it has another length.
        SetRefused, CohortTooSmall, OutOfBounds: as `require_set` says.
        SumImplausible: a weight, number, norm or metric that this cohort can't have made.
    """
    require_set(descriptor, ids)
    statement = answer_statement(rd, ids, answer.total)
    verify_signature(identity, answer.signature, statement, "the helper's total")
    clear = total.plus(HelperTotal.from_bytes(total.layout, answer.total))
    weight = _checked_weight(descriptor, clear, len(ids))
    _check_range(descriptor, clear, weight, len(ids))
    numbers = dequantise(clear.numbers, 1.0 / descriptor.scale)
    metrics = _checked_metrics(descriptor, clear, len(ids))
    votes = metrics.pop(WITHIN_CLIP, None)
    within = None if votes is None else share_within(votes, len(ids))
    return CohortSum(descriptor.transform.backward(numbers), weight, len(ids), metrics, within)


def _checked_weight(descriptor: RoundDescriptor, clear: ClearSum, count: int) -> int:
    weight = int(clear.lanes[0])
    if not count <= weight <= count * descriptor.max_weight:
        raise SumImplausible(
            f"{count} reports can't weigh {weight}; a share was corrupted or a weight forged, the round is lost"
        )
    return weight


def _check_range(descriptor: RoundDescriptor, clear: ClearSum, weight: int, count: int) -> None:
    sigma = math.sqrt(descriptor.noise_variance)
    numbers = clear.numbers
    if largest_magnitude(numbers) > descriptor.level * weight + NOISE_TAIL * sigma:
        raise SumImplausible("a number of the sum is larger than this cohort can make it; the round is lost")
    # Rounding errors are independent, below 1 each; the last term is far out in the tail of their norm.
    spread = math.sqrt(numbers.size) + 6
    bound = weight * descriptor.clip_norm * descriptor.scale * (1 + 1e-5) + math.sqrt(count) * spread + sigma * spread
    if signed_norm(numbers) > bound:
        raise SumImplausible("the sum's norm is larger than this cohort can make it; the round is lost")


def _checked_metrics(descriptor: RoundDescriptor, clear: ClearSum, count: int) -> dict[str, float]:
    metrics = {}
    for lane, value in zip(descriptor.lanes, clear.lanes[1:], strict=True):
        noise = NOISE_TAIL * from_lane(math.ceil(math.sqrt(lane.noise_variance)))
        total = from_lane(int(value))
        least = -noise if is_count(lane.name) else -lane.bound * count - noise
        if not least <= total <= lane.bound * count + noise:
            raise SumImplausible(f"metric {lane.name!r} sums to {total}, which {count} reports can't make")
        metrics[lane.name] = total
    return metrics
