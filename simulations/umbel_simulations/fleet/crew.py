"""What all devices of a run share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from umbel.runtime import Runtime
from umbel_simulations.data import Federation
from umbel_simulations.fleet.books import Books
from umbel_simulations.fleet.faults import Weather
from umbel_simulations.fleet.homes import Homes
from umbel_simulations.fleet.house import House
from umbel_simulations.fleet.population import People
from umbel_simulations.fleet.shifts import Shifts
from umbel_simulations.fleet.virtual_time import Ahead, VirtualClock


@dataclass(frozen=True, slots=True, eq=False)
class Crew:
    """Shared by reference: a device costs none of it."""

    house: House
    homes: Homes
    people: People
    federation: Federation
    ends: Mapping[str, float]
    """By target: the least and the greatest answer, added up."""
    shifts: Shifts
    runtime: Runtime
    ahead: Ahead
    clock: VirtualClock
    weather: Weather
    books: Books
    chance: np.random.Generator
    shapes: Mapping[str, tuple[int, ...]]
    """Of the model's shared weights."""
    release_key: bytes
    smallest_cohort: int
    asks_first: bool
    drop_out: float
    away_seconds: float
    """How long a device that was taken away stays so, on the average."""

    def now(self) -> float:
        """Virtual seconds since the run began."""
        return self.clock.now() - self.clock.epoch
