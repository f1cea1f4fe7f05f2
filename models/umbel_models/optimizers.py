"""Optimisers as pure functions, so that a step of them can be traced into the training graph.

An optimiser names its slots: one tensor per trainable weight (`slots`), or one scalar for all (`scalars`). Each
starts at zero, except `anchor`, which the runtime fills with the weights that training starts from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from umbel.errors import CannotCompile

Tensors = Mapping[str, Tensor]


class Reference(Protocol):
    """An optimiser of torch, for the parity gate to compare with."""

    def zero_grad(self) -> None:
        """Forget the gradients of the last batch."""

    def step(self, count: float) -> None:
        """Move the weights by their gradients; `count` is what the batch counts for."""

    def hold(self) -> None:
        """From now on do all the work but move nothing, for whoever only measures."""


def require_between(name: str, value: float, least: float = 0.0, below: float = math.inf) -> None:
    """Refuse a setting that would spoil weights without a word.

    Raises:
        CannotCompile: not a number from `least` up to, and without, `below`.
    """
    if not least <= value < below:
        upwards = "" if below == math.inf else f" and below {below:g}"
        raise CannotCompile(f"{name} is {value}; it must be a number, {least:g} or more{upwards}")


@dataclass(frozen=True, slots=True)
class TorchOptimizer:
    """One of torch's own, which doesn't ask how much a batch counts for."""

    inner: torch.optim.Optimizer

    def zero_grad(self) -> None:
        """As torch does."""
        self.inner.zero_grad()

    def step(self, count: float) -> None:
        """As torch does."""
        del count
        self.inner.step()

    def hold(self) -> None:
        """By a learning rate of zero."""
        for group in self.inner.param_groups:
            group["lr"] = 0.0


@runtime_checkable
class Optimizer(Protocol):
    """How a weight moves, given its gradient."""

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the tensors kept for each trainable weight."""

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of the numbers kept for all of them together."""

    @property
    def hyperparameters(self) -> Mapping[str, float]:
        """Scalar inputs of the training graph and their usual values."""

    def factor(self, hyper: Tensors) -> Tensor | None:
        """What gradients are multiplied by before `update` sees them; None leaves them as they are.

        An optimiser whose step is a multiple of the gradient says so here, for a number that the loss is multiplied by
        costs nothing, while one that each gradient is multiplied by costs a pass over all weights.
        """

    def advance(self, scalars: Tensors, hyper: Tensors) -> dict[str, Tensor]:
        """The scalars as this step leaves them, and what else `update` wants to know of it."""

    def update(
        self, weight: Tensor, gradient: Tensor, slots: Tensors, scalars: Tensors, hyper: Tensors
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The new weight, and the new value of each slot that changed."""

    @property
    def reach(self) -> float:
        """The furthest that one step moves a weight whose gradient is next to nothing."""

    def torch_optimizer(self, weights: list[Tensor]) -> Reference:
        """Torch's own implementation, for the parity gate to compare with."""


