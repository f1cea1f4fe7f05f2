"""When devices are free to work: idle, charging, on an unmetered network. All pure, all in virtual seconds.

Three models. `Always`; `Diurnal`, in which the share of free devices follows the local hour, most of them at night,
with the swing between the best and the worst hour that published fleets show (four, Bonawitz et al. 2019); and
`Traced`, from a file of real behaviour in FedScale's form (`traces.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from umbel.randomness import generator
from umbel_simulations.fleet.traces import Trace

NEVER: Final = float("inf")
_BLOCK: Final = 2 * 3600.0
_BLOCKS_A_DAY: Final = 12
_BEST_HOUR: Final = 2.0
"""Local time; phones charge at night."""
_LOOK_AHEAD_DAYS: Final = 60


class Availability(Protocol):
    """When each device is free."""

    def free(self, device: int, time: float) -> bool:
        """Whether a device is free at an instant."""

    def next_free(self, device: int, time: float) -> float:
        """The first instant from `time` on at which it is free; `NEVER` if there is none."""

    def free_until(self, device: int, time: float) -> float:
        """When the freedom that it has at `time` ends."""

    def count(self, time: float) -> int:
        """How many devices are free."""


class Always:
    """Devices that do nothing else."""

    def __init__(self, devices: int) -> None:
        self._devices = devices

    def free(self, device: int, time: float) -> bool:
        """Yes."""
        return True

    def next_free(self, device: int, time: float) -> float:
        """Now."""
        return time

    def free_until(self, device: int, time: float) -> float:
        """For ever."""
        return NEVER

    def count(self, time: float) -> int:
        """All."""
        return self._devices


class Diurnal:
    """Each device lives in blocks of two hours, with a phase of its own; a block is free with the hour's share.

    Args:
        devices: how many there are.
        zones: minutes that each device's local time is ahead of UTC, [devices].
        start_hour: hour of the day (UTC) at time 0.
        mean: share of a day in which a device is free.
        swing: free devices at the best hour, over those at the worst.
        seed: of the run.
    """

    def __init__(
        self, devices: int, zones: NDArray[np.int32], start_hour: float, mean: float, swing: float, seed: int
    ) -> None:
        self._devices, self._seed = devices, seed
        self._local = start_hour + zones / 60.0
        self._phase = generator(seed, "phases").random(devices) * _BLOCK
        self._mean, self._depth = mean, (swing - 1.0) / (swing + 1.0)
        self._days: dict[int, NDArray[np.bool_]] = {}

    def share(self, local_hour: float) -> float:
        """The share of devices that are free at an hour of their own day."""
        return float(self._shares(np.asarray(local_hour)))

    def free(self, device: int, time: float) -> bool:
        """Whether the device's block is a free one."""
        return self._is_free(device, self._block(device, time))

    def next_free(self, device: int, time: float) -> float:
        """Now, or the beginning of its next free block."""
        block = self._block(device, time)
        if self._is_free(device, block):
            return time
        for later in range(block + 1, block + _LOOK_AHEAD_DAYS * _BLOCKS_A_DAY):
            if self._is_free(device, later):
                return self._begin(device, later)
        return NEVER

    def free_until(self, device: int, time: float) -> float:
        """The end of the last of the free blocks that follow each other; `NEVER` if none comes in sight."""
        block = self._block(device, time)
        for later in range(block, block + _LOOK_AHEAD_DAYS * _BLOCKS_A_DAY):
            if not self._is_free(device, later):
                return self._begin(device, later)
        return NEVER

    def count(self, time: float) -> int:
        """How many devices' blocks are free ones."""
        days, places = np.divmod(((time + self._phase + 1e-3) // _BLOCK).astype(np.int64), _BLOCKS_A_DAY)
        everybody = np.arange(self._devices)
        return sum(
            int(np.count_nonzero(self._day(int(day))[everybody[days == day], places[days == day]]))
            for day in np.unique(days)
        )

    def _block(self, device: int, time: float) -> int:
        # A hair later: the beginning of a block, as a float, belongs to it.
        return int((time + self._phase[device] + 1e-3) // _BLOCK)

    def _begin(self, device: int, block: int) -> float:
        return float(block * _BLOCK - self._phase[device])

    def _is_free(self, device: int, block: int) -> bool:
        day, place = divmod(block, _BLOCKS_A_DAY)
        return bool(self._day(day)[device, place])

    def _day(self, day: int) -> NDArray[np.bool_]:
        if day not in self._days:
            drawn = generator(self._seed, "free", day).random((self._devices, _BLOCKS_A_DAY), np.float32)
            middle = (day * _BLOCKS_A_DAY + np.arange(_BLOCKS_A_DAY) + 0.5) * _BLOCK
            hours = (middle[None, :] - self._phase[:, None]) / 3600.0 + self._local[:, None]
            self._days[day] = drawn < self._shares(hours)
        return self._days[day]

    def _shares(self, hours: NDArray[np.float64]) -> NDArray[np.float64]:
        return self._mean * (1.0 + self._depth * np.cos(2 * math.pi * (hours - _BEST_HOUR) / 24.0))


class Traced:
    """Devices that behave as those in a file did, again and again; each device follows one of them, in turn."""

    def __init__(self, devices: int, traces: Sequence[Trace]) -> None:
        self._devices, self._traces = devices, traces

    def free(self, device: int, time: float) -> bool:
        """Whether an interval of its trace holds the instant."""
        return self.free_until(device, time) > time

    def next_free(self, device: int, time: float) -> float:
        """Now, or the beginning of the next interval."""
        if self.free(device, time):
            return time
        trace = self._trace(device)
        turn, within = divmod(time, trace.length)
        for begin, _ in trace.intervals:
            if begin > within:
                return turn * trace.length + begin
        return (turn + 1) * trace.length + trace.intervals[0][0] if trace.intervals else NEVER

    def free_until(self, device: int, time: float) -> float:
        """The end of the interval that holds the instant; the instant itself if none does."""
        trace = self._trace(device)
        turn, within = divmod(time, trace.length)
        for begin, end in trace.intervals:
            if begin <= within < end:
                return turn * trace.length + end
        return time

    def count(self, time: float) -> int:
        """How many devices are free."""
        return sum(self.free(device, time) for device in range(self._devices))

    def _trace(self, device: int) -> Trace:
        return self._traces[device % len(self._traces)]
