"""Sums, means, extremes and softmaxes along dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from umbel.errors import OperatorNotSupported
from umbel_models.litert.graph import Writer, dtype_of, shape_of, translates

aten = torch.ops.aten


def _reduce(kind: str, w: Writer, n: fx.Node, x: fx.Node, dims: Sequence[int] | None, keep: bool) -> Any:
    rank = len(shape_of(x))
    number = w.cast(x, dtype_of(n))
    if not rank:
        return number
    axes = sorted(dim % rank for dim in dims) if dims else list(range(rank))
    kept = [dim for dim in range(rank) if dim not in axes]
    if w.has_twin(number) and not (1 in kept and max(kept) > 1 and not keep):
        turned = w.ints(*(0 if dim == 0 else rank - 1 if dim == 1 else dim - 1 for dim in axes))
        shape = shape_of(n)
        if not keep:
            return w.op(kind, [w.channels_last(number), turned], shape, dtype_of(n), keepDims=False)
        last = [shape[0], *shape[2:], shape[1]]
        return w.from_channels_last(w.op(kind, [w.channels_last(number), turned], last, dtype_of(n), keepDims=True))
    return w.op(kind, [number, w.ints(*axes)], shape_of(n), dtype_of(n), keepDims=bool(keep))


@translates(aten.sum.default, aten.sum.dim_IntList)
def _sum(
    w: Writer, n: fx.Node, x: fx.Node, dims: Sequence[int] | None = None, keep: bool = False, dtype: Any = None
) -> Any:
    return _reduce("SUM", w, n, x, dims, keep)


@translates(aten.mean.default, aten.mean.dim)
def _mean(
    w: Writer, n: fx.Node, x: fx.Node, dims: Sequence[int] | None = None, keep: bool = False, dtype: Any = None
) -> Any:
    return _reduce("MEAN", w, n, x, dims, keep)


@translates(aten.amax.default)
def _amax(w: Writer, n: fx.Node, x: fx.Node, dims: Sequence[int] = (), keep: bool = False) -> Any:
    return _reduce("REDUCE_MAX", w, n, x, dims, keep)


@translates(aten.amin.default)
def _amin(w: Writer, n: fx.Node, x: fx.Node, dims: Sequence[int] = (), keep: bool = False) -> Any:
    return _reduce("REDUCE_MIN", w, n, x, dims, keep)


@translates(aten.argmax.default)
def _argmax(w: Writer, n: fx.Node, x: fx.Node, dim: int | None = None, keep: bool = False) -> Any:
    if dim is None:
        raise OperatorNotSupported("argmax over everything; name a dimension")
    axis = w.constant(dim % len(shape_of(x)), np.int32)
    shape = list(shape_of(x))
    del shape[dim % len(shape)]
    found = w.op("ARG_MAX", [x, axis], shape, np.int64, outputType="INT64")
    return w.reshape(found, shape_of(n)) if keep else found


@translates(aten.topk.default)
def _largest(w: Writer, n: fx.Node, x: fx.Node, k: int, dim: int = -1, largest: bool = True, *_: Any) -> Any:
    """Values and places; of equal values the first comes first. LiteRT looks along the last dimension."""
    shape, dtype = shape_of(x), dtype_of(x)
    order = list(range(len(shape)))
    order[dim % len(shape)], order[-1] = order[-1], order[dim % len(shape)]
    turned = w.transpose(x, order)
    found = [*w.shape(turned)[:-1], k]
    signed = turned if largest else w.op("NEG", [turned], w.shape(turned), dtype)
    values, places = w.several("TOPK_V2", [signed, w.constant(k, np.int32)], [(found, dtype), (found, np.int32)])
    values = values if largest else w.op("NEG", [values], found, dtype)
    return [w.transpose(values, order), w.transpose(w.cast_number(places, np.int64), order)]


def _along_last(kind: str, w: Writer, n: fx.Node, x: fx.Node, dim: int, **options: Any) -> Any:
    shape = shape_of(x)
    order = list(range(len(shape)))
    order[dim % len(shape)], order[-1] = order[-1], order[dim % len(shape)]
    turned = w.transpose(x, order)
    return w.transpose(w.op(kind, [turned], w.shape(turned), dtype_of(n), **options), order)


@translates(aten._softmax.default)
def _softmax(w: Writer, n: fx.Node, x: fx.Node, dim: int, half_to_float: bool = False) -> Any:
    return _along_last("SOFTMAX", w, n, x, dim, beta=1.0)


@translates(aten._log_softmax.default)
def _log_softmax(w: Writer, n: fx.Node, x: fx.Node, dim: int, half_to_float: bool = False) -> Any:
    return _along_last("LOG_SOFTMAX", w, n, x, dim)


@translates(aten.cumsum.default)
def _cumulative_sum(w: Writer, n: fx.Node, x: fx.Node, dim: int, dtype: Any = None) -> Any:
    axis = w.constant(dim % len(shape_of(x)), np.int32)
    return w.op("CUMSUM", [w.cast(x, dtype_of(n)), axis], shape_of(n), dtype_of(n))
