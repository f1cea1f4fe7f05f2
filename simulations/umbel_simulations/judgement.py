"""Go or no-go: an outcome held against the thresholds of its scenario. What wasn't measured doesn't pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from umbel_simulations.outcome import Outcome, RolloutOutcome
from umbel_simulations.scenario import SCENARIOS, Scenario, Thresholds

Number = float | None


@dataclass(frozen=True, slots=True)
class Check:
    """One threshold, and what was found."""

    name: str
    """As in the scenario."""
    wanted: float
    found: Number
    """None: it wasn't measured."""
    at_least: bool
    """Whether what is found must reach `wanted`; else it must stay within."""

    @property
    def passes(self) -> bool:
        """Whether it holds."""
        if self.found is None:
            return False
        return self.found >= self.wanted if self.at_least else self.found <= self.wanted


def judge(outcome: Outcome, thresholds: Thresholds | None = None) -> tuple[Check, ...]:
    """Hold an outcome against thresholds, those of its own scenario unless given; none of them is no go."""
    limits = thresholds or scenario_of(outcome).thresholds
    return tuple(_checks(outcome, limits))


def is_go(checks: tuple[Check, ...]) -> bool:
    """Whether all hold, and there are any: nothing that was asked is nothing that was shown."""
    return bool(checks) and all(check.passes for check in checks)


def scenario_of(outcome: Outcome) -> Scenario:
    """The scenario that an outcome is of."""
    return SCENARIOS.validate_python(outcome.scenario, strict=False)


def _checks(outcome: Outcome, limits: Thresholds) -> Iterator[Check]:
    for name, (measure, at_least) in _MEASURES.items():
        wanted = getattr(limits, name)
        if wanted is not None:
            yield Check(name, float(wanted), measure(outcome), at_least)


def _worst_twentieth(outcome: Outcome) -> Number:
    spread = outcome.per_device.get("accuracy")
    return spread.p05 if spread else None


def _upper(name: str) -> Callable[[Outcome], Number]:
    """What nineteen devices in twenty stay within."""

    def measure(outcome: Outcome) -> Number:
        spread = outcome.per_device.get(name)
        return spread.p95 if spread else None

    return measure


def megabytes(outcome: Outcome) -> Number:
    """Megabytes, both ways, that nineteen devices in twenty stay within (each way by itself, then added)."""
    ways = [outcome.per_device.get(name) for name in ("bytes_up", "bytes_down")]
    return sum(way.p95 for way in ways if way) / 1e6 if all(ways) else None


def _epsilon(outcome: Outcome) -> Number:
    # Without noise there is no bound at all, which isn't the same as none spent.
    return outcome.epsilon if outcome.epsilon > 0 else None


def _broken(outcome: Outcome) -> list[RolloutOutcome]:
    return [rollout for rollout in outcome.rollouts if rollout.content != "trained"]


def _roll_back_hours(outcome: Outcome) -> Number:
    times = [_hours_to_clear(rollout) for rollout in _broken(outcome)]
    known = [time for time in times if time is not None]
    return max(known) if known and len(known) == len(times) else None


def _hours_to_clear(rollout: RolloutOutcome) -> Number:
    if rollout.started_hour is None or rollout.cleared_hour is None:
        return None
    return rollout.cleared_hour - rollout.started_hour


def _exposed(outcome: Outcome) -> Number:
    broken = _broken(outcome)
    # One that never began has shown nothing, least of all that it reaches nobody.
    if not broken or not outcome.devices or any(rollout.started_hour is None for rollout in broken):
        return None
    return max(rollout.devices_reached for rollout in broken) / outcome.devices


def _shift_noticed_hours(outcome: Outcome) -> Number:
    begun = _first_shift(outcome)
    return min((one.hour - begun for one in outcome.drift.alarms if one.hour >= begun), default=None)


def _false_alarms(outcome: Outcome) -> Number:
    begun = _first_shift(outcome)
    return float(sum(one.hour < begun for one in outcome.drift.alarms)) if outcome.drift.looks else None


def _first_shift(outcome: Outcome) -> float:
    return min((shift.at_hour for shift in scenario_of(outcome).shifts), default=math.inf)


def accepted_rounds(outcome: Outcome) -> int:
    """Rounds that made a version."""
    return sum(one.verdict == "accepted" for one in outcome.rounds)


_MEASURES: Final[dict[str, tuple[Callable[[Outcome], Number], bool]]] = {
    "accuracy": (lambda outcome: outcome.accuracy, True),
    "fairness_floor": (_worst_twentieth, True),
    "loss": (lambda outcome: outcome.loss, False),
    "wasted_sessions": (lambda outcome: outcome.wasted_share, False),
    "megabytes_per_device": (megabytes, False),
    "seconds_per_device": (_upper("seconds"), False),
    "epsilon": (_epsilon, False),
    "roll_back_hours": (_roll_back_hours, False),
    "exposed_devices": (_exposed, False),
    "shift_noticed_hours": (_shift_noticed_hours, False),
    "false_alarms": (_false_alarms, False),
    "accepted_rounds": (lambda outcome: float(accepted_rounds(outcome)), True),
}
"""By the names of `Thresholds`."""
