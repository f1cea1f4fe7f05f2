"""Where the states of clients lie that train abreast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from umbel_simulations.cohort.binding import Array


class States:
    """What each client has of its own, in four sets of arrays.

    A step reads one set and writes another. The first clients step to and fro between two sets; any others are gathered
    in a third, step into the fourth, and are put back.

    Args:
        clients: how many there is room for.
        shapes: of what a step moves, by name.
    """

    def __init__(self, clients: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._sets = [{name: np.empty((clients, *shape), np.float32) for name, shape in shapes.items()} for _ in "abcd"]
        self._sides: list[int] = []

    def begin(self, count: int, given: Mapping[str, Array]) -> None:
        """Let so many clients start from what is given; from zeros where nothing is."""
        self._sides = [0] * count
        for name, states in self._sets[0].items():
            states[:count] = given.get(name, 0.0)

    def of(self, group: int) -> tuple[dict[str, Array], dict[str, Array]]:
        """What a step of a group reads and what it writes, by name."""
        return self._sets[group], self._sets[group ^ 1]

    def gather(self, who: Sequence[int]) -> int:
        """Have the states of some clients at the beginning of one set; of which group."""
        if who[-1] == len(who) - 1:
            return self._level(len(who))
        for place, at in enumerate(who):
            for name, states in self._sets[2].items():
                states[place] = self._sets[self._sides[at]][name][at]
        return 2

    def stepped(self, who: Sequence[int], group: int) -> None:
        """Know that these have taken a step."""
        if group < 2:
            self._sides[: len(who)] = [1 - group] * len(who)
            return
        for place, at in enumerate(who):
            for name, states in self._sets[3].items():
                self._sets[self._sides[at]][name][at] = states[place]

    def ends(self) -> dict[str, Array]:
        """[clients, ...] The states of all clients, where they lie."""
        count = len(self._sides)
        return {name: states[:count] for name, states in self._sets[self._level(count)].items()}

    def _level(self, count: int) -> int:
        """Bring the first clients to one side, where they took unlike numbers of steps."""
        if len({*self._sides[:count]}) > 1:
            behind = [at for at in range(count) if self._sides[at]]
            for name, states in self._sets[0].items():
                states[behind] = self._sets[1][name][behind]
            self._sides[:count] = [0] * count
        return self._sides[0]
