"""Sizes, and tensors in other shapes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from umbel.errors import OperatorNotSupported
from umbel_models.onnx.graph import Writer, dtype_of, is_open, numpy_dtype, onnx_dtype, rank_of, shape_of, translates
from umbel_models.translation import dropped, unviewed

aten = torch.ops.aten
_FAR = 2**62
"""Torch writes "to the end" as a number of this kind or larger."""


# Sizes are vectors of one int64 each.


@translates(aten.sym_size.int)
def _size(w: Writer, n: fx.Node, x: fx.Node, dim: int) -> Any:
    return w.node("Gather", w.node("Shape", x), w.ints(dim % rank_of(x)), axis=0)


@translates(aten.sym_numel.default)
def _count(w: Writer, n: fx.Node, x: fx.Node) -> Any:
    return w.node("Reshape", w.node("Size", x), w.ints(1))


def _size_arithmetic(kind: str, function: Any) -> None:
    def handler(w: Writer, n: fx.Node, x: Any, y: Any) -> Any:
        return w.node(kind, *(v if isinstance(v, fx.Node) else w.ints(v) for v in (x, y)))

    translates(function)(handler)


_size_arithmetic("Add", operator.add)
_size_arithmetic("Sub", operator.sub)
_size_arithmetic("Mul", operator.mul)
_size_arithmetic("Div", operator.floordiv)


@translates(torch.sym_float)
def _as_float(w: Writer, n: fx.Node, x: Any) -> Any:
    return w.node("Cast", x, to=onnx_dtype(torch.float32)) if isinstance(x, fx.Node) else w.constant([x], np.float32)


@translates(operator.truediv)
def _ratio(w: Writer, n: fx.Node, x: Any, y: Any) -> Any:
    return w.node("Div", _as_float(w, n, x), _as_float(w, n, y))


@translates(operator.neg)
def _negative(w: Writer, n: fx.Node, x: fx.Node) -> Any:
    return w.node("Neg", x)


@translates(operator.getitem)
def _item(w: Writer, n: fx.Node, x: fx.Node, index: int) -> Any:
    return w.values[x][index]


# Shapes.


@translates(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def _view(w: Writer, n: fx.Node, x: fx.Node, sizes: Sequence[Any]) -> Any:
    source, same = unviewed(n)
    if same:
        return w.name(source)
    if (axes := dropped(n, source)) is not None:
        return w.node("ReduceSum", *source.args[:1], w.ints(*axes), keepdims=0)
    return w.reshape(source, sizes)


@translates(aten.permute.default)
def _permute(w: Writer, n: fx.Node, x: fx.Node, dims: Sequence[int]) -> Any:
    order = [dim % rank_of(x) for dim in dims]
    return w.name(x) if order == sorted(order) else w.node("Transpose", x, perm=order)


@translates(aten.t.default)
def _transpose_matrix(w: Writer, n: fx.Node, x: fx.Node) -> Any:
    return w.node("Transpose", x, perm=[1, 0]) if rank_of(x) == 2 else w.name(x)


@translates(aten.transpose.int)
def _transpose(w: Writer, n: fx.Node, x: fx.Node, first: int, second: int) -> Any:
    order = list(range(rank_of(x)))
    order[first], order[second] = order[second], order[first]
    return w.node("Transpose", x, perm=order)


@translates(aten.unsqueeze.default)
def _unsqueeze(w: Writer, n: fx.Node, x: fx.Node, dim: int) -> Any:
    source, same = unviewed(n)
    return w.name(source) if same else w.node("Unsqueeze", x, w.ints(dim % (rank_of(x) + 1)))


@translates(aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(w: Writer, n: fx.Node, x: fx.Node, dims: int | Sequence[int]) -> Any:
    source, same = unviewed(n)
    if same:
        return w.name(source)
    wanted = [dims] if isinstance(dims, int) else dims
    ones = [dim % rank_of(x) for dim in wanted if not is_open(shape_of(x)[dim]) and shape_of(x)[dim] == 1]
    return w.node("Squeeze", x, w.ints(*ones)) if ones else w.name(x)


@translates(aten.expand.default)
def _expand(w: Writer, n: fx.Node, x: fx.Node, sizes: Sequence[Any], implicit: bool = False) -> Any:
    if [str(size) for size in shape_of(x)] == [str(size) for size in shape_of(n)]:
        return w.name(x)
    # ONNX broadcasts both ways, so a 1 leaves the size as it is.
    return w.node("Expand", x, w.vector([size if is_open(size) or size != -1 else 1 for size in sizes]))


@translates(aten.repeat.default)
def _repeat(w: Writer, n: fx.Node, x: fx.Node, times: Sequence[Any]) -> Any:
    missing = len(times) - rank_of(x)
    value = w.node("Unsqueeze", x, w.ints(*range(missing))) if missing else x
    return w.node("Tile", value, w.vector(times))


# Parts and joins.


@translates(aten.slice.Tensor)
def _slice(w: Writer, n: fx.Node, x: fx.Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    start, end, length = start or 0, _FAR if end is None else end, shape_of(x)[dim]
    to_the_end = not is_open(end) and (end >= _FAR or (not is_open(length) and end >= length))
    if not is_open(start) and start == 0 and step == 1 and to_the_end:
        return w.name(x)
    bounds = [value if isinstance(value, fx.Node) else w.ints(value) for value in (start, end)]
    return w.node("Slice", x, *bounds, w.ints(dim % rank_of(x)), w.ints(step))


@translates(aten.slice_scatter.default)
def _slice_scatter(
    w: Writer, n: fx.Node, x: fx.Node, source: fx.Node, dim: int = 0, start: Any = 0, end: Any = None, step: int = 1
) -> Any:
    start, length = start or 0, shape_of(x)[dim]
    if start == 0 and step == 1 and (end is None or (not is_open(end) and end >= _FAR)):
        return w.name(source)
    if is_open(length) or is_open(end) or is_open(start):
        raise OperatorNotSupported("writing into a part of the batch; join parts by torch.cat, or use torch.where")
    rows = np.arange(length)[slice(start, end if end is None else min(end, length), step)]
    shape = [1] * rank_of(x)
    shape[dim % rank_of(x)] = len(rows)
    places = w.node("Expand", w.constant(rows.reshape(shape), np.int64), w.node("Shape", source))
    return w.node("ScatterElements", x, places, source, axis=dim % rank_of(x))


@translates(aten.select.int)
def _select(w: Writer, n: fx.Node, x: fx.Node, dim: int, index: int) -> Any:
    return w.node("Gather", x, w.constant(index, np.int64), axis=dim % rank_of(x))


@translates(aten.cat.default)
def _concat(w: Writer, n: fx.Node, parts: Sequence[fx.Node], dim: int = 0) -> Any:
    return w.node("Concat", *parts, axis=dim % rank_of(parts[0])) if len(parts) > 1 else w.name(parts[0])


@translates(aten.split_with_sizes.default)
def _split(w: Writer, n: fx.Node, x: fx.Node, sizes: Sequence[int], dim: int = 0) -> Any:
    if any(is_open(size) for size in sizes):
        if len(set(sizes)) > 1:
            raise OperatorNotSupported("the batch cut into parts of unequal sizes; cut another dimension")
        made = w.node("Split", x, axis=dim % rank_of(x), outputs=len(sizes), num_outputs=len(sizes))
    else:
        made = w.node("Split", x, w.ints(*sizes), axis=dim % rank_of(x), outputs=len(sizes))
    return [made] if len(sizes) == 1 else made


@translates(aten.flip.default)
def _flip(w: Writer, n: fx.Node, x: fx.Node, dims: Sequence[int]) -> Any:
    count = len(dims)
    axes = [dim % rank_of(x) for dim in dims]
    return w.node("Slice", x, w.ints(*[-1] * count), w.ints(*[-_FAR] * count), w.ints(*axes), w.ints(*[-1] * count))


@translates(aten.constant_pad_nd.default)
def _pad(w: Writer, n: fx.Node, x: fx.Node, padding: Sequence[int], value: float = 0) -> Any:
    rank = rank_of(x)
    before, after = [0] * rank, [0] * rank
    # Torch counts pairs from the last dimension, ONNX wants all befores, then all afters.
    for i in range(len(padding) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = padding[2 * i], padding[2 * i + 1]
    return w.node("Pad", x, w.ints(*before, *after), w.constant(value, numpy_dtype(dtype_of(x))))


# The same tensor, and new ones.


@translates(aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default)
@translates(aten.lift_fresh_copy.default)
def _same(w: Writer, n: fx.Node, x: fx.Node, memory_format: Any = None) -> Any:
    return w.name(x)


@translates(aten._to_copy.default)
def _to(w: Writer, n: fx.Node, x: fx.Node, **_: Any) -> Any:
    return w.cast(x, dtype_of(n))


@translates(aten.copy.default)
def _copy(w: Writer, n: fx.Node, target: fx.Node, source: Any, non_blocking: bool = False) -> Any:
    value = w.cast(source, dtype_of(target))
    same = not isinstance(source, fx.Node) or list(shape_of(source)) != list(shape_of(target))
    return w.node("Expand", value, w.node("Shape", target)) if same else value


def _filled(w: Writer, n: fx.Node, sizes: Sequence[Any], value: Any) -> Any:
    if isinstance(value, fx.Node):
        return w.node("Expand", w.cast(value, dtype_of(n)), w.vector(sizes))
    dtype = numpy_dtype(dtype_of(n))
    if not any(is_open(size) for size in sizes) and int(np.prod(sizes)) <= 64:
        return w.constant(np.full(tuple(sizes), value, dtype))
    return w.node("Expand", w.constant(value, dtype), w.vector(sizes))


@translates(aten.full.default)
def _full(w: Writer, n: fx.Node, sizes: Sequence[Any], value: Any, **_: Any) -> Any:
    return _filled(w, n, sizes, value)


@translates(aten.scalar_tensor.default)
def _scalar(w: Writer, n: fx.Node, value: Any, **_: Any) -> Any:
    return _filled(w, n, [], value)


@translates(aten.full_like.default)
def _full_like(w: Writer, n: fx.Node, x: fx.Node, value: Any, **_: Any) -> Any:
    if any(is_open(size) for size in shape_of(x)):
        return w.node("Expand", w.cast(value, dtype_of(n)), w.node("Shape", x))
    return _filled(w, n, shape_of(x), value)


@translates(aten.zeros.default)
def _zeros(w: Writer, n: fx.Node, sizes: Sequence[Any], **_: Any) -> Any:
    return _filled(w, n, sizes, 0)


@translates(aten.empty.memory_format, aten.empty_permuted.default)
def _empty(w: Writer, n: fx.Node, sizes: Sequence[Any], *_: Any, **__: Any) -> Any:
    # Whatever asks for an empty tensor writes all of it before it reads.
    return _filled(w, n, sizes, 0)


@translates(aten.ones.default)
def _ones(w: Writer, n: fx.Node, sizes: Sequence[Any], **_: Any) -> Any:
    return _filled(w, n, sizes, 1)


@translates(aten.zeros_like.default)
def _zeros_like(w: Writer, n: fx.Node, x: fx.Node, **_: Any) -> Any:
    return _full_like(w, n, x, 0)


@translates(aten.ones_like.default)
def _ones_like(w: Writer, n: fx.Node, x: fx.Node, **_: Any) -> Any:
    return _full_like(w, n, x, 1)


@translates(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(w: Writer, n: fx.Node, *bounds: Any, **_: Any) -> Any:
    start, end, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    if not any(is_open(value) for value in (start, end, step)):
        return w.constant(np.arange(start, end, step), numpy_dtype(dtype_of(n)))
    return w.node("Range", *(w.cast(value, dtype_of(n)) for value in (start, end, step)))
