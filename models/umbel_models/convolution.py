"""The gradients of a convolution, of any dimension, as ordinary convolutions and matrix products.

With respect to the input it is a transposed convolution. With respect to the kernel it is one matrix product over
the windows that each kernel offset saw; that copies the input once per offset, and is still the fastest form that
was measured on ONNX Runtime.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

aten = torch.ops.aten


def per_dimension(value: Sequence[int], count: int) -> list[int]:
    """A setting that may be given once for all dimensions, for each of them."""
    return list(value) * count if len(value) == 1 else list(value)


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
    """sum over examples and positions of gradient[o] * x[i] as seen through kernel offset k, as [o, i, k...]."""
    spread = [pad for size in reversed(padding) for pad in (size, size)]
    padded = aten.constant_pad_nd(x, spread, 0.0) if any(padding) else x
    out_sizes = list(gradient.shape[2:])
    offsets = list(itertools.product(*(range(size) for size in kernel)))
    inputs, outputs = x.shape[1] // groups, gradient.shape[1] // groups
    if inputs == outputs == 1:
        # Depth-wise: nothing to contract but examples and positions.
        dims = [0, *range(2, x.dim())]
        taps = [(_seen(padded, at, out_sizes, stride, dilation) * gradient).sum(dims) for at in offsets]
        return torch.stack(taps, 1).reshape([groups, 1, *kernel])
    channels_first = padded.transpose(0, 1)
    views = [_seen(channels_first, at, out_sizes, stride, dilation) for at in offsets]
    rows = gradient.transpose(0, 1)
    if groups == 1:
        columns = torch.cat([view.reshape(inputs, -1) for view in views], 0)
        product = rows.reshape(outputs, -1) @ columns.t()
    else:
        columns = torch.cat([view.reshape(groups, inputs, -1) for view in views], 1)
        product = rows.reshape(groups, outputs, -1) @ columns.transpose(1, 2)
    by_offset = product.reshape(groups * outputs, len(offsets), inputs)
    return by_offset.transpose(1, 2).reshape([groups * outputs, inputs, *kernel])


def _seen(
    padded: Tensor, offset: Sequence[int], sizes: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """What one kernel offset saw at each output position."""
    view = padded
    for dim, (at, size, step, gap) in enumerate(zip(offset, sizes, stride, dilation, strict=True), start=2):
        start = at * gap
        view = aten.slice.Tensor(view, dim, start, start + step * (size - 1) + 1, step)
    return view
