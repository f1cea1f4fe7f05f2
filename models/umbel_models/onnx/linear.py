"""Matrix products, convolutions and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from umbel.errors import OperatorNotSupported
from umbel_models import lstm  # noqa: F401 - brings an operator of ours
from umbel_models.convolution import per_dimension
from umbel_models.onnx.graph import Writer, attribute_ints, dtype_of, shape_of, translates

aten = torch.ops.aten


@translates(aten.mm.default, aten.bmm.default, aten.matmul.default)
def _product(w: Writer, n: fx.Node, x: fx.Node, y: fx.Node) -> Any:
    return w.node("MatMul", x, y)


@translates(aten.addmm.default)
def _affine(w: Writer, n: fx.Node, bias: fx.Node, x: fx.Node, y: fx.Node, beta: float = 1, alpha: float = 1) -> Any:
    return w.node("Gemm", x, y, bias, alpha=float(alpha), beta=float(beta))


@translates(aten.baddbmm.default)
def _batched_affine(
    w: Writer, n: fx.Node, bias: fx.Node, x: fx.Node, y: fx.Node, beta: float = 1, alpha: float = 1
) -> Any:
    product = w.node("MatMul", x, y)
    if alpha != 1:
        product = w.node("Mul", product, w.cast(alpha, dtype_of(n)))
    if beta == 0:
        return product
    scaled = bias if beta == 1 else w.node("Mul", bias, w.cast(beta, dtype_of(n)))
    return w.node("Add", product, scaled)


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
    count = len(shape_of(weight)) - 2
    pads = per_dimension(padding, count)
    if any(pad < 0 for pad in pads):
        raise OperatorNotSupported("negative padding; cut the tensor before the convolution")
    settings = attribute_ints(
        {
            "strides": per_dimension(stride, count),
            "dilations": per_dimension(dilation, count),
            "pads": [*pads, *pads],
            "kernel_shape": shape_of(weight)[2:],
        }
    )
    operands = [x, weight] if bias is None else [x, weight, bias]
    if not transposed:
        return w.node("Conv", *operands, group=groups, **settings)
    extra = [int(size) for size in per_dimension(output_padding, count)]
    return w.node("ConvTranspose", *operands, group=groups, output_padding=extra, **settings)


@translates(aten.max_pool2d_with_indices.default)
def _max_pool(
    w: Writer,
    n: fx.Node,
    x: fx.Node,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Any:
    pads = per_dimension(padding, 2)
    largest, places = w.node(
        "MaxPool",
        x,
        outputs=2,
        kernel_shape=per_dimension(kernel, 2),
        strides=per_dimension(stride or kernel, 2),
        pads=[*pads, *pads],
        dilations=per_dimension(dilation, 2),
        ceil_mode=int(ceil_mode),
    )
    w.flat_indices[n] = places
    # ONNX counts places through the whole tensor, torch through each plane.
    height, width = shape_of(x)[2:]
    return [largest, w.node("Mod", places, w.constant(height * width, np.int64))]


@translates(aten.max_pool2d_with_indices_backward.default)
def _max_unpool(
    w: Writer,
    n: fx.Node,
    gradient: fx.Node,
    x: fx.Node,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: fx.Node,
) -> Any:
    pooled = indices.args[0]
    if not isinstance(pooled, fx.Node) or pooled not in w.flat_indices:
        raise OperatorNotSupported(
            "the gradient of a pooling whose indices come from elsewhere; take those of F.max_pool2d"
        )
    return w.node(
        "MaxUnpool",
        gradient,
        w.flat_indices[pooled],
        w.node("Shape", x),
        kernel_shape=per_dimension(kernel, 2),
        strides=per_dimension(stride or kernel, 2),
    )


@translates(aten.avg_pool2d.default)
def _average_pool(
    w: Writer,
    n: fx.Node,
    x: fx.Node,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Any:
    if divisor is not None:
        raise OperatorNotSupported("average pooling with a divisor of its own; scale the result instead")
    pads = per_dimension(padding, 2)
    return w.node(
        "AveragePool",
        x,
        kernel_shape=per_dimension(kernel, 2),
        strides=per_dimension(stride or kernel, 2),
        pads=[*pads, *pads],
        ceil_mode=int(ceil_mode),
        count_include_pad=int(count_include_pad),
    )


@translates(torch.ops.umbel.lstm_layer.default)
def _lstm(
    w: Writer,
    n: fx.Node,
    x: fx.Node,
    to_input: fx.Node,
    to_state: fx.Node,
    biases: fx.Node,
    hidden: fx.Node,
    cell: fx.Node,
) -> Any:
    # ONNX has a dimension for directions everywhere; here there is one direction.
    given = [w.node("Unsqueeze", value, w.ints(0)) for value in (to_input, to_state, biases, hidden, cell)]
    weights, starts = given[:3], given[3:]
    size = int(shape_of(to_state)[1])
    states, _, last = w.node("LSTM", x, *weights, None, *starts, outputs=3, hidden_size=size)
    return [w.node("Squeeze", states, w.ints(1)), w.node("Squeeze", last, w.ints(0))]
