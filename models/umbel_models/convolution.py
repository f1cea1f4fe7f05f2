"""The gradients of a convolution, of any dimension, as ordinary convolutions and matrix products.

With respect to the input it is a transposed convolution. With respect to the kernel it is a matrix product over what
each kernel offset saw, which copies the input once for each; it is still the fastest form that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def per_dimension(value: Any, count: int) -> list[Any]:
    """A setting that may be given once for all dimensions, as a number or a list of one, for each of them."""
    given = list(value) if isinstance(value, (tuple, list)) else [value]
    return given * count if len(given) == 1 else given


def convolution_backward(
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
    """Gradients with respect to input, kernel and bias, each only where it is wanted."""
    del bias_sizes, output_padding
    count = weight.dim() - 2
    steps, padding = per_dimension(stride, count), per_dimension(padding, count)
    dilation = per_dimension(dilation, count)
    to_input = to_kernel = to_bias = None
    if wanted[0] and transposed:
        to_input = aten.convolution(gradient, weight, None, steps, padding, dilation, False, [0] * count, groups)
    elif wanted[0]:
        to_input = input_gradient(gradient, weight, list(x.shape[2:]), steps, padding, dilation, groups)
    if wanted[1]:
        # In a transposed convolution input and gradient change places.
        seen, moved = (gradient, x) if transposed else (x, gradient)
        to_kernel = _kernel_gradient(moved, seen, list(weight.shape[2:]), steps, padding, dilation, groups)
    if wanted[2]:
        to_bias = gradient.sum([0, *range(2, gradient.dim())])
    return to_input, to_kernel, to_bias


def input_gradient(
    gradient: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient with respect to an input of these spatial sizes."""
    reached = [
        (out - 1) * step - 2 * pad + gap * (kernel - 1) + 1
        for out, step, pad, gap, kernel in zip(
            gradient.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    # Where a stride didn't divide evenly, the last inputs were never seen.
    missing = [size - end for size, end in zip(sizes, reached, strict=True)]
    return aten.convolution(gradient, weight, None, stride, padding, dilation, True, missing, groups)  # type: ignore[no-any-return]


def _kernel_gradient(
    gradient: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """sum over examples and positions of gradient[o] * x[i] as seen through kernel offset k, as [o, i, k...].

    Where the stride of the first dimension is one, the gradient moves along it instead of the input: a matrix product
    of both meets all offsets, and a kernel of 3 x 3 costs 3 + 3 copies rather than 9.
    """
    first = kernel[0]
    apart = len(kernel) > 1 and stride[0] == 1 and first > 1
    reach = [int(x.shape[2]) if apart else int(gradient.shape[2]), *(int(size) for size in gradient.shape[3:])]
    inputs, outputs = x.shape[1] // groups, gradient.shape[1] // groups
    taps = kernel if apart else [1, *kernel]
    together = groups == 1 and _small(reach, inputs * math.prod(taps[1:]), outputs * taps[0])
    if together:
        # What is contracted comes last: positions along the first dimension, examples, the other positions.
        order = [1, 2, 0] if apart else [1, 0, 2]
        x, gradient = (tensor.permute([*order, *range(3, tensor.dim())]) for tensor in (x, gradient))
    if apart:
        rows = _moved_down(gradient, 1 if together else 2, reach[0], first, padding[0], dilation[0])
        seen = _seen_by_offset(x, 3, kernel[1:], reach[1:], stride[1:], padding[1:], dilation[1:])
    else:
        rows, seen = gradient, _seen_by_offset(x, 2, kernel, reach, stride, padding, dilation)
    product = _met(rows, seen, outputs * taps[0], groups, together)
    by_offset = product.reshape([groups, outputs, taps[0], len(seen), inputs]).permute(0, 1, 4, 2, 3)
    return by_offset.reshape([groups * outputs, inputs, *kernel])


def _small(sizes: list[int], columns: int, rows: int) -> bool:
    """Whether what one example gives is larger than what goes into it."""
    return rows * columns > math.prod(sizes) * (rows + columns)


def _met(rows: Tensor, seen: list[Tensor], count: int, groups: int, together: bool) -> Tensor:
    """The product of all rows with all that was seen, summed over positions and examples."""
    if together:
        columns = (torch.cat(seen, 0) if len(seen) > 1 else seen[0]).reshape([len(seen) * seen[0].shape[0], -1])
        return torch.mm(rows.reshape([count, -1]), columns.t())
    # One product for each example, so that what it works on stays in the cache.
    batch, channels, sizes = rows.shape[0], seen[0].shape[1] // groups, seen[0].shape[2:]
    if groups > 1:
        seen = [view.reshape([batch * groups, channels, *sizes]) for view in seen]
    columns = (torch.cat(seen, 1) if len(seen) > 1 else seen[0]).reshape([batch * groups, len(seen) * channels, -1])
    by_example = torch.bmm(rows.reshape([batch * groups, count, -1]), columns.transpose(1, 2))
    return by_example.reshape([batch, -1]).sum(0)


def _moved_down(gradient: Tensor, dim: int, size: int, kernel: int, padding: int, gap: int) -> Tensor:
    """For each kernel offset the gradient where the input stood that it saw there, or zeros; one after the other."""
    spare = max(gap * (kernel - 1) - padding, 0)
    places = [row - at * gap + padding + spare for at in range(kernel) for row in range(size)]
    return aten.index_select(_padded(gradient, dim, spare, spare), dim, torch.tensor(places))  # type: ignore[no-any-return]


def _seen_by_offset(
    x: Tensor,
    dim: int,
    kernel: Sequence[int],
    sizes: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[Tensor]:
    """For each kernel offset what it saw at each output position, over the dimensions from this one on."""
    views = [x]
    for taps, size, step, pad, gap in zip(kernel, sizes, stride, padding, dilation, strict=True):
        if step > 1:
            # Padded once for all offsets, then cut; without a stride padding each is the cheaper way.
            views = [_padded(view, dim, pad, pad) for view in views]
            views = [_cut(view, dim, at * gap, size, step) for view in views for at in range(taps)]
        else:
            starts = [at * gap - pad for at in range(taps)]
            views = [_padded(v, dim, -start, start + size - v.shape[dim]) for v in views for start in starts]
        dim += 1
    return views


def _padded(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """Zeros before and after along a dimension; less than none cuts."""
    if before == after == 0:
        return x
    return aten.constant_pad_nd(x, [0, 0] * (x.dim() - dim - 1) + [before, after], 0.0)  # type: ignore[no-any-return]


def _cut(x: Tensor, dim: int, start: int, size: int, step: int) -> Tensor:
    return aten.slice.Tensor(x, dim, start, start + step * (size - 1) + 1, step)  # type: ignore[no-any-return]
