"""Data that change while devices learn: from an hour on, some devices see other examples than before.

* inputs: each number moves by some standard deviations; what is right stays as it was (data drift)
* answers: the same inputs have the opposite answers (concept drift)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from umbel.errors import BadInput
from umbel.randomness import generator
from umbel_client.examples import Examples, Split
from umbel_simulations.fleet.adversaries import flipped
from umbel_simulations.world import Shift


class Shifts:
    """Whose examples change, when, and into what.

    Args:
        shifts: as the scenario says.
        devices: how many there are.
        seed: of the run; each shift draws its devices anew.
        central: examples by which is known how much a number varies.
        ends: by target, the least and the greatest answer, added up.

    Raises:
        BadInput: inputs are to be moved, and all are whole numbers.
    """

    def __init__(
        self, shifts: tuple[Shift, ...], devices: int, seed: int, central: Examples, ends: Mapping[str, float]
    ) -> None:
        self._ends = ends
        self._spread = {name: array.std(axis=0) for name, array in central.inputs.items() if array.dtype.kind == "f"}
        if not self._spread and any(shift.kind == "inputs" for shift in shifts):
            raise BadInput('shifts: tokens and other whole numbers can\'t be moved; choose kind = "answers"')
        self._whose = [(shift, _drawn(shift, place, devices, seed)) for place, shift in enumerate(shifts)]

    def begun(self, device: int, now: float) -> tuple[Shift, ...]:
        """The shifts that a device has behind it, by virtual time in seconds."""
        return tuple(shift for shift, whose in self._whose if now >= shift.at_hour * 3600.0 and device in whose)

    def shifted(self, split: Split, begun: tuple[Shift, ...]) -> Split:
        """What these shifts have made of a device's examples."""
        for shift in begun:
            split = Split(self._changed(split.training, shift), self._changed(split.held_back, shift))
        return split

    def _changed(self, examples: Examples, shift: Shift) -> Examples:
        if shift.kind == "answers":
            return flipped(examples, self._ends)
        moved = {name: self._moved(name, array, shift.by) for name, array in examples.inputs.items()}
        return replace(examples, inputs=moved)

    def _moved(self, name: str, array: NDArray[Any], by: float) -> NDArray[Any]:
        if name not in self._spread:
            return array
        moved: NDArray[Any] = (array + by * self._spread[name]).astype(array.dtype)
        return moved


def _drawn(shift: Shift, place: int, devices: int, seed: int) -> frozenset[int]:
    order = generator(seed, "shifts", place).permutation(devices)
    return frozenset(order[: round(shift.share * devices)].tolist())
