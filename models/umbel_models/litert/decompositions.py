"""Gradients in terms of what LiteRT has: no transposed convolution with groups, no unpooling, no scatter.

These stand over the shared table of `umbel_models.decompositions`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from umbel.errors import OperatorNotSupported
from umbel_models.convolution import convolution_backward, per_dimension
from umbel_models.decompositions import decomposition_table
from umbel_models.litert.places import PLACES, one_hot
from umbel_models.normalisation import layer_norm

aten = torch.ops.aten


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """A transposed one is an ordinary one of the input, spread by the stride, with the kernel turned round."""
    if not transposed:
        return NotImplemented  # type: ignore[no-any-return] # this is how a decomposition says "keep it"
    count = weight.dim() - 2
    steps, pads, gaps = (per_dimension(value, count) for value in (stride, padding, dilation))
    kernel = list(weight.shape[2:])
    for dim, step in enumerate(steps):
        x = _spread(x, 2 + dim, step)
    around: list[int] = []
    for dim in reversed(range(count)):
        reach = gaps[dim] * (kernel[dim] - 1) - pads[dim]
        # Spreading left step - 1 zeros after the last number.
        around += [reach, reach + per_dimension(output_padding, count)[dim] - (steps[dim] - 1)]
    x = aten.constant_pad_nd(x, around, 0.0)
    inputs, outputs = weight.shape[0], weight.shape[1]
    turned = weight.reshape(inputs, outputs, -1).flip(2)
    turned = turned.reshape(groups, inputs // groups, outputs, -1).transpose(1, 2)
    turned = turned.reshape([groups * outputs, inputs // groups, *kernel])
    return aten.convolution(x, turned, bias, [1] * count, [0] * count, gaps, False, [0] * count, groups)  # type: ignore[no-any-return]


def _convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradient with respect to an ordinary kernel is left to the translator, which has its windows at hand."""
    settings = (stride, padding, dilation, transposed, output_padding, groups)
    if transposed or groups != 1 or weight.dim() > 4 or not wanted[1]:
        return convolution_backward(gradient, x, weight, bias_sizes, *settings, wanted)
    if not wanted[0] and not wanted[2]:
        return NotImplemented  # type: ignore[no-any-return]
    rest = convolution_backward(gradient, x, weight, bias_sizes, *settings, [wanted[0], False, wanted[2]])
    kernel = aten.convolution_backward(gradient, x, weight, bias_sizes, *settings, [False, True, False])[1]
    return rest[0], kernel, rest[2]


def _spread(x: Tensor, dim: int, step: int) -> Tensor:
    """step - 1 zeros after each number along a dimension."""
    if step == 1:
        return x
    behind = x.unsqueeze(dim + 1)
    padding = [0, 0] * (behind.dim() - dim - 2) + [0, step - 1]
    shape = [*x.shape[:dim], x.shape[dim] * step, *x.shape[dim + 1 :]]
    return aten.constant_pad_nd(behind, padding, 0.0).reshape(shape)  # type: ignore[no-any-return]


def _placed(part: Tensor, dim: int, start: int, step: int, size: int) -> Tensor:
    """Zeros of this size along a dimension, with a part at every step-th place from start."""
    spread = _spread(part, dim, step)
    after = size - start - spread.shape[dim]
    return aten.constant_pad_nd(spread, [0, 0] * (part.dim() - dim - 1) + [start, after], 0.0)  # type: ignore[no-any-return]


