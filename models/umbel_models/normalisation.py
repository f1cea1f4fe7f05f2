"""Normalisations and their gradients, in as few operations on whole tensors as there can be.

Torch's own forms use broadcasts that only its compiler knows. Here whatever is the same for a channel or a group is
worked out on small tensors first. Forward and backward spell what they share alike, so that it is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""With respect to input, weight and bias."""


def _centred(x: Tensor, dims: list[int], epsilon: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x without its mean; mean, variance and 1 / deviation, with sizes of one where they were reduced."""
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    variance = (centred * centred).mean(dims, keepdim=True)
    return centred, mean, variance, torch.rsqrt(variance + epsilon)


def _scaled(x: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    scaled = x * factor
    return scaled if bias is None else scaled + bias


# Over the last dimensions.


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm (Ba et al., 2016): output, mean and 1 / deviation of each example."""
    centred, mean, _, scale = _centred(x, list(range(x.dim() - len(shape), x.dim())), epsilon)
    y = centred * scale
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias), mean, scale


def layer_norm_backward(
    gradient: Tensor,
    x: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: Sequence[bool],
) -> Gradients:
    """The gradients of `layer_norm`."""
    del bias
    inner, outer = list(range(x.dim() - len(shape), x.dim())), list(range(x.dim() - len(shape)))
    y = (x - mean) * scale
    along = gradient * y
    to_x = to_weight = to_bias = None
    if wanted[0]:
        pulled = gradient if weight is None else gradient * weight
        level = pulled.mean(inner, keepdim=True)
        to_x = (pulled - level - y * _mean_of_product(along, weight, inner)) * scale
    if wanted[1]:
        to_weight = along.sum(outer) if outer else along
    if wanted[2]:
        to_bias = gradient.sum(outer) if outer else gradient
    return to_x, to_weight, to_bias


def _mean_of_product(along: Tensor, weight: Tensor | None, inner: list[int]) -> Tensor:
    if weight is None:
        return along.mean(inner, keepdim=True)
    # A product with a column does in one pass what would take two.
    column = weight.reshape(-1, 1) / weight.numel()
    return torch.mm(along.reshape(-1, weight.numel()), column).reshape([*along.shape[: -len(inner)], *[1] * len(inner)])


# Over the batch.


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_variance: Tensor,
    training: bool,
    momentum: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm (Ioffe and Szegedy, 2015): output, mean and 1 / deviation [C]; moves the running statistics."""
    if not training:
        return batch_norm_frozen(x, weight, bias, running_mean, running_variance, momentum, epsilon)
    y, mean, variance, scale = _by_batch(x, weight, bias, epsilon)
    seen = x.numel() // x.shape[1]
    running_mean.copy_(momentum * mean + (1 - momentum) * running_mean)
    # The running variance is the unbiased one. A lone number tells nothing of it, and leaves it as it is: torch refuses
    # a batch of one, but a device's last batch may be one.
    others = torch.ones([]) * (seen - 1)
    unbiased, share = variance * (seen / others.clamp(min=1.0)), momentum * others.clamp(max=1.0)
    running_variance.copy_(share * unbiased + (1 - share) * running_variance)
    return y, mean, scale


def batch_norm_untracked(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm without running statistics: that of the batch always, as for weights that are standardised."""
    del training, momentum
    y, mean, _, scale = _by_batch(x, weight, bias, epsilon)
    return y, mean, scale


def _by_batch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output; mean, variance and 1 / deviation [C]."""
    channels, shape = x.shape[1], _per_channel(x)
    centred, mean, variance, scale = _centred(x, [0, *range(2, x.dim())], epsilon)
    factor = scale if weight is None else scale * weight.reshape(shape)
    y = _scaled(centred, factor, None if bias is None else bias.reshape(shape))
    return y, mean.reshape(channels), variance.reshape(channels), scale.reshape(channels)


def batch_norm_frozen(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_variance: Tensor,
    momentum: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm by its running statistics: one factor and one offset for each channel."""
    del momentum
    factor = torch.rsqrt(running_variance + epsilon)
    factor = factor if weight is None else factor * weight
    offset = -running_mean * factor
    offset = offset if bias is None else offset + bias
    none = torch.zeros([0])
    return x * factor.reshape(_per_channel(x)) + offset.reshape(_per_channel(x)), none, none


def batch_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    training: bool,
    epsilon: float,
    wanted: Sequence[bool],
) -> Gradients:
    """The gradients of `batch_norm`, or of `batch_norm_frozen`."""
    shape, dims = _per_channel(x), [0, *range(2, x.dim())]
    if training:
        assert mean is not None and scale is not None, "what the forward pass gave"  # noqa: S101
    else:
        assert running_mean is not None and running_variance is not None, "frozen statistics"  # noqa: S101
        mean, scale = running_mean, torch.rsqrt(running_variance + epsilon)
    centred, scale = x - mean.reshape(shape), scale.reshape(shape)
    total, along = gradient.sum(dims, keepdim=True), (gradient * centred).sum(dims, keepdim=True) * scale
    factor = scale if weight is None else scale * weight.reshape(shape)
    to_x = gradient * factor if wanted[0] else None
    if to_x is not None and training:
        share = factor / (x.numel() // x.shape[1])
        to_x = to_x - (centred * (along * scale * share) + total * share)
    return to_x, along.reshape(-1) if wanted[1] else None, total.reshape(-1) if wanted[2] else None


def _per_channel(x: Tensor) -> list[int]:
    return [1, int(x.shape[1])] + [1] * (x.dim() - 2)
