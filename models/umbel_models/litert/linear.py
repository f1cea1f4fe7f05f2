"""Matrix products, pooling, and looking things up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from umbel.errors import OperatorNotSupported
from umbel_models.convolution import per_dimension
from umbel_models.litert.graph import Writer, dtype_of, shape_of, translates
from umbel_models.onnx.graph import is_open

aten = torch.ops.aten


def _turned(node: fx.Node) -> fx.Node | None:
    """What a node is the transpose of: a matrix, or many of them."""
    arguments: tuple[Any, ...] = node.args
    rank = len(shape_of(node))
    last = [*range(rank - 2), rank - 1, rank - 2]
    swapped = node.target is aten.t.default and rank == 2
    swapped = swapped or (node.target is aten.permute.default and [dim % rank for dim in arguments[1]] == last)
    swapped = swapped or (node.target is aten.transpose.int and {dim % rank for dim in arguments[1:]} == {*last[-2:]})
    return arguments[0] if swapped else None


def _dense(w: Writer, n: fx.Node, x: fx.Node, y: fx.Node, bias: Any = None) -> Any:
    """x [N, K] times y [K, M]: a dense layer if y is a constant, else a product.

    LiteRT's quick kernels (XNNPACK) take a dense layer only with constant weights; any other is worked out by a kernel
    that takes two to four times as long. A product of any two tensors is quick.
    """
    rows = _turned(y)
    if w.has_constant_weights:
        # LiteRT wants the rows of y's transpose.
        number = w.transpose(y, [1, 0]) if rows is None else w.number(rows)
        options = {"keepNumDims": False, "asymmetricQuantizeInputs": False}
        return w.op("FULLY_CONNECTED", [x, number, bias], shape_of(n), dtype_of(n), **options)
    operands, is_turned = [x, y if rows is None else rows], rows is not None
    product = w.op("BATCH_MATMUL", operands, shape_of(n), dtype_of(n), adjX=False, adjY=is_turned)
    return product if bias is None else w.op("ADD", [product, bias], shape_of(n), dtype_of(n))


@translates(aten.mm.default)
def _product(w: Writer, n: fx.Node, x: fx.Node, y: fx.Node) -> Any:
    return _dense(w, n, x, y)


@translates(aten.addmm.default)
def _affine(w: Writer, n: fx.Node, bias: fx.Node, x: fx.Node, y: fx.Node, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1:
        raise OperatorNotSupported("a scaled matrix product with bias; scale and add apart")
    if len(shape_of(bias)) == 1 and not is_open(shape_of(bias)[0]):
        return _dense(w, n, x, y, bias)
    return w.op("ADD", [_dense(w, n, x, y), bias], shape_of(n), dtype_of(n))


@translates(aten.bmm.default, aten.matmul.default)
def _batched_product(w: Writer, n: fx.Node, x: fx.Node, y: fx.Node) -> Any:
    columns = _turned(y)
    operands = [x, y if columns is None else columns]
    return w.op("BATCH_MATMUL", operands, shape_of(n), dtype_of(n), adjX=False, adjY=columns is not None)


@translates(aten.baddbmm.default)
def _batched_affine(
    w: Writer, n: fx.Node, bias: fx.Node, x: fx.Node, y: fx.Node, beta: float = 1, alpha: float = 1
) -> Any:
    product, dtype = w.op("BATCH_MATMUL", [x, y], shape_of(n), dtype_of(n), adjX=False, adjY=False), dtype_of(n)
    if alpha != 1:
        product = w.op("MUL", [product, w.cast(alpha, dtype)], shape_of(n), dtype)
    if beta == 0:
        return product
    scaled = bias if beta == 1 else w.op("MUL", [bias, w.cast(beta, dtype)], shape_of(bias), dtype)
    return w.op("ADD", [product, scaled], shape_of(n), dtype)


def _pool(
    kind: str, w: Writer, n: fx.Node, x: fx.Node, window: Sequence[int], steps: Sequence[int], pads: Sequence[int]
) -> Any:
    image = w.channels_last(x)
    out = n.meta["val"][0].shape if isinstance(n.meta["val"], (tuple, list)) else shape_of(n)
    if any(pads):
        shape = w.shape(image)
        filled = float(np.finfo(np.float32).min) if kind == "MAX_POOL_2D" else 0.0
        amounts = w.constant([(0, 0), *((pad, pad) for pad in pads), (0, 0)], np.int32)
        grown = [shape[0], shape[1] + 2 * pads[0], shape[2] + 2 * pads[1], shape[3]]
        image = w.op("PADV2", [image, amounts, w.constant(filled, np.float32)], grown, np.float32)
    options = {"filterHeight": window[0], "filterWidth": window[1], "strideH": steps[0], "strideW": steps[1]}
    last = [out[0], *out[2:], out[1]]
    return w.from_channels_last(w.op(kind, [image], last, np.float32, padding="VALID", **options))


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
    if ceil_mode or set(dilation) != {1}:
        raise OperatorNotSupported("max-pooling with ceil_mode or dilation; pad with F.pad before it")
    window = per_dimension(kernel, 2)
    largest = _pool("MAX_POOL_2D", w, n, x, window, per_dimension(stride or kernel, 2), per_dimension(padding, 2))
    return [largest, -1]


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
    pads = per_dimension(padding, 2)
    if ceil_mode or divisor is not None or (any(pads) and not count_include_pad):
        raise OperatorNotSupported(
            "average pooling with ceil_mode, a divisor or uncounted padding; use F.pad before it"
        )
    return _pool("AVERAGE_POOL_2D", w, n, x, per_dimension(kernel, 2), per_dimension(stride or kernel, 2), pads)


# Looking up. LiteRT's gather refuses places that aren't there.


@translates(aten.embedding.default)
def _embedding(w: Writer, n: fx.Node, weight: fx.Node, places: fx.Node, *_: Any) -> Any:
    return w.op("GATHER", [weight, places], shape_of(n), dtype_of(n), axis=0)


@translates(aten.index_select.default)
def _index_select(w: Writer, n: fx.Node, x: fx.Node, dim: int, places: fx.Node) -> Any:
    return w.op("GATHER", [x, places], shape_of(n), dtype_of(n), axis=dim % len(shape_of(x)))


@translates(aten.index.Tensor)
def _index(w: Writer, n: fx.Node, x: fx.Node, places: Sequence[fx.Node | None]) -> Any:
    # Along one dimension it is an index_select by now.
    raise OperatorNotSupported("indexing with several tensors at once; index one dimension after the other")


def _triangle(w: Writer, n: fx.Node, x: fx.Node, diagonal: int, cut: Any) -> Any:
    if any(is_open(size) for size in shape_of(x)[-2:]):
        raise OperatorNotSupported("a triangle over the batch; take it of other dimensions")
    mask = cut(np.ones(shape_of(x)[-2:], dtype_of(n)), diagonal)
    return w.op("LOGICAL_AND" if mask.dtype == np.bool_ else "MUL", [x, w.constant(mask)], shape_of(n), dtype_of(n))


@translates(aten.tril.default)
def _lower_triangle(w: Writer, n: fx.Node, x: fx.Node, diagonal: int = 0) -> Any:
    return _triangle(w, n, x, diagonal, np.tril)


@translates(aten.triu.default)
def _upper_triangle(w: Writer, n: fx.Node, x: fx.Node, diagonal: int = 0) -> Any:
    return _triangle(w, n, x, diagonal, np.triu)
