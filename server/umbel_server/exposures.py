"""What a gate compares: the devices that were offered a release, and those of the same time that weren't."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from umbel_server.executions import Execution
from umbel_server.gates import Arm, Exposure
from umbel_server.health import Seen
from umbel_server.rollout import Rollout
from umbel_server.waves import is_control


def canaries(moves: Sequence[Execution], seen: Mapping[str, Seen]) -> list[Exposure]:
    """The devices that were offered the release, in the order of `moves`."""
    exposed = []
    for move in moves:
        told = seen.get(move.device)
        holds_it = told is not None and told.release == move.number
        in_use = Exposure(
            Arm.CANARY,
            troubled=bool(told and holds_it and told.troubles),
            drift=told.drift if told and holds_it else None,
        )
        exposed.append(move.exposure(in_use))
    return exposed


def control(found: Rollout, moves: Sequence[Execution], seen: Mapping[str, Seen]) -> list[Exposure]:
    """The devices that could have been offered it and weren't, as far as they were seen since it started."""
    offered = {move.device for move in moves}
    return [
        Exposure(Arm.CONTROL, answered=True, troubled=told.troubles > 0, drift=told.drift)
        for device, told in seen.items()
        if device not in offered and told.release not in found.releases and is_control(found, device)
    ]