@dataclass(frozen=True, slots=True)
class SGD:
    """Stochastic gradient descent, with momentum as an option (torch's form: no dampening)."""

    lr: float = 0.05
    momentum: float | None = None
    """None leaves momentum out of the graph, and its slots with it; a number is the usual value."""

    def __post_init__(self) -> None:
        require_between("lr", self.lr)
        require_between("momentum", self.momentum or 0.0, below=1.0)

    @property
    def slots(self) -> tuple[str, ...]:
        """The velocity, where there is momentum."""
        return () if self.momentum is None else ("velocity",)

    @property
    def scalars(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def hyperparameters(self) -> Mapping[str, float]:
        """`lr`, and `momentum` where there is momentum."""
        return {"lr": self.lr} if self.momentum is None else {"lr": self.lr, "momentum": self.momentum}

    def factor(self, hyper: Tensors) -> Tensor | None:
        """The learning rate, unless a velocity has to see gradients first."""
        return hyper["lr"] if self.momentum is None else None

    def advance(self, scalars: Tensors, hyper: Tensors) -> dict[str, Tensor]:
        """Nothing to do."""
        del hyper
        return dict(scalars)

    def update(
        self, weight: Tensor, gradient: Tensor, slots: Tensors, scalars: Tensors, hyper: Tensors
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step against the gradient, or along the velocity."""
        del scalars
        if self.momentum is None:
            return weight - gradient, {}
        velocity = hyper["momentum"] * slots["velocity"] + gradient
        return weight - hyper["lr"] * velocity, {"velocity": velocity}

    @property
    def reach(self) -> float:
        """None: a step is as long as the gradient."""
        return 0.0

    def torch_optimizer(self, weights: list[Tensor]) -> Reference:
        """torch.optim.SGD."""
        return TorchOptimizer(torch.optim.SGD(weights, self.lr, momentum=self.momentum or 0.0))


@dataclass(frozen=True, slots=True)
class Adam:
    """Adam (Kingma and Ba, 2015); with `weight_decay` its decoupled form, AdamW (Loshchilov and Hutter, 2019)."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("lr", self.lr), ("weight_decay", self.weight_decay)):
            require_between(name, value)
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            require_between(name, value, below=1.0)
        # Without it, a gradient of zero is divided by zero; in the first steps only a small part of it is added, and
        # what is smaller than 1e-38 is zero in float32.
        require_between("epsilon", self.epsilon, least=1e-30)

    @property
    def slots(self) -> tuple[str, ...]:
        """First and second moment."""
        return ("moment1", "moment2")

    @property
    def scalars(self) -> tuple[str, ...]:
        """The number of steps taken, for bias correction."""
        return ("steps",)

    @property
    def hyperparameters(self) -> Mapping[str, float]:
        """`lr`; the others are fixed when compiling."""
        return {"lr": self.lr}

    def factor(self, hyper: Tensors) -> Tensor | None:
        """None: the moments are those of gradients."""
        del hyper
        return None

    def advance(self, scalars: Tensors, hyper: Tensors) -> dict[str, Tensor]:
        """Count this step."""
        del hyper
        return {"steps": scalars["steps"] + 1.0}

    def update(
        self, weight: Tensor, gradient: Tensor, slots: Tensors, scalars: Tensors, hyper: Tensors
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step along the moments, whose bias is corrected in the rate (end of section 2): two passes less."""
        first = self.beta1 * slots["moment1"] + (1 - self.beta1) * gradient
        second = self.beta2 * slots["moment2"] + (1 - self.beta2) * gradient * gradient
        correction = torch.sqrt(1 - torch.pow(self.beta2, scalars["steps"]))
        rate = hyper["lr"] * correction / (1 - torch.pow(self.beta1, scalars["steps"]))
        decayed = weight * (1 - hyper["lr"] * self.weight_decay) if self.weight_decay else weight
        step = rate * (first / (second.sqrt() + self.epsilon * correction))
        return decayed - step, {"moment1": first, "moment2": second}

    @property
    def reach(self) -> float:
        """A step is about as long however small the gradients are (section 2.1 of the paper has the bound)."""
        return self.lr * max(1.0, (1 - self.beta1) / math.sqrt(1 - self.beta2))

    def torch_optimizer(self, weights: list[Tensor]) -> Reference:
        """torch.optim.AdamW, which without decay is Adam."""
        betas = (self.beta1, self.beta2)
        return TorchOptimizer(torch.optim.AdamW(weights, self.lr, betas, self.epsilon, self.weight_decay))


@dataclass(frozen=True, slots=True)
class Proximal:
    """Any optimiser with FedProx's proximal term (Li et al., 2020): the gradient gains mu * (w - w at the start).

    Costs one more input per weight; leave it out where no plan will ever set `mu`.
    """

    inner: Optimizer
    mu: float = 0.0

    def __post_init__(self) -> None:
        require_between("mu", self.mu)

    @property
    def slots(self) -> tuple[str, ...]:
        """The anchor, and those of the inner optimiser."""
        return ("anchor", *self.inner.slots)

    @property
    def scalars(self) -> tuple[str, ...]:
        """Those of the inner optimiser."""
        return self.inner.scalars

    @property
    def hyperparameters(self) -> Mapping[str, float]:
        """`mu`, and those of the inner optimiser."""
        return {**self.inner.hyperparameters, "mu": self.mu}

    def factor(self, hyper: Tensors) -> Tensor | None:
        """That of the inner optimiser."""
        return self.inner.factor(hyper)

    def advance(self, scalars: Tensors, hyper: Tensors) -> dict[str, Tensor]:
        """As the inner optimiser does."""
        return self.inner.advance(scalars, hyper)

    def update(
        self, weight: Tensor, gradient: Tensor, slots: Tensors, scalars: Tensors, hyper: Tensors
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A step of the inner optimiser, pulled towards the anchor."""
        factor, away = self.factor(hyper), weight - slots["anchor"]
        if factor is None:
            return self.inner.update(weight, gradient + hyper["mu"] * away, slots, scalars, hyper)
        # The step is a sum then: the pull first, so that a gradient that is a matrix product can be taken off at once.
        return self.inner.update(weight - hyper["mu"] * factor * away, gradient, slots, scalars, hyper)

    @property
    def reach(self) -> float:
        """That of the inner optimiser."""
        return self.inner.reach

    def torch_optimizer(self, weights: list[Tensor]) -> Reference:
        """The inner optimiser of torch, which sees gradients that have the pull added before each step."""
        anchors = [weight.detach().clone() for weight in weights]
        return _Pulled(self.inner.torch_optimizer(weights), weights, anchors, self.mu)


@dataclass(frozen=True, slots=True)
class _Pulled:
    """What `Proximal` must agree with."""

    inner: Reference
    weights: list[Tensor]
    anchors: list[Tensor]
    mu: float

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def step(self, count: float) -> None:
        for weight, anchor in zip(self.weights, self.anchors, strict=True):
            if weight.grad is not None:
                weight.grad.add_(weight.detach() - anchor, alpha=self.mu)
        self.inner.step(count)

    def hold(self) -> None:
        self.inner.hold()
