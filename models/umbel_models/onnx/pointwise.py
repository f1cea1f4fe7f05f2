"""Operators that treat each number by itself."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import fx

from umbel_models.onnx.graph import Writer, dtype_of, onnx_dtype, translates
from umbel_models.translation import meeting_dtype

aten = torch.ops.aten
_OF_YES_AND_NO: Final = {"Add": "Or", "Max": "Or", "Mul": "And", "Min": "And"}
"""What arithmetic is among booleans."""


def _binary(kind: str, w: Writer, n: fx.Node, x: Any, y: Any) -> Any:
    dtype = meeting_dtype(n, x, y)
    if dtype_of(n) == torch.bool and kind in _OF_YES_AND_NO:
        kind, dtype = _OF_YES_AND_NO[kind], torch.bool
    return w.node(kind, w.cast(x, dtype), w.cast(y, dtype))


def _register_binary(kind: str, packet: Any) -> None:
    def handler(w: Writer, n: fx.Node, x: Any, y: Any, alpha: float = 1) -> Any:
        if alpha == 1:
            return _binary(kind, w, n, x, y)
        dtype = dtype_of(n)
        return w.node(kind, w.cast(x, dtype), w.node("Mul", w.cast(y, dtype), w.cast(alpha, dtype)))

    for overload in ("Tensor", "Scalar", "default"):
        if overload in packet.overloads():
            translates(getattr(packet, overload))(handler)


for _kind, _packet in (
    ("Add", aten.add),
    ("Sub", aten.sub),
    ("Mul", aten.mul),
    ("Div", aten.div),
    ("Equal", aten.eq),
    ("Greater", aten.gt),
    ("GreaterOrEqual", aten.ge),
    ("Less", aten.lt),
    ("LessOrEqual", aten.le),
    ("Max", aten.maximum),
    ("Max", aten.clamp_min),
    ("Min", aten.minimum),
):
    _register_binary(_kind, _packet)


def _register_unary(kind: str, packet: Any) -> None:
    def handler(w: Writer, n: fx.Node, x: fx.Node) -> Any:
        return w.node(kind, w.cast(x, dtype_of(n)))

    translates(packet.default)(handler)


for _kind, _packet in (
    ("Abs", aten.abs),
    ("Acos", aten.acos),
    ("Asin", aten.asin),
    ("Atan", aten.atan),
    ("Ceil", aten.ceil),
    ("Cos", aten.cos),
    ("Erf", aten.erf),
    ("Cosh", aten.cosh),
    ("Exp", aten.exp),
    ("Floor", aten.floor),
    ("HardSwish", aten.hardswish),
    ("Log", aten.log),
    ("Neg", aten.neg),
    ("Reciprocal", aten.reciprocal),
    ("Relu", aten.relu),
    ("Sigmoid", aten.sigmoid),
    ("Round", aten.round),
    ("Sign", aten.sign),
    ("Sin", aten.sin),
    ("Sinh", aten.sinh),
    ("Sqrt", aten.sqrt),
    ("Tan", aten.tan),
    ("Tanh", aten.tanh),
):
    _register_unary(_kind, _packet)


@translates(aten.ne.Scalar, aten.ne.Tensor)
def _differ(w: Writer, n: fx.Node, x: Any, y: Any) -> Any:
    return w.node("Not", _binary("Equal", w, n, x, y))


@translates(aten.rsub.Scalar)
def _reverse_sub(w: Writer, n: fx.Node, x: fx.Node, y: float) -> Any:
    return w.node("Sub", w.cast(y, dtype_of(n)), w.cast(x, dtype_of(n)))


@translates(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)
def _power(w: Writer, n: fx.Node, x: Any, y: Any) -> Any:
    base = w.cast(x, dtype_of(n))
    if not isinstance(y, fx.Node) and y in (2, 3):
        square = w.node("Mul", base, base)
        return square if y == 2 else w.node("Mul", square, base)
    return w.node("Pow", base, w.cast(y, dtype_of(n)))


@translates(aten.remainder.Scalar, aten.remainder.Tensor)
def _remainder(w: Writer, n: fx.Node, x: fx.Node, y: Any) -> Any:
    if dtype_of(n).is_floating_point:
        # ONNX knows only the remainder of C for these, whose sign is another.
        quotient = w.node("Floor", w.node("Div", w.cast(x, dtype_of(n)), w.cast(y, dtype_of(n))))
        return w.node("Sub", w.cast(x, dtype_of(n)), w.node("Mul", quotient, w.cast(y, dtype_of(n))))
    return _binary("Mod", w, n, x, y)


@translates(aten.rsqrt.default)
def _reverse_sqrt(w: Writer, n: fx.Node, x: fx.Node) -> Any:
    return w.node("Reciprocal", w.node("Sqrt", x))


@translates(aten.log1p.default)
def _log1p(w: Writer, n: fx.Node, x: fx.Node) -> Any:
    return w.node("Log", w.node("Add", x, w.cast(1, dtype_of(n))))


@translates(aten.expm1.default)
def _expm1(w: Writer, n: fx.Node, x: fx.Node) -> Any:
    return w.node("Sub", w.node("Exp", x), w.cast(1, dtype_of(n)))


@translates(aten.bitwise_and.Tensor, aten.logical_and.default)
def _and(w: Writer, n: fx.Node, x: fx.Node, y: fx.Node) -> Any:
    return w.node("And", x, y)


@translates(aten.bitwise_or.Tensor, aten.logical_or.default)
def _or(w: Writer, n: fx.Node, x: fx.Node, y: fx.Node) -> Any:
    return w.node("Or", x, y)


@translates(aten.bitwise_not.default, aten.logical_not.default)
def _not(w: Writer, n: fx.Node, x: fx.Node) -> Any:
    return w.node("Not", w.node("Cast", x, to=onnx_dtype(torch.bool)))


@translates(aten.where.self)
def _where(w: Writer, n: fx.Node, condition: fx.Node, x: Any, y: Any) -> Any:
    return w.node("Where", condition, w.cast(x, dtype_of(n)), w.cast(y, dtype_of(n)))


@translates(aten.clamp.default, aten.hardtanh.default)
def _clamp(w: Writer, n: fx.Node, x: fx.Node, low: Any = None, high: Any = None) -> Any:
    bounds = [None if bound is None else w.cast(bound, dtype_of(n)) for bound in (low, high)]
    return w.node("Clip", w.cast(x, dtype_of(n)), *bounds)


@translates(aten.clamp_min.default)
def _clamp_min(w: Writer, n: fx.Node, x: fx.Node, low: Any) -> Any:
    return _clamp(w, n, x, low)


@translates(aten.gelu.default)
def _gelu(w: Writer, n: fx.Node, x: fx.Node, approximate: str = "none") -> Any:
    return w.node("Gelu", x, approximate=approximate)


@translates(aten.leaky_relu.default)
def _leaky_relu(w: Writer, n: fx.Node, x: fx.Node, slope: float = 0.01) -> Any:
    return w.node("LeakyRelu", x, alpha=float(slope))


@translates(aten.elu.default)
def _elu(w: Writer, n: fx.Node, x: fx.Node, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    if input_scale != 1:
        # Celu: alpha (exp(x / alpha) - 1) below zero.
        low = w.node("Exp", w.node("Mul", w.node("Min", x, w.cast(0.0, dtype_of(n))), w.cast(input_scale, dtype_of(n))))
        low = w.node("Mul", w.node("Sub", low, w.cast(1.0, dtype_of(n))), w.cast(alpha, dtype_of(n)))
        made = w.node("Where", w.node("Greater", x, w.cast(0.0, dtype_of(n))), x, low)
    else:
        made = w.node("Elu", x, alpha=float(alpha))
    return made if scale == 1 else w.node("Mul", made, w.cast(scale, dtype_of(n)))
