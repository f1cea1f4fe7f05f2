"""What each ONNX operator becomes with an axis for clients in front of whatever is another for each: batching rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from onnx import NodeProto, numpy_helper

if TYPE_CHECKING:
    from umbel_simulations.cohort.vmap import Rewriting

# fmt: off
_ELEMENTWISE: Final = frozenset({
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitShift", "BitwiseAnd",
    "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Div", "Elu", "Equal",
    "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf",
    "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or",
    "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus",
    "Softsign", "Sqrt", "Sub", "Sum", "Tan", "Tanh", "Where", "Xor",
})
# fmt: on
_Attributes = Mapping[str, Any]
_FAR: Final = np.iinfo(np.int64).max


class CannotBatch(Exception):
    """An operator without a rule, or used in a way that its rule doesn't know."""


def _behind(axis: int) -> int:
    """Where an axis stands behind that of the clients; those counted from the end stay."""
    return axis + 1 if axis >= 0 else axis


def _elementwise(to: Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    rank = max(to.rank(name) for name in node.input if name)
    to.put(node.op_type, [to.lifted(name, rank) if name else "" for name in node.input], node.output, **attributes)


def _clip(to: Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    for bound in node.input[1:]:
        to.shared(bound)
    _elementwise(to, node, attributes)


def _transpose(to: Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    order = attributes.get("perm", range(to.rank(node.input[0]))[::-1])
    to.put("Transpose", node.input, node.output, perm=[0, *map(_behind, order)])


def _matmul(to: Rewriting, node: NodeProto, _attributes: _Attributes) -> None:
    ranks = [to.rank(name) for name in node.input]
    if min(ranks) < 2:
        raise CannotBatch("a product with a vector")
    to.put("MatMul", [to.lifted(name, max(ranks)) for name in node.input], node.output)


def _gemm(to: Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    """`alpha * a @ b + c`: a product of many matrices, and what comes to it."""
    alpha, factors = attributes.get("alpha", 1.0), []
    if attributes.get("beta", 1.0) != 1:
        raise CannotBatch("a Gemm with a beta")
    for name, turn in zip(node.input[:2], ("transA", "transB"), strict=True):
        order = [0, 2, 1] if name in to.each else [1, 0]
        factors.append(to.put("Transpose", [name], perm=order) if attributes.get(turn) else name)
    added = to.lifted(node.input[2], 2) if len(node.input) > 2 else ""
    if alpha not in (1, -1) or (alpha == -1 and not added):
        raise CannotBatch(f"a Gemm with an alpha of {alpha}")
    if not added:
        to.put("MatMul", factors, node.output)
    elif alpha == 1:
        to.put("Add", [to.put("MatMul", factors), added], node.output)
    else:
        to.put("Sub", [added, to.put("MatMul", factors)], node.output)


def _reduce(to: Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    rank = to.rank(node.input[0])
    axes = [_behind(axis) for axis in to.ints(node.input[1])] if len(node.input) > 1 else list(range(1, 1 + rank))
    if not axes or attributes.get("noop_with_empty_axes"):
        raise CannotBatch(f"a {node.op_type} over no axis")
    to.put(node.op_type, [node.input[0], to.constant(axes)], node.output, **attributes)


def _along_axis(to: Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    """Operators with an axis, all of whose operands have the clients' in front."""
    default = 0 if node.op_type.endswith("Elements") else -1
    inputs = [to.spread(name) for name in node.input]
    to.put(node.op_type, inputs, node.output, **{**attributes, "axis": _behind(attributes.get("axis", default))})


def _layer_norm(to: Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    """With scales and offsets of each client after it, as the operator takes only one for all."""
    x, *affine = node.input
    moved = {**attributes, "axis": _behind(attributes.get("axis", -1))}
    if not to.each.intersection(affine):
        to.put(node.op_type, node.input, node.output, **moved)
        return
    sizes = to.put("Shape", [affine[0]])
    if affine[0] in to.each:
        sizes = to.put("Slice", [sizes, to.constant([1]), to.constant([_FAR])])
    ones = to.put("ConstantOfShape", [sizes], value=numpy_helper.from_array(np.ones(1, np.float32)))
    scale, *offset = (to.lifted(name, to.rank(x)) for name in affine)
    plain = to.put(node.op_type, [x, ones], [f"{node.output[0]}@plain", *node.output[1:]], **moved)
    if offset:
        to.put("Add", [to.put("Mul", [plain, scale]), *offset], node.output[:1])
    else:
        to.put("Mul", [plain, scale], node.output[:1])


def _split(to: Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    inputs = [node.input[0], *map(to.shared, node.input[1:])]
    to.put("Split", inputs, node.output, **{**attributes, "axis": _behind(attributes.get("axis", 0))})


def _pad(to: Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    array, pads, *value = node.input
    if len(value) > 1:
        raise CannotBatch("a Pad of some axes")
    sizes = to.ints(pads)
    half = len(sizes) // 2
    around = to.constant([0, *sizes[:half], 0, *sizes[half:]])
    to.put("Pad", [array, around, *map(to.shared, value)], node.output, **attributes)


def _move_axes(to: Rewriting, node: NodeProto, _attributes: _Attributes) -> None:
    if len(node.input) < 2:
        raise CannotBatch(f"a {node.op_type} of whatever has one row")
    axes = [_behind(axis) for axis in to.ints(node.input[1])]
    to.put(node.op_type, [node.input[0], to.constant(axes)], node.output)


def _reshape(to: Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    if attributes.get("allowzero"):
        raise CannotBatch("a Reshape in which 0 is no other axis")
    # 0 stands for the size that is there: those of the clients and, one further, all others.
    shape = to.put("Concat", [to.constant([0]), to.shared(node.input[1])], axis=0)
    to.put("Reshape", [node.input[0], shape], node.output)


def _expand(to: Rewriting, node: NodeProto, _attributes: _Attributes) -> None:
    """Sizes are filled up in front with ones: to as many as there are axes, and one for the clients."""
    rank, shape = to.rank(node.output[0]), to.shared(node.input[1])
    missing = to.put("Sub", [to.constant([rank + 1]), to.put("Shape", [shape])])
    ones = to.put("ConstantOfShape", [missing], value=numpy_helper.from_array(np.ones(1, np.int64)))
    whole = to.put("Concat", [ones, shape], axis=0)
    to.put("Expand", [to.lifted(node.input[0], rank), whole], node.output)


def _shape(to: Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    """Sizes are the same for all clients."""
    if attributes:
        raise CannotBatch("a part of a Shape")
    to.put("Slice", [to.put("Shape", node.input), to.constant([1]), to.constant([_FAR])], node.output)


def _size(to: Rewriting, node: NodeProto, _attributes: _Attributes) -> None:
    """And so is how many numbers one client has."""
    sizes = to.put("Slice", [to.put("Shape", node.input), to.constant([1]), to.constant([_FAR])])
    to.put("ReduceProd", [sizes], node.output, keepdims=0)


def _slice(to: Rewriting, node: NodeProto, _attributes: _Attributes) -> None:
    if len(node.input) < 4:
        raise CannotBatch("a Slice of all axes")
    array, starts, stops, axes, *steps = node.input
    moved = to.constant([_behind(axis) for axis in to.ints(axes)])
    to.put("Slice", [array, to.shared(starts), to.shared(stops), moved, *map(to.shared, steps)], node.output)


def _gather(to: Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    array, places = node.input
    axis = attributes.get("axis", 0)
    if places not in to.each:
        to.put("Gather", [array, places], node.output, axis=_behind(axis))
    elif axis:
        raise CannotBatch("a Gather along a later axis, at places of each client")
    elif array in to.each:
        each = to.put("Unsqueeze", [places, to.constant([-1])])
        to.put("GatherND", [array, each], node.output, batch_dims=1)
    else:
        to.put("Gather", [array, places], node.output, axis=0)


def _scatter(to: Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    """Places get the number of their client in front."""
    array, places, values = map(to.spread, node.input)
    first = to.put("Slice", [places, to.constant([0]), to.constant([1]), to.constant([-1])])
    column = to.put("Reshape", [to.numbers, to.constant([-1] + [1] * to.rank(node.input[1]))])
    whose = to.put("Add", [column, to.put("Mul", [first, to.constant(0)])])
    to.put("ScatterND", [array, to.put("Concat", [whose, places], axis=-1), values], node.output, **attributes)


_Rule = Callable[["Rewriting", NodeProto, _Attributes], None]
_RULES: Final[Mapping[str, _Rule]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"), _reduce),
    **dict.fromkeys(("Concat", "GatherElements", "LogSoftmax", "ScatterElements", "Softmax"), _along_axis),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), _move_axes),
    "Clip": _clip,
    "Expand": _expand,
    "Gather": _gather,
    "Gemm": _gemm,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "Pad": _pad,
    "Reshape": _reshape,
    "ScatterND": _scatter,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Split": _split,
    "Transpose": _transpose,
}


SAME_FOR_ALL: Final = (_shape, _size)
"""The rules of what comes to the same for all clients."""


def rule_of(node: NodeProto) -> _Rule:
    """How to give a node the axis; raises `CannotBatch` for an operator without a rule."""
    if node.domain or node.op_type not in _RULES:
        raise CannotBatch(f"no rule for {node.op_type}")
    return _RULES[node.op_type]
