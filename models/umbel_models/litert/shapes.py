"""Shapes, parts and joins; sizes that hang on the batch; new tensors."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import fx

from umbel.errors import OperatorNotSupported
from umbel_models.litert.graph import Writer, dtype_of, shape_of, size_of, translates
from umbel_models.litert.pointwise import pointwise
from umbel_models.onnx.graph import is_open
from umbel_models.translation import unviewed

aten = torch.ops.aten
_FAR: Final = 2**31 - 1
_BROADCASTS: Final = (
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.where.self, aten.maximum.default,
    aten.minimum.default,
)  # fmt: skip
"""Operators that stretch a small operand by themselves."""


# Sizes are vectors of one int32 each.


@translates(aten.sym_size.int)
def _size(w: Writer, n: fx.Node, x: fx.Node, dim: int) -> Any:
    rank = len(shape_of(x))
    sizes = w.op("SHAPE", [x], [rank], np.int32, outType="INT32")
    at = dim % rank
    return w.op("STRIDED_SLICE", [sizes, w.ints(at), w.ints(at + 1), w.ints(1)], [1], np.int32)


@translates(aten.sym_numel.default)
def _count(w: Writer, n: fx.Node, x: fx.Node) -> Any:
    sizes = w.op("SHAPE", [x], [len(shape_of(x))], np.int32, outType="INT32")
    return w.op("REDUCE_PROD", [sizes, w.ints(0)], [1], np.int32, keepDims=True)


def _size_arithmetic(kind: str, function: Any) -> None:
    def handler(w: Writer, n: fx.Node, x: Any, y: Any) -> Any:
        return w.op(kind, [v if isinstance(v, fx.Node) else w.ints(v) for v in (x, y)], [1], np.int32)

    translates(function)(handler)


_size_arithmetic("ADD", operator.add)
_size_arithmetic("SUB", operator.sub)
_size_arithmetic("MUL", operator.mul)
_size_arithmetic("FLOOR_DIV", operator.floordiv)


@translates(torch.sym_float)
def _as_float(w: Writer, n: fx.Node, x: Any) -> int:
    return w.cast_number(w.number(x), np.float32) if isinstance(x, fx.Node) else w.constant([x], np.float32)


@translates(operator.truediv)
def _ratio(w: Writer, n: fx.Node, x: Any, y: Any) -> Any:
    return w.op("DIV", [_as_float(w, n, x), _as_float(w, n, y)], [1], np.float32)


@translates(operator.neg)
def _negative(w: Writer, n: fx.Node, x: fx.Node) -> Any:
    number = w.number(x)
    return w.op("NEG", [number], w.shape(number), w.tensors[number].dtype)


@translates(operator.getitem)
def _item(w: Writer, n: fx.Node, x: fx.Node, index: int) -> Any:
    return w.values[x][index]


# Shapes.


@translates(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def _view(w: Writer, n: fx.Node, x: fx.Node, sizes: Sequence[Any]) -> Any:
    return _respell(w, n, x, sizes)


@translates(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _respell(w: Writer, n: fx.Node, x: fx.Node, dims: Any) -> Any:
    source, same = unviewed(n)
    return w.number(source) if same else w.reshape(source, shape_of(n))


@translates(aten.permute.default)
def _permute(w: Writer, n: fx.Node, x: fx.Node, dims: Sequence[int]) -> Any:
    rank = len(shape_of(x))
    return w.transpose(x, [dim % rank for dim in dims])


@translates(aten.t.default)
def _transpose_matrix(w: Writer, n: fx.Node, x: fx.Node) -> Any:
    return w.transpose(x, [1, 0]) if len(shape_of(x)) == 2 else w.number(x)


@translates(aten.transpose.int)
def _transpose(w: Writer, n: fx.Node, x: fx.Node, first: int, second: int) -> Any:
    order = list(range(len(shape_of(x))))
    order[first], order[second] = order[second], order[first]
    return w.transpose(x, order)


@translates(aten.expand.default)
def _expand(w: Writer, n: fx.Node, x: fx.Node, sizes: Sequence[Any], implicit: bool = False) -> Any:
    number, shape, before = w.number(x), shape_of(n), shape_of(x)
    if [str(size) for size in before] == [str(size) for size in shape]:
        return number
    if _stretched_anyway(n):
        # Its users stretch it; only the number of dimensions must be right.
        missing = len(shape) - len(before)
        return w.reshape(number, [1] * missing + list(before)) if missing and before else number
    if not any(is_open(size) for size in shape):
        return w.op("BROADCAST_TO", [number, w.ints(*shape)], shape, dtype_of(n))
    aligned = [1] * (len(shape) - len(before)) + list(before)
    if all(is_open(old) for old, new in zip(aligned, shape, strict=True) if is_open(new)):
        zeros = np.zeros([1 if is_open(size) else size for size in shape], dtype_of(n))
        if zeros.dtype != np.bool_:
            return pointwise(w, "ADD", [w.reshape(number, aligned), w.constant(zeros)], shape, dtype_of(n))
    return w.op("BROADCAST_TO", [number, _vector(w, n, sizes, aligned)], shape, dtype_of(n))


def _stretched_anyway(n: fx.Node) -> bool:
    return bool(n.users) and all(user.target in _BROADCASTS and _fills(user, n) for user in n.users)


def _fills(user: fx.Node, n: fx.Node) -> bool:
    """Whether another operand of the user has its full shape already, by itself."""
    whole = [str(size) for size in shape_of(user)]
    others = [a for a in user.args if isinstance(a, fx.Node) and a is not n and a.target not in _STRETCHING]
    return any([str(size) for size in shape_of(other)] == whole for other in others)


_STRETCHING: Final = (aten.expand.default, aten.full.default, aten.full_like.default)


def _vector(w: Writer, n: fx.Node, sizes: Sequence[Any], shape: Sequence[Any]) -> int:
    """A shape as a vector that is computed when the graph runs."""
    parts = []
    for size, before in zip(sizes, shape, strict=True):
        if isinstance(size, fx.Node):
            parts.append(w.number(size))
        elif is_open(before):
            raise OperatorNotSupported(
                "stretching a tensor whose sizes hang on the batch; let an operator broadcast it"
            )
        else:
            parts.append(w.ints(before if size == -1 else size))
    return w.op("CONCATENATION", parts, [len(parts)], np.int32, axis=0)


@translates(aten.repeat.default)
def _repeat(w: Writer, n: fx.Node, x: fx.Node, times: Sequence[Any]) -> Any:
    if any(is_open(count) for count in times):
        raise OperatorNotSupported("repeating a tensor as often as there are examples; let it broadcast")
    aligned = [1] * (len(times) - len(shape_of(x))) + list(shape_of(x))
    return w.op("TILE", [w.reshape(x, aligned), w.ints(*times)], shape_of(n), dtype_of(n))


# Parts and joins.


def cut(w: Writer, number: int, dim: int, bounds: tuple[int, int, int], size: Any) -> int:
    """From start up to end by step along a dimension, which has this size then."""
    shape = list(w.shape(number))
    rank, (start, end, step) = len(shape), bounds
    if step > 1 and start >= 0 and not is_open(shape[dim]):
        return _every(w, number, dim, start, step, size)
    begins, ends, steps = [0] * rank, [0] * rank, [1] * rank
    begins[dim], ends[dim], steps[dim] = start, min(end, _FAR), step
    shape[dim] = size
    others = sum(1 << i for i in range(rank) if i != dim)
    open_end = 1 << dim if end >= _FAR else 0
    operands = [number, w.ints(*begins), w.ints(*ends), w.ints(*steps)]
    dtype = w.tensors[number].dtype
    return w.op("STRIDED_SLICE", operands, shape, dtype, beginMask=others, endMask=others | open_end)


def _every(w: Writer, number: int, dim: int, start: int, step: int, size: int) -> int:
    """Every step-th from start, by a dimension of its own for each step; LiteRT would pick one after the other."""
    shape = list(w.shape(number))
    whole, length = (start // step + size) * step, shape[dim]
    if whole > length:
        number = padded(w, number, [(0, whole - length if at == dim else 0) for at in range(len(shape))])
    elif whole < length:
        number = cut(w, number, dim, (0, whole, 1), whole)
    before, after, dtype = shape[:dim], shape[dim + 1 :], w.tensors[number].dtype
    steps = w.reshape(number, [*before, whole // step, step, *after])
    begins, sizes = [0] * (len(shape) + 1), [-1] * (len(shape) + 1)
    begins[dim : dim + 2], sizes[dim : dim + 2] = [start // step, start % step], [size, 1]
    picked = w.op("SLICE", [steps, w.ints(*begins), w.ints(*sizes)], [*before, size, 1, *after], dtype)
    return w.reshape(picked, [*before, size, *after])


@translates(aten.slice.Tensor)
def _slice(w: Writer, n: fx.Node, x: fx.Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    shape = shape_of(x)
    dim, start, end = dim % len(shape), start or 0, _FAR if end is None else end
    length = shape[dim]
    if is_open(start) or is_open(end):
        raise OperatorNotSupported("a slice whose bounds hang on the batch; slice other dimensions")
    if start == 0 and step == 1 and (end >= _FAR or (not is_open(length) and end >= length)):
        return w.number(x)
    bounds, number, size = (start, end, step), w.number(x), shape_of(n)[dim]
    if w.has_twin(number):
        turned = 0 if dim == 0 else len(shape) - 1 if dim == 1 else dim - 1
        return w.from_channels_last(cut(w, w.channels_last(number), turned, bounds, size))
    return cut(w, number, dim, bounds, size)


@translates(aten.select.int)
def _select(w: Writer, n: fx.Node, x: fx.Node, dim: int, index: int) -> Any:
    shape = shape_of(x)
    dim = dim % len(shape)
    if is_open(shape[dim]):
        raise OperatorNotSupported("picking one example out of the batch; give it as an input of its own")
    at = index % shape[dim]
    return w.reshape(cut(w, w.number(x), dim, (at, at + 1, 1), 1), shape_of(n))


@translates(aten.cat.default)
def _concat(w: Writer, n: fx.Node, parts: Sequence[fx.Node], dim: int = 0) -> Any:
    if len(parts) == 1:
        return w.number(parts[0])
    shape = shape_of(n)
    dim, numbers = dim % len(shape), [w.cast(part, dtype_of(n)) for part in parts]
    if 3 <= len(shape) <= 4 and all(w.has_twin(number) for number in numbers):
        turned = 0 if dim == 0 else len(shape) - 1 if dim == 1 else dim - 1
        twins = [w.channels_last(number) for number in numbers]
        last = [shape[0], *shape[2:], shape[1]]
        return w.from_channels_last(w.op("CONCATENATION", twins, last, dtype_of(n), axis=turned))
    return w.op("CONCATENATION", numbers, shape, dtype_of(n), axis=dim)


@translates(aten.split_with_sizes.default)
def _split(w: Writer, n: fx.Node, x: fx.Node, sizes: Sequence[int], dim: int = 0) -> Any:
    dim = dim % len(shape_of(x))
    if any(is_open(size) for size in sizes):
        if len(set(sizes)) > 1:
            raise OperatorNotSupported("the batch cut into parts of unequal sizes; cut another dimension")
        parts = [(tuple(part.shape), dtype_of(x)) for part in n.meta["val"]]
        return w.several("SPLIT", [w.constant(dim, np.int32), x], parts, numSplits=len(sizes))
    starts = np.cumsum([0, *sizes])
    return [
        cut(w, w.number(x), dim, (int(start), int(start) + size, 1), size)
        for start, size in zip(starts[:-1], sizes, strict=True)
    ]


@translates(aten.flip.default)
def _flip(w: Writer, n: fx.Node, x: fx.Node, dims: Sequence[int]) -> Any:
    number = w.number(x)
    for dim in dims:
        number = w.op("REVERSE_V2", [number, w.ints(dim % len(shape_of(x)))], shape_of(n), dtype_of(n))
    return number


@translates(aten.constant_pad_nd.default)
def _pad(w: Writer, n: fx.Node, x: fx.Node, padding: Sequence[int], value: float = 0) -> Any:
    number, rank = w.number(x), len(shape_of(x))
    pairs = [(0, 0)] * rank
    for i in range(len(padding) // 2):
        pairs[rank - 1 - i] = (padding[2 * i], padding[2 * i + 1])
    for dim, (before, after) in enumerate(pairs):
        if min(before, after) < 0:
            # What is padded by less than nothing is cut.
            size = w.shape(number)[dim] + min(before, 0) + min(after, 0)
            number = cut(w, number, dim, (max(-before, 0), max(-before, 0) + size, 1), size)
    grown = [(max(before, 0), max(after, 0)) for before, after in pairs]
    if w.has_twin(number):
        last = [grown[0], *grown[2:], grown[1]]
        return w.from_channels_last(padded(w, w.channels_last(number), last, value))
    return padded(w, number, grown, value)


def padded(w: Writer, number: int, pairs: Sequence[tuple[int, int]], value: float = 0.0) -> int:
    """A value before and after along each dimension."""
    if not any(map(sum, pairs)):
        return number
    dtype, amounts = w.tensors[number].dtype, w.constant(pairs, np.int32)
    # Added only where there is something to add: a sum with an open size would be another symbol.
    shape = [size + sum(pair) if any(pair) else size for size, pair in zip(w.shape(number), pairs, strict=True)]
    if value == 0 and dtype != np.bool_:
        return w.op("PAD", [number, amounts], shape, dtype)
    return w.op("PADV2", [number, amounts, w.constant(value, dtype)], shape, dtype)


# The same tensor, and new ones.


@translates(aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default)
@translates(aten.lift_fresh_copy.default)
def _same(w: Writer, n: fx.Node, x: fx.Node, memory_format: Any = None) -> Any:
    return w.number(x)


@translates(aten.copy.default)
def _copy(w: Writer, n: fx.Node, target: fx.Node, source: Any, non_blocking: bool = False) -> Any:
    if isinstance(source, fx.Node) and list(map(str, shape_of(source))) == list(map(str, shape_of(target))):
        return w.cast(source, dtype_of(target))
    return _filled(w, n, shape_of(target), source)


def _filled(w: Writer, n: fx.Node, sizes: Sequence[Any], value: Any) -> Any:
    number = w.cast(value, dtype_of(n))
    if not any(is_open(size_of(size)) for size in sizes):
        if not isinstance(value, fx.Node):
            return w.constant(np.full(tuple(sizes), value, dtype_of(n)))
        return w.op("BROADCAST_TO", [number, w.ints(*sizes)], shape_of(n), dtype_of(n))
    if _stretched_anyway(n):
        return number
    return w.op("FILL", [_vector(w, n, sizes, [1] * len(sizes)), number], shape_of(n), dtype_of(n))


@translates(aten.full.default)
def _full(w: Writer, n: fx.Node, sizes: Sequence[Any], value: Any, **_: Any) -> Any:
    return _filled(w, n, sizes, value)


@translates(aten.scalar_tensor.default)
def _scalar(w: Writer, n: fx.Node, value: Any, **_: Any) -> Any:
    return _filled(w, n, [], value)


@translates(aten.zeros.default, aten.empty.memory_format, aten.empty_permuted.default)
def _zeros(w: Writer, n: fx.Node, sizes: Sequence[Any], *_: Any, **__: Any) -> Any:
    # Whatever asks for an empty tensor writes all of it before it reads.
    return _filled(w, n, sizes, 0)


@translates(aten.ones.default)
def _ones(w: Writer, n: fx.Node, sizes: Sequence[Any], **_: Any) -> Any:
    return _filled(w, n, sizes, 1)


@translates(aten.full_like.default)
def _full_like(w: Writer, n: fx.Node, x: fx.Node, value: Any, **_: Any) -> Any:
    sizes = shape_of(x)
    if not any(is_open(size) for size in sizes) or _stretched_anyway(n):
        return _filled(w, n, sizes, value)
    shape = w.op("SHAPE", [x], [len(sizes)], np.int32, outType="INT32")
    return w.op("FILL", [shape, w.cast(value, dtype_of(n))], sizes, dtype_of(n))


@translates(aten.zeros_like.default)
def _zeros_like(w: Writer, n: fx.Node, x: fx.Node, **_: Any) -> Any:
    return _full_like(w, n, x, 0)


@translates(aten.ones_like.default)
def _ones_like(w: Writer, n: fx.Node, x: fx.Node, **_: Any) -> Any:
    return _full_like(w, n, x, 1)


@translates(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(w: Writer, n: fx.Node, *bounds: Any, **_: Any) -> Any:
    start, end, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    if is_open(end) and (start, step) == (0, 1):
        limits = [w.constant(0, np.int32), w.reshape(end, []), w.constant(1, np.int32)]
        return w.cast_number(w.op("RANGE", limits, shape_of(n), np.int32), dtype_of(n))
    if any(is_open(value) for value in (start, end, step)):
        raise OperatorNotSupported("counting from or by the number of examples; count from 0 by 1")
    return w.constant(np.arange(start, end, step), dtype_of(n))
