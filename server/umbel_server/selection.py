"""Who joins a round, how long a round and a session may take, and when everybody else comes back; all of it pure.

Pace steering after Bonawitz et al. 2019, section 2.3: a large fleet is spread out so that about as many devices call as
can be used, a small one is asked to come back soon so that enough of them meet. Nothing here depends on how long
rounds have waited for devices, so that waiting can't feed itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from umbel.descriptor import TWO_AGGREGATORS
from umbel.identity import DeviceId
from umbel.manifest import Manifest
from umbel.plan import Kind
from umbel.sealing import SEALED
from umbel.visit import PROTOCOL, CheckIn, RetryWindow
from umbel_server.round import Round, RoundState
from umbel_server.task import Task

QUANTILE: Final = 0.9
SESSION_FACTOR: Final = 4.0
"""A session may take this many times what nine in ten of the last ones took."""
ROUND_FACTOR: Final = 2.0
"""The minimum is enough once a round has lasted this many times what nine in ten of the last reports needed."""
SHORTEST_SECONDS: Final = 5.0
ENOUGH_MEASURED: Final = 8
"""Measured times below this many say too little."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Bounds of pace steering, in seconds."""

    shortest: float = 1.0
    """The mean wait of a small fleet's devices while there is work."""
    longest: float = 6 * 3600.0
    """No device is sent away for longer."""
    idle: float = 60.0
    """The mean wait while there is no work at all."""
    surplus: float = 1.5
    """Devices asked to call for each one that can be used."""
    steers: bool = True
    """False: everybody comes back after `idle` seconds on average, however many are wanted."""
    adapts: bool = True
    """False: sessions and rounds may always take as long as their task allows."""


def why_not(device: DeviceId, check_in: CheckIn, task: Task, held: Round, manifest: Manifest) -> str:
    """Why a device can't join a round, in words for its log; empty if it can."""
    plan = task.plan_for(held.key.kind)
    evaluates = held.key.kind is Kind.EVALUATE
    examples = check_in.held_back_examples if evaluates else check_in.training_examples
    if check_in.protocol < PROTOCOL:
        return f"protocol {check_in.protocol} is too old; update the SDK"
    suite = TWO_AGGREGATORS if task.updates_private else SEALED
    if suite not in check_in.suites:
        return f"this task's reports go by {suite}, the device's by {', '.join(check_in.suites) or 'nothing'}"
    if not set(check_in.runtimes) & set(manifest.graphs):
        return f"the model runs on {', '.join(manifest.graphs)}, the device on {', '.join(check_in.runtimes)}"
    if examples < max(1, plan.min_examples):
        return f"{examples} examples; this task asks for {max(1, plan.min_examples)}"
    if held.state is not RoundState.COLLECTING:
        return "the round is being closed"
    if not held.may_join(device):
        return "the round has enough devices, or has heard this one"
    return ""


def most_wanting(rounds: Sequence[Round]) -> list[Round]:
    """Rounds in the order in which a device is offered to them: the emptiest first."""
    return sorted(rounds, key=lambda held: (-held.free_slots / held.slots, held.opened_at, str(held.key)))


def adapted(pace: Pace, measured: Sequence[float], factor: float, longest: float) -> float:
    """A time limit from measured times: their 0.9 quantile times `factor`, within sensible bounds, in seconds."""
    if len(measured) < ENOUGH_MEASURED or not pace.adapts:
        return longest
    ordered = sorted(measured)
    quantile = ordered[int(QUANTILE * len(ordered))]
    return min(longest, max(SHORTEST_SECONDS, factor * quantile))


def window(pace: Pace, devices: int, wanted: int, session_seconds: float) -> RetryWindow:
    """When a device that isn't needed now should come back.

    Args:
        pace: the bounds.
        devices: how many devices of the population have called lately.
        wanted: how many a round takes; 0 if there is no work.
        session_seconds: how long a session takes, as measured.
    """
    if wanted <= 0 or not pace.steers:
        return _around(pace.idle)
    spread = session_seconds * devices / (wanted * pace.surplus) if devices > wanted * pace.surplus else 0.0
    return _around(min(pace.longest, max(pace.shortest, spread)))


def _around(mean: float) -> RetryWindow:
    return RetryWindow(0.5 * mean, 1.5 * mean)
