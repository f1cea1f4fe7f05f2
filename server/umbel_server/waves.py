"""Which devices a wave takes: sticky, nested, independent between rollouts, and decided by the server alone."""

from __future__ import annotations

import hashlib
from typing import Final

from umbel_server.rollout import Rollout

BUCKETS: Final = 10_000


def bucket(salt: str, device: str) -> int:
    """A device's place among 10,000, the same for ever under one salt, independent between salts."""
    return int.from_bytes(hashlib.sha256(f"{salt}\0{device}".encode()).digest()[:8], "big") % BUCKETS


def wave_of(rollout: Rollout, device: str) -> int | None:
    """The first wave that takes this device; None: it is held back, or not of the group."""
    spec = rollout.spec
    if spec.only and device not in spec.only:
        return None
    if is_held_back(rollout, device):
        return None
    place = bucket(rollout.salt, device)
    for index, wave in enumerate(spec.waves):
        if device in spec.lab if wave.lab else place < wave.percent * 100:
            return index
    return None


def is_held_back(rollout: Rollout, device: str) -> bool:
    """Whether this device gets nothing from the rollout, nor from the channel once it has succeeded."""
    spec = rollout.spec
    return bucket(spec.hold_back_salt or f"{rollout.salt}/hold-back", device) < spec.hold_back_percent * 100


def takes(rollout: Rollout, device: str) -> bool:
    """Whether the waves that are open take this device."""
    wave = wave_of(rollout, device)
    return wave is not None and wave <= rollout.wave


def is_control(rollout: Rollout, device: str) -> bool:
    """Whether this device could have been taken, and wasn't: it is held back, or its wave isn't open yet."""
    of_group = not rollout.spec.only or device in rollout.spec.only
    return of_group and not takes(rollout, device)


def release_for(rollout: Rollout, device: str) -> int:
    """Which release this device is to get: the rollout's, or in an experiment that of its arm."""
    arms = rollout.spec.arms
    if not arms:
        return rollout.spec.release
    point = bucket(f"{rollout.salt}/arm", device) / BUCKETS * sum(arm.weight for arm in arms)
    for arm in arms:
        point -= arm.weight
        if point < 0:
            return arm.release
    return arms[-1].release
