"""A clip that moves towards a quantile of the fleet's norms, from noised votes alone.

Andrew et al. 2021 (arXiv 1905.03871, algorithm 1): after each round

    clip  <-  clip * exp(-rate * (share of devices within the clip - wished-for quantile))

The share is what the round has released anyway, with the helper's noise on it, so the next clip costs nothing more.
It stays within bounds that an operator has set: what noise, or devices that lie, do to it ends there.
"""

from __future__ import annotations

import math
from typing import Final

from umbel.errors import BadInput, OutOfBounds
from umbel.plan import Kind, Plan
from umbel_server.privacy_settings import PrivacySettings

_LEAST_SHARE: Final = 1e-3
"""Of the largest clip: the smallest, if none is set."""


def bounds(settings: PrivacySettings, plan: Plan) -> tuple[float, float]:
    """The smallest and the largest clip that the task allows."""
    return settings.clip_least or _LEAST_SHARE * plan.clip_norm, plan.clip_norm


def first_clip(settings: PrivacySettings, plan: Plan) -> float | None:
    """The clip of a task's first round; None if it doesn't move: all rounds then have the plan's."""
    if not settings.clip_quantile:
        return None
    return settings.clip_start or plan.clip_norm


def next_clip(clip: float, within: float, settings: PrivacySettings, plan: Plan) -> float:
    """The clip after a round with `clip` in which the share `within` of the cohort (0 to 1) wasn't clipped."""
    moved = clip * math.exp(-settings.clip_rate * (within - settings.clip_quantile))
    least, most = bounds(settings, plan)
    return min(max(moved, least), most)


def require_adaptable(settings: PrivacySettings, plan: Plan, updates_private: bool) -> None:
    """Check that a task's clip may move, if it is to.

    Raises:
        BadInput: there are no private training rounds in which devices could vote.
        OutOfBounds: bounds that don't enclose the first clip.
    """
    if not settings.clip_quantile:
        return
    if not updates_private or plan.kind is not Kind.TRAIN:
        raise BadInput("clip_quantile: devices vote on the clip in the secret sums of training rounds; there are none")
    least, most = bounds(settings, plan)
    first = settings.clip_start or most
    if not 0 < least <= first <= most:
        raise OutOfBounds(
            f"the clip is to begin at {first:g} and to stay between clip_least, {least:g}, and the plan's clip_norm, "
            f"{most:g}; set them in rising order, above 0"
        )
