"""One bit beside a delta, by which a round's clip is steered: was this delta short enough to go unclipped?

From Andrew, Thakkar, McMahan and Ramaswamy 2021 (arXiv 1905.03871). The bit travels as a lane of plus or minus one
half: with a device or without it, the sum differs by a half and not by one, so that noise on it costs half as much.
"""

from __future__ import annotations

from typing import Final

WITHIN_CLIP: Final = "within_clip"
"""The lane that holds the votes; no metric may have this name."""
VOTE: Final = 0.5
"""Absolute value of one device's vote, and the lane's bound."""


def vote(norm: float, clip: float) -> float:
    """A device's vote on its delta of this norm: one half if nothing of it was clipped away, else minus one half."""
    return VOTE if norm <= clip else -VOTE


def share_within(total: float, count: int) -> float:
    """Which share of `count` devices stayed within the clip, by the (noised) sum of their votes; from 0 to 1.

    What noise, or a device that lies, has moved beyond a share is cut off.
    """
    return min(max(total / count + VOTE, 0.0), 1.0)
