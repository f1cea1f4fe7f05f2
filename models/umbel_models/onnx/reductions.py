"""Sums, means, extremes, softmaxes and layer norms along dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import fx

from umbel.errors import OperatorNotSupported
from umbel_models.onnx.graph import Writer, dtype_of, numpy_dtype, rank_of, translates

aten = torch.ops.aten
_MASKING: Final = (aten.add.Tensor, aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor)
"""What puts minus infinity into scores."""
_HIDDEN: Final = 60.0


def _reduce(kind: str, w: Writer, n: fx.Node, x: fx.Node, dims: Sequence[int] | None, keep: bool) -> Any:
    value = w.cast(x, dtype_of(n))
    if not dims:
        return w.node(kind, value, keepdims=int(keep))
    return w.node(kind, value, w.ints(*(dim % rank_of(x) for dim in dims)), keepdims=int(keep))


@translates(aten.sum.default, aten.sum.dim_IntList)
def _sum(
    w: Writer, n: fx.Node, x: fx.Node, dims: Sequence[int] | None = None, keep: bool = False, dtype: Any = None
) -> Any:
    return _reduce("ReduceSum", w, n, x, dims, keep)


@translates(aten.mean.default, aten.mean.dim)
def _mean(
    w: Writer, n: fx.Node, x: fx.Node, dims: Sequence[int] | None = None, keep: bool = False, dtype: Any = None
) -> Any:
    return _reduce("ReduceMean", w, n, x, dims, keep)


@translates(aten.amax.default)
def _amax(w: Writer, n: fx.Node, x: fx.Node, dims: Sequence[int] = (), keep: bool = False) -> Any:
    return _reduce("ReduceMax", w, n, x, dims, keep)


@translates(aten.amin.default)
def _amin(w: Writer, n: fx.Node, x: fx.Node, dims: Sequence[int] = (), keep: bool = False) -> Any:
    return _reduce("ReduceMin", w, n, x, dims, keep)


@translates(aten.max.dim)
def _max(w: Writer, n: fx.Node, x: fx.Node, dim: int, keep: bool = False) -> Any:
    axis = dim % rank_of(x)
    largest = w.node("ReduceMax", x, w.ints(axis), keepdims=int(keep))
    return [largest, w.node("ArgMax", x, axis=axis, keepdims=int(keep))]


@translates(aten.argmax.default)
def _argmax(w: Writer, n: fx.Node, x: fx.Node, dim: int | None = None, keep: bool = False) -> Any:
    if dim is None:
        raise OperatorNotSupported("argmax over everything; name a dimension")
    return w.node("ArgMax", x, axis=dim % rank_of(x), keepdims=int(keep))


@translates(aten.topk.default)
def _largest(w: Writer, n: fx.Node, x: fx.Node, k: int, dim: int = -1, largest: bool = True, *_: Any) -> Any:
    """Values and places; of equal values the first comes first."""
    return w.node("TopK", x, w.ints(k), outputs=2, axis=dim % rank_of(x), largest=int(largest), sorted=1)


@translates(aten._softmax.default)
def _softmax(w: Writer, n: fx.Node, x: fx.Node, dim: int, half_to_float: bool = False) -> Any:
    axis = dim % rank_of(x)
    value = w.name(x)
    if x.target in _MASKING:
        # The share of what a mask hides would be a denormal number, on which processors are slow: six times, as
        # measured. e^-60 is as good as nothing beside a share of 1.
        largest = w.node("ReduceMax", value, w.ints(axis), keepdims=1)
        hidden = np.full([1] * rank_of(x), _HIDDEN, numpy_dtype(dtype_of(x)))
        value = w.node("Max", value, w.node("Sub", largest, w.constant(hidden)))
    return w.node("Softmax", value, axis=axis)


@translates(aten._log_softmax.default)
def _log_softmax(w: Writer, n: fx.Node, x: fx.Node, dim: int, half_to_float: bool = False) -> Any:
    return w.node("LogSoftmax", x, axis=dim % rank_of(x))


@translates(aten.cumsum.default)
def _cumulative_sum(w: Writer, n: fx.Node, x: fx.Node, dim: int, dtype: Any = None) -> Any:
    return w.node("CumSum", w.cast(x, dtype_of(n)), w.ints(dim % rank_of(x)))


@translates(aten.native_layer_norm.default)
def _layer_norm(w: Writer, n: fx.Node, x: fx.Node, shape: Sequence[int], weight: Any, bias: Any, epsilon: float) -> Any:
    """Output, mean and 1 / deviation, as in torch."""
    dtype = numpy_dtype(dtype_of(x))
    # The ones become a constant when a runtime opens the graph; in the file they would take a row's bytes.
    factor = w.node("Expand", w.constant(1, dtype), w.ints(*shape)) if weight is None else weight
    # ONNX Runtime crashes on a bias that is named as absent; it has to be left out, or to be there.
    offset = [] if bias is None else [bias]
    return w.node("LayerNormalization", x, factor, *offset, outputs=3, axis=-len(shape), epsilon=float(epsilon))
