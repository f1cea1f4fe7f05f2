"""Who the devices are: speed, network, time zone, clock, and when they are free. Drawn from the seed, once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from umbel.randomness import generator
from umbel_simulations.fleet.availability import Always, Availability, Diurnal, Traced
from umbel_simulations.fleet.traces import read_traces
from umbel_simulations.scenario import Scenario
from umbel_simulations.world import Population

_WITHIN: Final = 2 * 1.959964
"""Standard deviations between the lowest and the highest 2.5 per cent of a normal distribution."""
_MEGABIT: Final = 125_000.0
"""Bytes."""


@dataclass(frozen=True, slots=True)
class Profile:
    """One device's machine and network."""

    speed: float
    """Training examples a second."""
    down: float
    up: float
    """Bytes a second."""
    latency: float
    """Seconds for a message there and back."""
    utc_offset_minutes: int
    clock_error: float
    """Seconds that its clock is ahead."""


class People:
    """All profiles, as arrays: a device costs a few dozen bytes here.

    Args:
        scenario: whose population it is.
    """

    def __init__(self, scenario: Scenario) -> None:
        part, seed = scenario.population, scenario.seed
        count = part.devices
        self.count = count
        self._speed = _log_normal(count, part.examples_per_second, part.speed_decades, seed, "speed")
        self._down = _log_normal(count, part.megabits_down * _MEGABIT, part.network_decades, seed, "down")
        self._up = _log_normal(count, part.megabits_up * _MEGABIT, part.network_decades, seed, "up")
        self._latency = _log_normal(count, part.latency_seconds, part.network_decades, seed, "latency")
        zones = np.asarray([round(zone * 60) for zone in part.time_zones], np.int32)
        self._zones = zones[np.arange(count) % len(zones)]
        self._errors = _clock_errors(part, seed)
        self.availability = _availability(scenario, self._zones)

    def profile(self, device: int) -> Profile:
        """One device's."""
        return Profile(
            speed=float(self._speed[device]),
            down=float(self._down[device]),
            up=float(self._up[device]),
            latency=float(self._latency[device]),
            utc_offset_minutes=int(self._zones[device]),
            clock_error=float(self._errors[device]),
        )


def _log_normal(count: int, median: float, decades: float, seed: int, what: str) -> NDArray[np.float64]:
    drawn = generator(seed, what).standard_normal(count)
    return np.asarray(median * 10.0 ** (drawn * decades / _WITHIN))


def _clock_errors(part: Population, seed: int) -> NDArray[np.float64]:
    chance = generator(seed, "clocks")
    wrong = chance.random(part.devices) < part.wrong_clocks
    error = chance.uniform(-1.0, 1.0, part.devices) * part.clock_error_hours * 3600.0
    return np.asarray(np.where(wrong, error, 0.0))


def _availability(scenario: Scenario, zones: NDArray[np.int32]) -> Availability:
    part = scenario.population
    match part.availability:
        case "always":
            return Always(part.devices)
        case "trace":
            return Traced(part.devices, read_traces(Path(part.trace)))
        case _:
            mean, swing = part.mean_availability, part.day_night_swing
            return Diurnal(part.devices, zones, scenario.start_hour, mean, swing, scenario.seed)
