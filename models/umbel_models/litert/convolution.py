"""Convolutions: LiteRT's own where the kernel is a constant, matrix products where it is an input or a gradient.

    [N, H, W, C] --windows--> [N, H', W', taps * C] --product with the kernel [taps * C, O]--> [N, H', W', O]

LiteRT's quick kernels (XNNPACK) take a convolution only with constant weights, and leave others to a slow one that
unfolds the windows as well. A product of any two tensors is quick. The gradient with respect to the kernel is a
product with the very same windows, which are therefore unfolded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import fx

from umbel.errors import OperatorNotSupported
from umbel_models.convolution import per_dimension
from umbel_models.litert.graph import Shape, Writer, shape_of, translates
from umbel_models.litert.shapes import cut, padded

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _Frame:
    """How a kernel moves over rows and columns; one dimension becomes the second of two."""

    kernel: list[int]
    steps: list[int]
    pads: list[int]
    gaps: list[int]

    @classmethod
    def of(cls, weight: fx.Node, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Self:
        kernel = [int(size) for size in shape_of(weight)[2:]]
        count = len(kernel)
        if count not in (1, 2):
            raise OperatorNotSupported(
                f"a convolution over {count} dimensions; use one over one or two, or ONNX Runtime alone"
            )
        steps, pads, gaps = (per_dimension(setting, count) for setting in (stride, padding, dilation))
        return cls(kernel, steps, pads, gaps) if count == 2 else cls([1, *kernel], [1, *steps], [0, *pads], [1, *gaps])

    @property
    def keeps_sizes(self) -> bool:
        each = zip(self.kernel, self.steps, self.pads, self.gaps, strict=True)
        return all(step == 1 and 2 * pad == gap * (taps - 1) for taps, step, pad, gap in each)


@translates(aten.convolution.default)
def _convolution(
    w: Writer,
    n: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    if transposed:
        raise OperatorNotSupported(
            "a transposed convolution over three dimensions; use one over one or two, or ONNX Runtime alone"
        )
    frame = _Frame.of(weight, stride, padding, dilation)
    image, out = _image(w, x), shape_of(n)
    last = [out[0], *([1] if len(out) == 3 else []), *out[2:], out[1]]
    if groups == 1 and not w.has_constant_weights:
        made = _product(w, _windows(w, image, frame, last), weight, bias, last)
    else:
        made = _native(w, image, frame, weight, bias, groups, last)
    return w.from_channels_last(w.reshape(made, [last[0], *last[2:]]) if len(out) == 3 else made)


@translates(aten.convolution_backward.default)
def _kernel_gradient(
    w: Writer,
    n: fx.Node,
    gradient: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    bias_sizes: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *rest: Any,
) -> Any:
    """Only of one group, and only with respect to the kernel; the decomposition sees to the rest."""
    frame, moved = _Frame.of(weight, stride, padding, dilation), _image(w, gradient)
    windows = _windows(w, _image(w, x), frame, w.shape(moved))
    by_output = w.transpose(_rows(w, moved), [1, 0])
    outputs, inputs = shape_of(weight)[:2]
    shape = [outputs, w.shape(windows)[-1]]
    product = w.op("BATCH_MATMUL", [by_output, _rows(w, windows)], shape, np.float32, adjX=False, adjY=False)
    by_tap = w.transpose(w.reshape(product, [outputs, *frame.kernel, inputs]), [0, 3, 1, 2])
    return [-1, w.reshape(by_tap, shape_of(weight)), -1]


def _image(w: Writer, x: fx.Node) -> int:
    """[N, H, W, C], with one row if there are no rows."""
    image = w.channels_last(x)
    shape = w.shape(image)
    return image if len(shape) == 4 else w.reshape(image, [shape[0], 1, *shape[1:]])


def _rows(w: Writer, image: int) -> int:
    """[N, H, W, C] as [N * H * W, C]."""
    shape = w.shape(image)
    return w.reshape(image, [shape[0] * shape[1] * shape[2], shape[3]])


def _windows(w: Writer, image: int, frame: _Frame, last: Shape) -> int:
    """What each place of the output sees, [N, H', W', taps * C]: row by row, as the kernel's taps are laid out.

    Columns are unfolded before rows, so that 3 x 3 taps take 3 + 3 copies rather than 9.
    """
    image = padded(w, image, [(0, 0), *((pad, pad) for pad in frame.pads), (0, 0)])
    for dim in (2, 1):
        taps, step, gap = frame.kernel[dim - 1], frame.steps[dim - 1], frame.gaps[dim - 1]
        reach = step * (last[dim] - 1) + 1
        if taps == 1 and step == 1:
            continue
        parts = [cut(w, image, dim, (tap * gap, tap * gap + reach, step), last[dim]) for tap in range(taps)]
        shape = [*w.shape(parts[0])[:3], taps * w.shape(parts[0])[3]]
        image = parts[0] if taps == 1 else w.op("CONCATENATION", parts, shape, np.float32, axis=3)
    return image


def _product(w: Writer, windows: int, weight: fx.Node, bias: fx.Node | None, last: Shape) -> int:
    rows, columns = _rows(w, windows), w.shape(windows)[3]
    kernel = w.reshape(_taps_inside(w, weight), [last[3], columns])
    shape = [w.shape(rows)[0], last[3]]
    made = w.op("BATCH_MATMUL", [rows, kernel], shape, np.float32, adjX=False, adjY=True)
    if bias is not None:
        made = w.op("ADD", [made, bias], shape, np.float32)
    return w.reshape(made, last)


def _taps_inside(w: Writer, weight: fx.Node) -> int:
    """A kernel [O, I, taps...] as [O, rows, columns, I]."""
    shape = shape_of(weight)
    return w.transpose(w.reshape(weight, [*shape[:2], 1, shape[2]]) if len(shape) == 3 else weight, [0, 2, 3, 1])


def _native(
    w: Writer, image: int, frame: _Frame, weight: fx.Node, bias: fx.Node | None, groups: int, last: Shape
) -> int:
    options: dict[str, Any] = {"padding": "VALID", "strideH": frame.steps[0], "strideW": frame.steps[1]}
    options |= {"dilationHFactor": frame.gaps[0], "dilationWFactor": frame.gaps[1]}
    if any(frame.pads) and frame.keeps_sizes:
        options["padding"] = "SAME"
    else:
        image = padded(w, image, [(0, 0), *((pad, pad) for pad in frame.pads), (0, 0)])
    outputs, inputs = shape_of(weight)[:2]
    kind, kernel = "CONV_2D", 0
    if inputs == 1 and groups > 1:
        kind, options["depthMultiplier"] = "DEPTHWISE_CONV_2D", outputs // groups
        by_tap = w.transpose(w.reshape(weight, [outputs, frame.kernel[0] * frame.kernel[1]]), [1, 0])
        kernel = w.reshape(by_tap, [1, *frame.kernel, outputs])
    else:
        kernel = _taps_inside(w, weight)
    # The native kernels want a bias.
    offset = w.number(bias) if bias is not None else w.constant(np.zeros(outputs, np.float32))
    return w.op(kind, [image, kernel, offset], last, np.float32, **options)
