"""Dropout, and noise, as functions: a mask is worked out from a seed, the number of the step, the layer and the place.

Nothing in a graph draws. The mask comes from whole numbers of 32 bits, which every runtime reckons alike, so a step
can be told again anywhere: on ONNX Runtime, on LiteRT and, for the gate, in torch itself. The seed is an input of the
training graph (`seed`, from 0 up to 2**24), the number of the step a slot (`s_draws`).

The numbers are those of the field of a prime that is 2 modulo 3, where cubing only changes the order; places are
mixed in one dimension after the other, as (code so far + code of this place) cubed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from umbel.errors import OperatorNotSupported

DRAWS: Final = "draws"
"""The scalar slot that counts steps, so that each has masks of its own."""

aten = torch.ops.aten
_PRIME: Final = 46337
"""Products of two numbers below it fit into 31 bits."""
_OTHER: Final = 46307
_LAYER: Final = 7919


@dataclass(slots=True)
class Draws:
    """What the masks of one forward pass come from; each layer takes the next number."""

    seed: Tensor
    step: Tensor
    layers: int = 0


_NOW: ContextVar[Draws | None] = ContextVar("draws", default=None)


@contextmanager
def drawing(seed: Tensor, step: Tensor) -> Iterator[Draws]:
    """Let dropout in this forward pass take its masks from these two numbers, float32 scalars."""
    draws = Draws(seed, step)
    token = _NOW.set(draws)
    try:
        yield draws
    finally:
        _NOW.reset(token)


def _cube(x: Tensor) -> Tensor:
    x = torch.remainder(x, _PRIME)
    return torch.remainder(torch.remainder(x * x, _PRIME) * x, _PRIME)


def _places(size: Any) -> Tensor:
    """0, 1, ... size - 1 in the prime's field; counted by a sum where the size is only known when the graph runs."""
    if isinstance(size, int):
        return torch.arange(size, dtype=torch.int32)
    return torch.ones([size], dtype=torch.int32).cumsum(0, dtype=torch.int32) - 1


def keep_mask(shape: Any, keep: float) -> Tensor:
    """Which places of a tensor to keep, as booleans of this shape; each with probability `keep`.

    Raises:
        OperatorNotSupported: outside of a training step there is nothing to draw from.
    """
    return _codes(shape) < round(keep * _PRIME)


def uniform(shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers between 0 and 1, both left out, in steps of a 46337th; raises as `keep_mask`."""
    return (_codes(shape).to(dtype or torch.float32) + 0.5) / _PRIME


def normal(shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of a standard normal distribution (Box and Muller, 1958); raises as `keep_mask`."""
    far = torch.sqrt(-2 * torch.log(uniform(shape, dtype)))
    return far * torch.cos(2 * math.pi * uniform(shape, dtype))


def _codes(shape: Any) -> Tensor:
    """A number below the prime for each place."""
    draws = _NOW.get()
    if draws is None:
        raise OperatorNotSupported("something random outside of training; answers must not depend on chance")
    draws.layers += 1
    seed, step = draws.seed.to(torch.int32), draws.step.to(torch.int32)
    step = torch.remainder(step, _PRIME)
    first = _cube(_cube(torch.remainder(seed, _PRIME) + _LAYER * draws.layers) + step)
    other = _cube(_cube(torch.remainder(seed, _OTHER) + _LAYER * draws.layers) + step)
    code = _cube(_places(shape[0]) + first) if len(shape) else first
    for size in shape[1:]:
        other = _cube(other + first)
        code = _cube(code.unsqueeze(-1) + _cube(_places(size) + other))
    return code


def _native_dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if not train:
        return x, torch.ones_like(x, dtype=torch.bool)
    kept = keep_mask(x.shape, 1.0 - p)
    scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
    return x * kept.to(x.dtype) * scale, kept


def _bernoulli(x: Tensor, p: float = 0.5, generator: Any = None) -> Tensor:
    del generator
    return x.copy_(keep_mask(x.shape, p).to(x.dtype))


DECOMPOSITIONS: Final[dict[Any, Callable[..., Any]]] = {
    aten.native_dropout.default: _native_dropout,
    aten.bernoulli_.float: _bernoulli,
    aten.bernoulli.default: lambda x, generator=None: (uniform(x.shape, x.dtype) < x).to(x.dtype),
    aten.normal_.default: lambda x, mean=0.0, std=1.0, generator=None: x.copy_(normal(x.shape, x.dtype) * std + mean),
    aten.rand.default: lambda size, dtype=None, **_: uniform(size, dtype),
    aten.rand_like.default: lambda x, dtype=None, **_: uniform(x.shape, dtype or x.dtype),
    aten.randn.default: lambda size, dtype=None, **_: normal(size, dtype),
    aten.randn_like.default: lambda x, dtype=None, **_: normal(x.shape, dtype or x.dtype),
    aten.uniform_.default: lambda x, low=0.0, high=1.0, generator=None: x.copy_(
        uniform(x.shape, x.dtype) * (high - low) + low
    ),
    # What becomes of it under torch.func.
    aten.bernoulli.p: lambda x, p=0.5, generator=None: _bernoulli(torch.empty_like(x), p, generator),
}
"""For tracing."""


class _SameDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets torch itself take the masks that a graph works out, while `drawing`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = DECOMPOSITIONS.get(func)
        return func(*args, **(kwargs or {})) if own is None else own(*args, **(kwargs or {}))


@contextmanager
def drawing_in_torch(seed: Tensor, step: Tensor) -> Iterator[Draws]:
    """As `drawing`, for a forward pass that torch itself runs: it takes the masks that a graph works out."""
    with drawing(seed, step) as draws, _SameDraws():  # type: ignore[no-untyped-call]
        yield draws
