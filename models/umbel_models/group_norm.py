"""Group norm (Wu and He, 2018) as a layer norm of each group, with a gradient of its own.

Autograd, asked for gradients that could be differentiated again, would take torch's general form: twice as many
operators. What is the same for a channel or a group is worked out on small tensors first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """x [N, C, ...] with mean 0 and deviation 1 in each group of channels, times `weight` [C], plus `bias` [C]."""
    del cudnn_enabled
    rows: Tensor = _Normalised.apply(x.reshape(x.shape[0], num_groups, -1), weight, bias, eps)[0]  # type: ignore[no-untyped-call]
    return rows.reshape(x.shape)


class _Normalised(torch.autograd.Function):
    """Rows [N, G, each * area] to channels [N, C, area]."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> tuple[Tensor, ...]:
        normal, _, scale = torch.native_layer_norm(x, [x.shape[2]], None, None, epsilon)
        y = normal
        if weight is not None:
            y = y.reshape(x.shape[0], len(weight), -1) * weight.unsqueeze(1)
        if bias is not None:
            y = y.reshape(x.shape[0], len(bias), -1) + bias.unsqueeze(1)
        return (normal.clone() if y is normal else y), normal, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.weight, ctx.has_bias = inputs[1] is not None, inputs[2] is not None
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:], *([inputs[1]] if ctx.weight else []))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        normal, scale, *weights = ctx.saved_tensors
        batch, groups, size = normal.shape
        total, along = gradient.sum(2), (gradient * normal.reshape(gradient.shape)).sum(2)
        sums, pulled = (total, along), gradient.reshape(normal.shape) * scale
        if weights:
            sums = (total * weights[0], along * weights[0])
            factor = (scale * weights[0].reshape(groups, -1)).reshape(batch, -1, 1)
            pulled = (gradient * factor).reshape(normal.shape)
        level, slope = (part.reshape(batch, groups, -1).sum(2, keepdim=True) * (scale / size) for part in sums)
        to_x = pulled - (normal * slope + level)
        return to_x, along.sum(0) if weights else None, total.sum(0) if ctx.has_bias else None, None
