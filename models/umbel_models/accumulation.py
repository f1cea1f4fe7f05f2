"""Gradient accumulation: several small batches move the weights once, as one large batch would.

A device that has memory for batches of 4 trains as if it had batches of 16. Each batch weighs as much as it counts
for (its examples, or `ModelSpec.count`; its examples again where their gradients are clipped one by one), so ragged
batches are exact too. How many make a step is the scalar input
`accumulate`; the trainer lowers it for the last batches of a run when fewer are left (`umbel_client.trainer`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from umbel.errors import CannotCompile
from umbel.manifest import ACCUMULATE
from umbel_models.optimizers import Optimizer, Reference, Tensors

COUNT: Final = "count"
"""Under this name an optimiser is told what the batch counts for."""


@dataclass(frozen=True, slots=True)
class Accumulated:
    """Any optimiser, whose step is taken once in `every` batches; costs one more slot per weight."""

    inner: Optimizer
    every: int = 4

    def __post_init__(self) -> None:
        if not self.every >= 1 or self.every % 1:
            raise CannotCompile(f"accumulate is {self.every}; it must be a whole number of batches, 1 or more")

    @property
    def slots(self) -> tuple[str, ...]:
        """What was gathered, and those of the inner optimiser."""
        return ("gathered", *self.inner.slots)

    @property
    def scalars(self) -> tuple[str, ...]:
        """How many batches were gathered and what they count for, and those of the inner optimiser."""
        return ("gathered_batches", "gathered_count", *self.inner.scalars)

    @property
    def hyperparameters(self) -> Mapping[str, float]:
        """`accumulate`, and those of the inner optimiser."""
        return {**self.inner.hyperparameters, ACCUMULATE: float(self.every)}

    def factor(self, hyper: Tensors) -> Tensor | None:
        """None: what is gathered are gradients."""
        del hyper
        return None

    def advance(self, scalars: Tensors, hyper: Tensors) -> dict[str, Tensor]:
        """Count this batch, and begin anew where a step is taken."""
        batches, total = scalars["gathered_batches"] + 1.0, scalars["gathered_count"] + hyper[COUNT]
        ready = batches > hyper[ACCUMULATE] - 0.5
        inner = self.inner.advance(scalars, hyper)
        kept = {name: torch.where(ready, inner[name], scalars[name]) for name in self.inner.scalars}
        pending = 1.0 - ready.to(total.dtype)
        own = {"gathered_batches": batches * pending, "gathered_count": total * pending}
        # Nothing but padding counts for nothing, and so do its gradients.
        return {**kept, **own, "ready": ready, "total": torch.where(total > 0, total, 1.0)}

    def update(
        self, weight: Tensor, gradient: Tensor, slots: Tensors, scalars: Tensors, hyper: Tensors
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gather, and where enough is gathered take the inner optimiser's step by the mean."""
        ready = scalars["ready"]
        gathered = slots["gathered"] + gradient * hyper[COUNT]
        factor = self.inner.factor(hyper)
        mean = gathered / scalars["total"] if factor is None else gathered * (factor / scalars["total"])
        moved, changed = self.inner.update(weight, mean, slots, scalars, hyper)
        new = {name: torch.where(ready, value, slots[name]) for name, value in changed.items()}
        return torch.where(ready, moved, weight), {**new, "gathered": torch.where(ready, 0.0, gathered)}

    @property
    def reach(self) -> float:
        """That of the inner optimiser."""
        return self.inner.reach

    def torch_optimizer(self, weights: list[Tensor]) -> Reference:
        """The inner optimiser of torch, behind a plain loop that gathers."""
        return _Gathering(self.inner.torch_optimizer(weights), weights, self.every)


class _Gathering:
    """What `Accumulated` must agree with, written as anybody would."""

    def __init__(self, inner: Reference, weights: list[Tensor], every: int) -> None:
        self._inner, self._weights, self._every = inner, weights, every
        self._sums = [torch.zeros_like(weight) for weight in weights]
        self._batches, self._total = 0, 0.0

    def zero_grad(self) -> None:
        """Forget the last batch's gradients."""
        self._inner.zero_grad()

    def step(self, count: float) -> None:
        """Gather this batch's gradients, and step when there are enough."""
        for total, weight in zip(self._sums, self._weights, strict=True):
            if weight.grad is not None:
                total += weight.grad * count
        self._batches, self._total = self._batches + 1, self._total + count
        if self._batches == self._every:
            for total, weight in zip(self._sums, self._weights, strict=True):
                weight.grad = total / (self._total or 1.0)
            self._inner.step(self._total)
            self._sums = [torch.zeros_like(weight) for weight in self._weights]
            self._batches, self._total = 0, 0.0

    def hold(self) -> None:
        """As the inner one does."""
        self._inner.hold()
