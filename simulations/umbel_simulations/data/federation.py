"""What a federation is: users with their own examples, and what is held back to judge a global model by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from umbel_client.examples import NONE, Examples

HELD_BACK_SHARE: Final = 0.2


@dataclass(frozen=True, slots=True, eq=False)
class ClientData:
    """One user's examples: what a device learns from, and what it judges by."""

    name: str
    training: Examples
    held_back: Examples

    @classmethod
    def split(cls, name: str, examples: Examples) -> ClientData:
        """Hold back the last fifth of a user's examples, of which there are five or more."""
        cut = examples.count - int(examples.count * HELD_BACK_SHARE)
        return cls(name, examples.take(slice(cut)), examples.take(slice(cut, None)))


@dataclass(frozen=True, slots=True, eq=False)
class Federation:
    """A data set that is spread over users."""

    name: str
    clients: tuple[ClientData, ...]
    central: Examples
    """What a global model is judged by; nobody trains with it."""


def join(parts: Sequence[Examples]) -> Examples:
    """Examples one after the other; of the same names, types and shapes, or none at all."""
    some = [part for part in parts if part.count]
    if not some:
        return NONE
    inputs = {name: np.concatenate([part.inputs[name] for part in some]) for name in some[0].inputs}
    targets = {name: np.concatenate([part.targets[name] for part in some]) for name in some[0].targets}
    return Examples(inputs, targets, sum(part.count for part in some))
