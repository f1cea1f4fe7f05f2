"""Looking things up, and putting them somewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from umbel.errors import OperatorNotSupported
from umbel_models.onnx.graph import Writer, dtype_of, numpy_dtype, rank_of, translates

aten = torch.ops.aten


def _there(w: Writer, places: fx.Node) -> Any:
    """Places that count from the front: ONNX would count negative ones from the back, where torch and LiteRT refuse.

    Without its sign a negative number is larger than any size, and ONNX Runtime refuses it too.
    """
    if places.op == "get_attr":
        return places
    dtype = numpy_dtype(dtype_of(places))
    return w.node("BitwiseAnd", places, w.constant(np.iinfo(dtype).max, dtype))


@translates(aten.gather.default)
def _gather(w: Writer, n: fx.Node, x: fx.Node, dim: int, places: fx.Node, sparse_grad: bool = False) -> Any:
    return w.node("GatherElements", x, _there(w, places), axis=dim % rank_of(x))


@translates(aten.scatter_add.default)
def _scatter_add(w: Writer, n: fx.Node, x: fx.Node, dim: int, places: fx.Node, source: fx.Node) -> Any:
    return w.node("ScatterElements", x, _there(w, places), source, axis=dim % rank_of(x), reduction="add")


@translates(aten.scatter.src)
def _scatter(w: Writer, n: fx.Node, x: fx.Node, dim: int, places: fx.Node, source: fx.Node) -> Any:
    return w.node("ScatterElements", x, _there(w, places), source, axis=dim % rank_of(x))


@translates(aten.scatter.value)
def _scatter_value(w: Writer, n: fx.Node, x: fx.Node, dim: int, places: fx.Node, value: float) -> Any:
    source = w.node("Expand", w.cast(value, dtype_of(n)), w.node("Shape", places))
    return w.node("ScatterElements", x, _there(w, places), source, axis=dim % rank_of(x))


@translates(aten.embedding.default)
def _embedding(w: Writer, n: fx.Node, weight: fx.Node, places: fx.Node, *_: Any) -> Any:
    return w.node("Gather", weight, _there(w, places), axis=0)


@translates(aten.index_select.default)
def _index_select(w: Writer, n: fx.Node, x: fx.Node, dim: int, places: fx.Node) -> Any:
    return w.node("Gather", x, _there(w, places), axis=dim % rank_of(x))


@translates(aten.index.Tensor)
def _index(w: Writer, n: fx.Node, x: fx.Node, places: Sequence[fx.Node | None]) -> Any:
    given = [(dim, index) for dim, index in enumerate(places) if index is not None]
    if len(given) != 1:
        raise OperatorNotSupported("indexing with several tensors at once; index one dimension after the other")
    dim, index = given[0]
    if dtype_of(index) == torch.bool:
        raise OperatorNotSupported("selecting by a mask; use torch.where over the whole tensor")
    return w.node("Gather", x, index, axis=dim)


@translates(aten.index_put.default, aten._unsafe_index_put.default)
def _index_put(
    w: Writer, n: fx.Node, x: fx.Node, places: Sequence[fx.Node], values: fx.Node, accumulate: bool = False
) -> Any:
    if len(places) != 1 or rank_of(places[0]) != 1:
        raise OperatorNotSupported("writing at places given by several tensors; use one vector of rows")
    rows = w.node("Unsqueeze", w.cast(places[0], torch.int64), w.ints(1))  # the only dtype that ONNX takes here
    return w.node("ScatterND", x, rows, values, reduction="add" if accumulate else "none")


@translates(aten.tril.default)
def _lower_triangle(w: Writer, n: fx.Node, x: fx.Node, diagonal: int = 0) -> Any:
    return w.node("Trilu", x, w.constant(diagonal, np.int64), upper=0)


@translates(aten.triu.default)
def _upper_triangle(w: Writer, n: fx.Node, x: fx.Node, diagonal: int = 0) -> Any:
    return w.node("Trilu", x, w.constant(diagonal, np.int64), upper=1)
