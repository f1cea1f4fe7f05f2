"""Cross-entropy of classes with a gradient of its own: the shares of classes, less one at the target.

Autograd would take the gradient of a choice and that of a logarithm one after the other: three passes over all scores
more, and half as many small operators again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def class_loss(scores: Tensor, target: Tensor, ignored: int, mean: bool) -> Tensor:
    """The sum of losses, or their mean, over the examples whose target isn't `ignored`.

    Args:
        scores: of each class, [N, C].
        target: the right class, [N], whole numbers.
        ignored: the target of examples that don't count.
        mean: over those that count; not a number where there are none, as in torch.
    """
    places = target.unsqueeze(1)
    skipped = places == ignored
    if not 0 <= ignored < scores.shape[1]:
        # A class that may be looked up; a target that is no class stays what it is, and the runtime refuses it.
        places = torch.where(skipped, 0, places)
    result: tuple[Tensor, ...] = _ClassLoss.apply(scores, places, skipped, mean)  # type: ignore[no-untyped-call]
    return result[0]


class _ClassLoss(torch.autograd.Function):
    @staticmethod
    def forward(scores: Tensor, places: Tensor, skipped: Tensor, mean: bool) -> tuple[Tensor, ...]:
        logs = torch.log_softmax(scores, 1)
        less = torch.where(skipped, 0.0, -1.0)
        total = (torch.gather(logs, 1, places) * less).sum()
        each = torch.full([], -1.0) / less.sum() if mean else torch.ones([])
        return total * each, logs, less, each

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[1:3], *output[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        places, skipped, logs, less, each = ctx.saved_tensors
        weight = torch.where(skipped, 0.0, gradient * each)
        return torch.scatter_add(torch.exp(logs), 1, places, less) * weight, None, None, None
