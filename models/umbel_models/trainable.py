"""Which weights move on devices, and travel: all, those of the last layer, those of some names, or small adapters.

What is chosen here is worked out for a module by `umbel_models.adapters`. Weights that aren't trained are frozen: they
go to a device once and never come back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from umbel.errors import CannotCompile


def every_weight(name: str) -> bool:
    """Train all weights, but those that their author froze by `requires_grad_(False)`."""
    del name
    return True


@dataclass(frozen=True, slots=True)
class Head:
    """Train the layer with weights that runs last in a forward pass."""


@dataclass(frozen=True, slots=True)
class Named:
    """Train the weights whose names match one of these patterns, such as `head.*` or `layers.1.*`; a name that is no
    pattern also stands for all weights of the module that goes by it."""

    patterns: tuple[str, ...]

    def __call__(self, name: str) -> bool:
        """Whether a weight of this name is trained."""
        return any(fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") for pattern in self.patterns)


@dataclass(frozen=True, slots=True)
class LoRA:
    """Train low-rank adapters of dense layers (Hu et al., 2021, https://arxiv.org/abs/2106.09685), put in on compiling.

    A layer answers W x + (alpha / rank) B A x; only A and B are trained. B starts at zero, so that the model begins as
    it was.
    """

    rank: int
    targets: tuple[str, ...]
    """Dense layers by path, by the last part of it, or by a pattern: `q`, `layers.0.q`, `layers.*.q`."""
    alpha: float | None = None
    """None means `rank`: a factor of one."""
    also: tuple[str, ...] = ()
    """Weights that are trained as they are, by the patterns of `Named`; a fresh head, say."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.targets:
            raise CannotCompile(f"LoRA of rank {self.rank} for {self.targets}; give a rank of 1 or more and a target")
        if not 0 < self.scale < math.inf:
            raise CannotCompile(f"LoRA with an alpha of {self.alpha}; give a number above zero")

    @property
    def scale(self) -> float:
        """By how much an adapter's answer is multiplied."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank

    def is_target(self, path: str) -> bool:
        """Whether a layer at this path is to have an adapter."""
        last = path.rpartition(".")[2]
        return any(fnmatchcase(path, target) or last == target for target in self.targets)


Trainable = Callable[[str], bool] | Head | LoRA
"""A choice of weights; a function says of a parameter's name whether it is trained."""