def _max_pool2d_backward(
    gradient: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """To the first place in each window that holds its maximum, as in torch."""
    del dilation, ceil_mode, indices  # refused by the translator of the forward pass
    window, pads = per_dimension(kernel, 2), per_dimension(padding, 2)
    steps, out = per_dimension(stride or kernel, 2), gradient.shape[2:]
    largest = aten.max_pool2d_with_indices(x, window, steps, pads)[0]
    padded = aten.constant_pad_nd(x, [pads[1], pads[1], pads[0], pads[0]], -3.4e38) if any(pads) else x
    sizes = [x.shape[2] + 2 * pads[0], x.shape[3] + 2 * pads[1]]
    free: Tensor | None = None
    shares = []
    for row, column in itertools.product(range(window[0]), range(window[1])):
        seen = aten.slice.Tensor(padded, 2, row, row + steps[0] * (out[0] - 1) + 1, steps[0])
        seen = aten.slice.Tensor(seen, 3, column, column + steps[1] * (out[1] - 1) + 1, steps[1])
        hit = (seen == largest).to(x.dtype)
        hit, free = (hit, 1 - hit) if free is None else (hit * free, free - hit * free)
        shares.append(hit * gradient)
    if steps == window and not any(pads):
        return _interleaved(shares, window, sizes)
    total = torch.zeros([], dtype=x.dtype)
    for share, (row, column) in zip(shares, itertools.product(range(window[0]), range(window[1])), strict=True):
        total = total + _placed(_placed(share, 2, row, steps[0], sizes[0]), 3, column, steps[1], sizes[1])
    return total[:, :, pads[0] : pads[0] + x.shape[2], pads[1] : pads[1] + x.shape[3]]


def _interleaved(shares: list[Tensor], window: list[int], sizes: list[int]) -> Tensor:
    """Shares by offset in the window, put side by side; windows neither overlap nor hang over."""
    batch, channels, rows, columns = shares[0].shape
    height, width = window
    lines = []
    for row in range(height):
        line = torch.stack(shares[row * width : (row + 1) * width], -1)
        lines.append(line.reshape(batch, channels, rows, columns * width))
    whole = torch.stack(lines, 3).reshape(batch, channels, rows * height, columns * width)
    return aten.constant_pad_nd(whole, [0, sizes[1] - columns * width, 0, sizes[0] - rows * height], 0.0)  # type: ignore[no-any-return]


def _slice_backward(gradient: Tensor, sizes: Sequence[int], dim: int, start: int, end: int, step: int) -> Tensor:
    del end
    dim = dim % gradient.dim()
    return _placed(gradient, dim, start + sizes[dim] if start < 0 else start, step, sizes[dim])


def _select_backward(gradient: Tensor, sizes: Sequence[int], dim: int, index: int) -> Tensor:
    dim = dim % len(sizes)
    return _placed(gradient.unsqueeze(dim), dim, index % sizes[dim], 1, sizes[dim])


# Losses and embeddings.


def _shares(scores: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """How much each score of each example counts: something at its class, zero elsewhere."""
    if scores.dim() != 2:
        raise OperatorNotSupported("a class loss over more than [examples, classes]; flatten positions into examples")
    counts = target != ignore_index
    safe = torch.where(counts, target, torch.zeros((), dtype=target.dtype))
    marked = one_hot(safe, int(scores.shape[1])) * counts.to(scores.dtype).unsqueeze(1)
    return marked if weight is None else marked * weight.unsqueeze(0)


def _nll_loss_forward(
    scores: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    shares = _shares(scores, target, weight, ignore_index)
    losses, total = -(scores * shares).sum(1), shares.sum()
    if reduction == 0:
        return losses, total
    return (losses.sum() / total if reduction == 1 else losses.sum()), total


def _nll_loss_backward(
    gradient: Tensor,
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    total: Tensor,
) -> Tensor:
    shares = _shares(scores, target, weight, ignore_index)
    scale = gradient / total if reduction == 1 else gradient
    return -(scale.unsqueeze(1) if reduction == 0 else scale) * shares


def _embedding_backward(
    gradient: Tensor, indices: Tensor, count: int, padding_idx: int, scale_by_frequency: bool
) -> Tensor:
    if scale_by_frequency:
        raise OperatorNotSupported("embedding with scale_grad_by_freq; leave it out")
    places = indices.reshape(-1)
    marked = one_hot(places, count)
    if padding_idx >= 0:
        marked = marked * (places != padding_idx).to(gradient.dtype).unsqueeze(1)
    return marked.t() @ gradient.reshape(-1, gradient.shape[-1])


def _max_along(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return x.amax([dim], keepdim=keepdim), x.argmax(dim, keepdim=keepdim)


_ERF: Final = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def _erf(x: Tensor) -> Tensor:
    """To 1.5e-7 (Abramowitz and Stegun, 7.1.26); LiteRT has none."""
    size = x.abs()
    step = 1.0 / (1.0 + 0.3275911 * size)
    series = torch.zeros([], dtype=x.dtype)
    for factor in reversed(_ERF):
        series = (series + factor) * step
    return torch.sign(x) * (1.0 - series * torch.exp(-size * size))


def _elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    low = alpha * (torch.exp(torch.clamp(x, max=0.0) * input_scale) - 1.0)
    return scale * torch.where(x > 0, x, low)


def _abs(x: Tensor) -> Tensor:
    """LiteRT knows none of whole numbers."""
    return NotImplemented if x.is_floating_point() else torch.maximum(x, -x)


def _atan2(y: Tensor, x: Tensor) -> Tensor:
    return NotImplemented  # type: ignore[no-any-return] # LiteRT has it


def _atan(x: Tensor) -> Tensor:
    return aten.atan2(x, torch.ones_like(x))  # type: ignore[no-any-return]


def _asin(x: Tensor) -> Tensor:
    return aten.atan2(x, torch.sqrt(1 - x * x))  # type: ignore[no-any-return]


def _acos(x: Tensor) -> Tensor:
    return aten.atan2(torch.sqrt(1 - x * x), x)  # type: ignore[no-any-return]


KEPT: Final = {aten.convolution_backward.default}
"""Backward operators that the translator knows."""

_OWN: Final[dict[Any, Callable[..., Any]]] = {
    aten.abs.default: _abs,
    aten.acos.default: _acos,
    aten.asin.default: _asin,
    aten.atan.default: _atan,
    aten.atan2.default: _atan2,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten.cosh.default: lambda x: 0.5 * (torch.exp(x) + torch.exp(-x)),
    aten.elu.default: _elu,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.erf.default: _erf,
    aten.max.dim: _max_along,
    aten.max_pool2d_with_indices_backward.default: _max_pool2d_backward,
    aten.native_layer_norm.default: layer_norm,
    aten.nll_loss_backward.default: _nll_loss_backward,
    aten.nll_loss_forward.default: _nll_loss_forward,
    aten.select_backward.default: _select_backward,
    aten.sinh.default: lambda x: 0.5 * (torch.exp(x) - torch.exp(-x)),
    aten.slice_backward.default: _slice_backward,
    aten.tan.default: lambda x: torch.sin(x) / torch.cos(x),
}


def litert_table() -> dict[Any, Callable[..., Any]]:
    """The shared decompositions, and LiteRT's own over them."""
    return {**decomposition_table(), **PLACES, **_OWN}
