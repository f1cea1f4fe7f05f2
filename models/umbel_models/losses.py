"""Losses and metric sums in forms that count right on devices: no mean over nothing, sums that add over batches.

Any function of what the module returned and the targets does as a loss; torch's own (`F.cross_entropy`, `F.mse_loss`,
`F.huber_loss`, `F.binary_cross_entropy_with_logits`) need nothing from here.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor

from umbel.errors import CannotCompile

PADDING: Final = 0
"""The token that stands for no token, where a sequence is shorter than the model's."""


def _require_shape(target: Tensor, shape: torch.Size) -> None:
    """Torch would let other shapes broadcast: [N, 1] with [N] to all pairs of examples."""
    if target.shape != shape:
        raise CannotCompile(f"targets of shape {list(target.shape)}, where this output has targets of {list(shape)}")


def correct(output: Tensor, target: Tensor) -> Tensor:
    """How many examples have their largest score at the target class; output [N, C], target [N]."""
    _require_shape(target, output.shape[:-1])
    return (output.argmax(-1) == target).to(torch.float32).sum()


def token_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over the tokens that aren't padding, and 0 where all are; output [N, T, V], target [N, T]."""
    scores, places = output.reshape(-1, output.shape[-1]), target.reshape(-1)
    total = F.cross_entropy(scores, places, ignore_index=PADDING, reduction="sum")
    return total / token_count(output, target).clamp(min=1.0)


def token_count(output: Tensor, target: Tensor) -> Tensor:
    """How many tokens aren't padding; target [N, T]."""
    del output
    return (target != PADDING).to(torch.float32).sum()


def token_correct(output: Tensor, target: Tensor) -> Tensor:
    """How many tokens, padding aside, have their largest score at the target; output [N, T, V], target [N, T]."""
    _require_shape(target, output.shape[:-1])
    hit = (output.argmax(-1) == target) & (target != PADDING)
    return hit.to(torch.float32).sum()


def binary_correct(output: Tensor, target: Tensor) -> Tensor:
    """How many yes-or-no answers are right; output holds logits, target 0 or 1, of the same shape."""
    _require_shape(target, output.shape)
    return ((output > 0) == (target > 0.5)).to(torch.float32).sum()


def absolute_error(output: Tensor, target: Tensor) -> Tensor:
    """The sum over examples of the mean absolute error of each; output and target [N, ...]."""
    _require_shape(target, output.shape)
    return (output - target).abs().reshape(target.shape[0], -1).mean(1).sum()


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """The sum over examples of the mean squared error of each; output and target [N, ...]."""
    _require_shape(target, output.shape)
    difference = (output - target).reshape(target.shape[0], -1)
    return (difference * difference).mean(1).sum()
