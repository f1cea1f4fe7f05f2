"""Operators that treat each number by itself, on twins with channels last where there are any."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import fx

from umbel_models.litert.graph import Writer, dtype_of, shape_of, translates
from umbel_models.onnx.graph import is_open, numpy_dtype
from umbel_models.translation import meeting_dtype

aten = torch.ops.aten


def pointwise(w: Writer, kind: str, operands: Sequence[int], shape: Any, dtype: Any, **options: Any) -> int:
    """One operator on each number; a twin is made when an operand has one and the others are small."""
    rank = len(shape)
    if 3 <= rank <= 4 and any(w.has_twin(o) for o in operands) and all(_turns(w, o, rank) for o in operands):
        turned = [_turn(w, operand, rank) for operand in operands]
        return w.from_channels_last(w.op(kind, turned, [shape[0], *shape[2:], shape[1]], dtype, **options))
    return w.op(kind, operands, shape, dtype, **options)


def _turns(w: Writer, operand: int, rank: int) -> bool:
    sizes = w.shape(operand)
    small = not any(is_open(size) for size in sizes) and sum(size != 1 for size in sizes) <= 1
    return w.has_twin(operand) or not sizes or (small and (len(sizes) == rank or math.prod(sizes) == 1))


def _turn(w: Writer, operand: int, rank: int) -> int:
    sizes = w.shape(operand)
    if not w.has_twin(operand) and len(sizes) == rank:
        return w.reshape(operand, [sizes[0], *sizes[2:], sizes[1]])
    return w.channels_last(operand) if w.has_twin(operand) else operand


_OF_YES_AND_NO: Final = {"ADD": "LOGICAL_OR", "MAXIMUM": "LOGICAL_OR", "MUL": "LOGICAL_AND", "MINIMUM": "LOGICAL_AND"}
"""What arithmetic is among booleans."""


def _binary(kind: str, w: Writer, n: fx.Node, x: Any, y: Any) -> int:
    dtype = numpy_dtype(meeting_dtype(n, x, y))
    if dtype_of(n) == np.bool_ and kind in _OF_YES_AND_NO:
        kind, dtype = _OF_YES_AND_NO[kind], np.dtype(np.bool_)
    if dtype != np.uint8:
        return pointwise(w, kind, [w.cast(x, dtype), w.cast(y, dtype)], shape_of(n), dtype_of(n))
    # LiteRT takes bytes for quantised numbers, and ends the process where it finds no scale.
    made = np.dtype(np.bool_) if dtype_of(n) == np.bool_ else np.dtype(np.int32)
    wide = pointwise(w, kind, [w.cast(x, np.int32), w.cast(y, np.int32)], shape_of(n), made)
    return w.cast_number(wide, dtype_of(n))


def _register_binary(kind: str, packet: Any) -> None:
    def handler(w: Writer, n: fx.Node, x: Any, y: Any, alpha: float = 1) -> Any:
        if alpha == 1:
            return _binary(kind, w, n, x, y)
        dtype = dtype_of(n)
        scaled = pointwise(w, "MUL", [w.cast(y, dtype), w.cast(alpha, dtype)], shape_of(y), dtype)
        return pointwise(w, kind, [w.cast(x, dtype), scaled], shape_of(n), dtype)

    for overload in ("Tensor", "Scalar", "default"):
        if overload in packet.overloads():
            translates(getattr(packet, overload))(handler)


for _kind, _packet in (
    ("ADD", aten.add),
    ("SUB", aten.sub),
    ("MUL", aten.mul),
    ("DIV", aten.div),
    ("FLOOR_MOD", aten.remainder),
    ("EQUAL", aten.eq),
    ("NOT_EQUAL", aten.ne),
    ("GREATER", aten.gt),
    ("GREATER_EQUAL", aten.ge),
    ("LESS", aten.lt),
    ("LESS_EQUAL", aten.le),
    ("MAXIMUM", aten.maximum),
    ("MAXIMUM", aten.clamp_min),
    ("MINIMUM", aten.minimum),
    ("ATAN2", aten.atan2),
    ("LOGICAL_AND", aten.logical_and),
    ("LOGICAL_AND", aten.bitwise_and),
    ("LOGICAL_OR", aten.logical_or),
    ("LOGICAL_OR", aten.bitwise_or),
):
    _register_binary(_kind, _packet)


def _register_unary(kind: str, packet: Any) -> None:
    def handler(w: Writer, n: fx.Node, x: fx.Node) -> Any:
        return pointwise(w, kind, [w.cast(x, dtype_of(n))], shape_of(n), dtype_of(n))

    translates(packet.default)(handler)


for _kind, _packet in (
    ("ABS", aten.abs),
    ("CEIL", aten.ceil),
    ("COS", aten.cos),
    ("EXP", aten.exp),
    ("FLOOR", aten.floor),
    ("HARD_SWISH", aten.hardswish),
    ("LOG", aten.log),
    ("LOGISTIC", aten.sigmoid),
    ("NEG", aten.neg),
    ("RELU", aten.relu),
    ("RSQRT", aten.rsqrt),
    ("ROUND", aten.round),
    ("SIGN", aten.sign),
    ("SIN", aten.sin),
    ("SQRT", aten.sqrt),
    ("TANH", aten.tanh),
):
    _register_unary(_kind, _packet)


@translates(aten.bitwise_not.default, aten.logical_not.default)
def _not(w: Writer, n: fx.Node, x: fx.Node) -> Any:
    return pointwise(w, "LOGICAL_NOT", [w.cast(x, np.bool_)], shape_of(n), np.bool_)


@translates(aten.rsub.Scalar)
def _reverse_sub(w: Writer, n: fx.Node, x: fx.Node, y: float) -> Any:
    return _binary("SUB", w, n, y, x)


@translates(aten.reciprocal.default)
def _reciprocal(w: Writer, n: fx.Node, x: fx.Node) -> Any:
    return _binary("DIV", w, n, 1, x)


@translates(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)
def _power(w: Writer, n: fx.Node, x: Any, y: Any) -> Any:
    if isinstance(y, fx.Node) or y not in (2, 3):
        return _binary("POW", w, n, x, y)
    base = w.cast(x, dtype_of(n))
    square = pointwise(w, "MUL", [base, base], shape_of(n), dtype_of(n))
    return square if y == 2 else pointwise(w, "MUL", [square, base], shape_of(n), dtype_of(n))


@translates(aten.log1p.default)
def _log1p(w: Writer, n: fx.Node, x: fx.Node) -> Any:
    more = pointwise(w, "ADD", [w.number(x), w.cast(1, dtype_of(n))], shape_of(n), dtype_of(n))
    return pointwise(w, "LOG", [more], shape_of(n), dtype_of(n))


@translates(aten.expm1.default)
def _expm1(w: Writer, n: fx.Node, x: fx.Node) -> Any:
    power = pointwise(w, "EXP", [w.number(x)], shape_of(n), dtype_of(n))
    return pointwise(w, "SUB", [power, w.cast(1, dtype_of(n))], shape_of(n), dtype_of(n))


@translates(aten.where.self)
def _where(w: Writer, n: fx.Node, condition: fx.Node, x: Any, y: Any) -> Any:
    choices = [w.cast(x, dtype_of(n)), w.cast(y, dtype_of(n))]
    return pointwise(w, "SELECT_V2", [w.number(condition), *choices], shape_of(n), dtype_of(n))


@translates(aten.clamp.default, aten.hardtanh.default)
def _clamp(w: Writer, n: fx.Node, x: fx.Node, low: Any = None, high: Any = None) -> Any:
    number = w.cast(x, dtype_of(n))
    for kind, bound in (("MAXIMUM", low), ("MINIMUM", high)):
        if bound is not None:
            number = pointwise(w, kind, [number, w.cast(bound, dtype_of(n))], shape_of(n), dtype_of(n))
    return number


@translates(aten.clamp_min.default)
def _clamp_min(w: Writer, n: fx.Node, x: fx.Node, low: Any) -> Any:
    return _clamp(w, n, x, low)


@translates(aten.gelu.default)
def _gelu(w: Writer, n: fx.Node, x: fx.Node, approximate: str = "none") -> Any:
    return pointwise(w, "GELU", [w.number(x)], shape_of(n), dtype_of(n), approximate=approximate == "tanh")


@translates(aten.leaky_relu.default)
def _leaky_relu(w: Writer, n: fx.Node, x: fx.Node, slope: float = 0.01) -> Any:
    return pointwise(w, "LEAKY_RELU", [w.number(x)], shape_of(n), dtype_of(n), alpha=float(slope))


@translates(aten._to_copy.default)
def _to(w: Writer, n: fx.Node, x: fx.Node, **_: Any) -> Any:
    return w.cast(x, dtype_of(n))
