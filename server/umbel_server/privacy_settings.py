"""What a task may choose about its secret sums."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from umbel import fields
from umbel.errors import OutOfBounds
from umbel.ring import RING_BITS
from umbel_server.json_text import like


@dataclass(frozen=True, slots=True)
class PrivacySettings:
    """What a task may choose about its secret sums; the defaults choose by the model's size."""

    ring_bits: int = 0
    """16 or 32; 0 chooses."""
    sent_share: float = 1.0
    """Share of the numbers that each round sends, the same random ones on every device."""
    noise_multiplier: float = 0.0
    """Standard deviation of the helper's noise per sensitivity, over all that a round releases; 0: none."""
    epsilon: float = 0.0
    """Budget of the whole task; a round that would exceed it isn't opened. 0: none."""
    delta: float = 1e-6
    rounds_per_device: int = 0
    """In how many rounds of the task one device may be: the helper is told, and sums it no more often; 0: in all."""
    metric_bound: float = 0.0
    """Largest metric of one device; 0 chooses. With noise it must be set: noise is measured against it."""
    clip_quantile: float = 0.0
    """Share of devices whose deltas are to stay unclipped: the clip moves there from round to round. 0: it stays."""
    clip_rate: float = 0.2
    """How far it moves in a round: at most by the factor e to this power."""
    clip_start: float = 0.0
    """The first round's clip; 0: the plan's clip_norm, which is the largest in any case."""
    clip_least: float = 0.0
    """The smallest clip; 0: a thousandth of the largest."""
    clip_vote_noise: float = 0.0
    """Standard deviation of the noise on the count of unclipped devices; 0 chooses."""

    def __post_init__(self) -> None:
        if self.ring_bits not in (0, *RING_BITS):
            raise OutOfBounds(f"ring_bits is {self.ring_bits}; 16, 32, or 0 to choose by the model's size")
        if not 0 < self.sent_share <= 1:
            raise OutOfBounds(f"sent_share is {self.sent_share}; it must be above 0 and at most 1")
        for name in ("noise_multiplier", "epsilon", "metric_bound", "clip_start", "clip_least", "clip_vote_noise"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise OutOfBounds(f"{name} is {value}; it must be a number that isn't negative")
        fields.count(self.rounds_per_device, "rounds_per_device")
        if not 0 < self.delta < 1:
            raise OutOfBounds(f"delta is {self.delta}; it must lie between 0 and 1")
        if self.epsilon and not self.noise_multiplier:
            raise OutOfBounds("a budget (epsilon) without noise can't be kept; set noise_multiplier too")
        if self.noise_multiplier and not self.metric_bound:
            raise OutOfBounds("with noise, metrics need a bound that noise is measured against; set metric_bound")
        self._check_clip()

    def _check_clip(self) -> None:
        if not 0 <= self.clip_quantile < 1:
            raise OutOfBounds(f"clip_quantile is {self.clip_quantile}; it must be at least 0 (off) and below 1")
        if not 0 < self.clip_rate <= 1:
            raise OutOfBounds(f"clip_rate is {self.clip_rate}; it must be above 0 and at most 1")
        if not self.clip_quantile:
            return
        if not self.noise_multiplier:
            raise OutOfBounds(
                "clip_quantile without noise: each next clip would tell exactly how many devices were clipped, and "
                "devices of different weights would be counted alike; set noise_multiplier and metric_bound too"
            )
        if self.clip_vote_noise and 2 * self.clip_vote_noise <= self.noise_multiplier:
            raise OutOfBounds(
                f"clip_vote_noise is {self.clip_vote_noise}, which by itself costs more than noise_multiplier "
                f"{self.noise_multiplier} allows the whole round; it must be above {self.noise_multiplier / 2:g}"
            )

    def to_tree(self) -> dict[str, float | int]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_tree(cls, tree: Mapping[str, object]) -> PrivacySettings:
        """Read `to_tree`; fields that are absent keep their defaults.

        Raises:
            MalformedMessage: an unknown field, or a value of another type.
            OutOfBounds: a value beyond its bounds.
        """
        return cls(**like(cls, tree, "privacy"))
