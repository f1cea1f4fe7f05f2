"""How a task's updates are summed in secret: its settings, and the round descriptor that follows from them.

Everything in a descriptor follows from what is stored (task, round, base version) and the helper's key, so a
coordinator that dies after the helper's countersignature proposes the very same one again.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Final

from umbel.clip_vote import VOTE, WITHIN_CLIP
from umbel.clock import DAY
from umbel.descriptor import (
    LONGEST_SECONDS,
    SEED_BYTES,
    Lane,
    RoundDescriptor,
    plan_digest,
    sensitivity,
    together,
)
from umbel.errors import BadInput, OutOfBounds
from umbel.manifest import Manifest
from umbel.plan import Kind
from umbel.ring import LANE_FRACTION_BITS, RING_BITS, largest_level
from umbel.transform import Transform
from umbel_server.privacy_settings import PrivacySettings
from umbel_server.round import Round, RoundKey
from umbel_server.task import Task
from umbel_server.validation import TRAINING_METRICS

WIDE_RING_NUMBERS: Final = 1_000_000
"""Up to so many numbers a 32-bit ring is used by default; above, a 16-bit ring with rotation."""
METRIC_BOUND: Final = float(1 << 24)
_MOST_WEIGHT: Final = 1024
_FINE: Final = {16: 127, 32: 4096}
"""The level that is kept free before weights get more than one step."""
_MOST_VOTE_NOISE: Final = 4096.0
"""What a lane has room for."""
_VOTE_NOISE_SHARE: Final = 1 / 20
"""Of the cohort, as Andrew et al. 2021 recommend it for the noise on the count of unclipped devices."""
_COARSEST: Final = {16: 7, 32: 127}
HELPER_SECONDS: Final = DAY
"""How long after its deadline a round waits for a helper that is away."""


def propose(
    task: Task, held: Round, lanes: tuple[str, ...], size: int, keys: tuple[bytes, bytes], clip: float
) -> RoundDescriptor:
    """The descriptor of a round, before anyone signed it.

    Args:
        task, held: the round, and whose it is.
        lanes, size: names of metrics that are summed, and the numbers of a delta.
        keys: the leader's and the helper's public key (X25519, raw).
        clip: this round's largest norm of one device's delta.

    Raises:
        OutOfBounds: no ring has room for it; says what to change.
        CohortTooSmall: a cohort that hides nothing.
        BadInput: a metric with a name that is taken.
    """
    if size:
        _require_clip(clip)
    clip = clip or 1.0  # an evaluation has no delta, and any clip does
    settings, key, plan = task.privacy, held.key, task.plan_for(held.key.kind)
    not_before, not_after = validity_of(held)
    bits = _ring_bits(settings, size)
    sent = max(1, round(size * settings.sent_share)) if size else 0
    transform = Transform(size, sent, bits == RING_BITS[0] and size > 0, _public_seed(key, held.base.bundle))
    weight = 1 if settings.noise_multiplier else _weight_steps(bits, held.slots, plan.max_weight)
    level = _level(bits, weight, held.slots, 0)
    draft = RoundDescriptor(
        population=task.population,
        task=key.task,
        round=key.number,
        kind=key.kind,
        base=held.base.bundle,
        plan=plan_digest(plan),
        size=size,
        sent=sent,
        rotated=transform.rotated,
        public_seed=transform.seed,
        ring_bits=bits,
        level=level,
        clip_norm=clip,
        scale=transform.scale_for(level, clip),
        max_weight=weight,
        minimum=held.minimum,
        maximum=held.slots,
        not_before=not_before,
        not_after=not_after,
        leader_key=keys[0],
        helper_keys=(keys[1],),
        lanes=_metric_lanes(lanes, settings.metric_bound or METRIC_BOUND),
        rounds_per_device=settings.rounds_per_device,
    )
    return _noised(draft, settings)


def _noised(draft: RoundDescriptor, settings: PrivacySettings) -> RoundDescriptor:
    if not settings.noise_multiplier:
        return draft
    votes = vote_noise(settings, draft.maximum) if settings.clip_quantile and draft.size else 0.0
    return with_noise(draft, settings.noise_multiplier, votes)


def vote_noise(settings: PrivacySettings, maximum: int) -> float:
    """Standard deviation of the noise on the count of unclipped devices, in a cohort of up to `maximum`."""
    usual = max(settings.noise_multiplier, min(maximum * _VOTE_NOISE_SHARE, _MOST_VOTE_NOISE))
    return settings.clip_vote_noise or usual


def with_noise(draft: RoundDescriptor, multiplier: float, votes: float = 0.0) -> RoundDescriptor:
    """The same round with noise of `multiplier` sensitivities over all it releases, numbers and lanes together.

    With `votes` above 0, devices also vote on the clip, and their count gets noise of that standard deviation. A vote
    is plus or minus one half, so that it costs (2 votes)^-2, and what else is released gets the multiplier
    (multiplier^-2 - (2 votes)^-2)^(-1/2): Andrew et al. 2021, theorem 1. Of that, half of the privacy (in inverse
    squares) goes to the numbers, half is shared by the metrics; all bins of a histogram are one of them.
    """
    if not votes:
        return _with_noise(draft, multiplier)
    rest = multiplier**-2 - (2 * votes) ** -2
    if rest <= 0:
        raise OutOfBounds(f"noise of {votes:g} on the votes costs more than noise_multiplier {multiplier:g} allows")
    noisy = _with_noise(draft, rest**-0.5)
    lane = Lane(WITHIN_CLIP, VOTE, math.ceil((votes * (1 << LANE_FRACTION_BITS)) ** 2))
    return replace(noisy, lanes=(*noisy.lanes, lane))


def _with_noise(draft: RoundDescriptor, multiplier: float) -> RoundDescriptor:
    lanes, numbers = len(together(draft.lanes)), 1 if draft.size else 0
    parts = numbers + (1 if lanes else 0)
    level = draft.level
    unit = (1 << LANE_FRACTION_BITS) ** 2
    noisy = tuple(
        replace(lane, noise_variance=math.ceil(multiplier**2 * parts * lanes * lane.bound**2 * unit))
        for lane in draft.lanes
    )
    while level > _COARSEST[draft.ring_bits]:
        scale = draft.transform.scale_for(level, draft.clip_norm)
        trial = replace(draft, level=level, scale=scale)
        variance = math.ceil(multiplier**2 * parts * sensitivity(trial) ** 2) if numbers else 0
        if level <= largest_level(draft.ring_bits, draft.max_weight, draft.maximum, variance):
            return replace(trial, noise_variance=variance, lanes=noisy)
        level = level * 9 // 10
    raise OutOfBounds(
        f"noise of {multiplier} sensitivities over {draft.size} numbers leaves no room in a ring of {draft.ring_bits} "
        "bits; take a wider ring, less noise or a smaller model"
    )


def signal_to_noise(descriptor: RoundDescriptor, reports: int) -> float:
    """How many times larger the sum of that many clipped deltas can at best be than the noise on it; inf without."""
    if not descriptor.noise_variance:
        return math.inf
    signal = reports * descriptor.clip_norm * descriptor.scale
    return signal / math.sqrt(descriptor.noise_variance * descriptor.transform.numbers)


def validity_of(held: Round) -> tuple[float, float]:
    """From a round's opening to when its shares are deleted, helper or no helper.

    A descriptor counts milliseconds: the opening is rounded down, so that the round is valid when it opens.
    """
    opened = math.floor(held.opened_at * 1000) / 1000
    return opened, min(held.deadline + HELPER_SECONDS, held.opened_at + LONGEST_SECONDS)


def lanes_of(manifest: Manifest, kind: Kind) -> tuple[str, ...]:
    """Which metrics a round sums: those of the base version, and of the training if there is any."""
    return (*manifest.metrics, *TRAINING_METRICS) if kind is Kind.TRAIN else manifest.metrics


def _metric_lanes(names: tuple[str, ...], bound: float) -> tuple[Lane, ...]:
    if WITHIN_CLIP in names:
        raise BadInput(f"a private round can't sum a metric called {WITHIN_CLIP!r}: the name is taken; rename it")
    return tuple(Lane(name, bound) for name in names)


def _level(bits: int, weight: int, maximum: int, variance: int) -> int:
    level = largest_level(bits, weight, maximum, variance)
    if level < _COARSEST[bits]:
        raise OutOfBounds(
            f"a cohort of up to {maximum} leaves level {level} in a ring of {bits} bits, {_COARSEST[bits]} is the "
            "least; set ring_bits to 32, or lower goal or over_selection"
        )
    return level


def _require_clip(clip: float) -> None:
    if not clip:
        raise OutOfBounds(
            "a private task needs clip_norm, the largest norm of one device's delta: without a bound there is "
            "neither head-room in the ring nor a limit to what one device can do; set plan.clip_norm (1 to 10 is usual)"
        )


def _ring_bits(settings: PrivacySettings, size: int) -> int:
    """What the task names, or the wide ring as long as the model is small."""
    return settings.ring_bits or (RING_BITS[-1] if size <= WIDE_RING_NUMBERS else RING_BITS[0])


def _weight_steps(bits: int, maximum: int, most: float) -> int:
    return max(1, min(largest_level(bits, 1, maximum, 0) // _FINE[bits], _MOST_WEIGHT, math.ceil(most)))


def _public_seed(key: RoundKey, base: str) -> bytes:
    return hashlib.sha256(f"umbel public seed\0{key}\0{base}".encode()).digest()[:SEED_BYTES]
