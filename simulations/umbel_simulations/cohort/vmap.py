"""`vmap` for training graphs: one step of one client becomes one step of many clients side by side.

    step(w, x, lr)  ->  step(w of each client, x of each client, lr)

Whatever hangs on a client gets a first axis for clients; what is the same for all of them stays as it is. How, says a
batching rule for each operator, as in JAX (https://docs.jax.dev/en/latest/automatic-vectorization.html). A small model
spends its time on starting operators, and so starts them once for many clients. Batches stay open in size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import uses_external_data
from onnx.helper import make_node as _node

from umbel_simulations.cohort.graphs import needs

_ELEMENTWISE: Final = frozenset(
    [
        "Abs",
        "Acos",
        "Acosh",
        "Add",
        "And",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "BitShift",
        "BitwiseAnd",
        "BitwiseNot",
        "BitwiseOr",
        "BitwiseXor",
        "Cast",
        "Ceil",
        "Celu",
        "Clip",
        "Cos",
        "Cosh",
        "Div",
        "Elu",
        "Equal",
        "Erf",
        "Exp",
        "Floor",
        "Gelu",
        "Greater",
        "GreaterOrEqual",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "IsInf",
        "IsNaN",
        "LeakyRelu",
        "Less",
        "LessOrEqual",
        "Log",
        "Max",
        "Min",
        "Mish",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "PRelu",
        "Pow",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sinh",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Sub",
        "Sum",
        "Tan",
        "Tanh",
        "Where",
        "Xor",
    ]
)
_Attributes = Mapping[str, Any]
_FAR: Final = np.iinfo(np.int64).max


class CannotBatch(Exception):
    """An operator without a rule, or used in a way that its rule doesn't know."""


@dataclass(slots=True)
class Batched:
    """A graph's nodes with an axis for clients."""

    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, TensorProto] = field(default_factory=dict)
    """What these nodes take beside what the graph had."""


def over_clients(model: ModelProto, each: Collection[str], ends: Sequence[str], clients: str) -> Batched:
    """Give a graph an axis for clients.

    Args:
        model: its graph is one step of one client.
        each: the inputs that each client has its own of; in the graph's new form their first axis is the clients'.
        ends: what is wanted of it, for each client.
        clients: a tensor of the new graph whose first axis is the clients'.

    Raises:
        CannotBatch: there is no rule for something in it.
    """
    rewriting = _Rewriting(model, each, clients)
    for node in model.graph.node:
        rewriting.rewrite(node)
    for name in ends:
        if name not in rewriting.each:
            raise CannotBatch(f"{name!r} is the same for all clients")
    return rewriting.done


class _Rewriting:
    """Which tensors have the axis so far, and the nodes that say so."""

    def __init__(self, model: ModelProto, each: Collection[str], clients: str) -> None:
        self.done = Batched()
        self.each = set(each)
        self._clients = clients
        self._known = {tensor.name: tensor for tensor in model.graph.initializer}
        self._ranks = ranks_of(model)
        self._made: dict[str, str] = {}

    def rewrite(self, node: NodeProto) -> None:
        """Add what a node becomes."""
        if not self.each.intersection(needs(node)):
            self.done.nodes.append(node)
            return
        rule = _rule_of(node)
        rule(self, node, {one.name: helper.get_attribute_value(one) for one in node.attribute})
        if rule not in (_shape, _size):
            self.each.update(node.output)

    def rank(self, name: str) -> int:
        """How many axes a tensor has without the clients'."""
        if name not in self._ranks:
            raise CannotBatch(f"nobody knows how many axes {name!r} has")
        return self._ranks[name]

    def ints(self, name: str) -> list[int]:
        """Whole numbers that stand in the graph."""
        if name not in self._known:
            raise CannotBatch(f"{name!r} is reckoned in the graph")
        return [int(value) for value in numpy_helper.to_array(self._known[name]).reshape(-1)]

    def constant(self, values: Sequence[int] | int) -> str:
        """A constant of whole numbers."""
        name = f"@vmap{values}"
        self.done.constants[name] = numpy_helper.from_array(np.array(values, np.int64), name)
        return name

    def shared(self, name: str) -> str:
        """A tensor that has to be the same for all clients."""
        if name in self.each:
            raise CannotBatch(f"{name!r} is another for each client")
        return name

    def put(self, operator: str, inputs: Sequence[str], outputs: Sequence[str] = (), **attributes: Any) -> str:
        """Add a node; the name of its first output."""
        made = list(outputs) or [f"@vmap_{len(self.done.nodes)}"]
        self.done.nodes.append(_node(operator, inputs, made, **attributes))
        return made[0]

    def lifted(self, name: str, rank: int) -> str:
        """A tensor that meets others of `rank` axes: numpy's rule, but behind the axis of clients."""
        missing = rank - self.rank(name) if name in self.each else 0
        return self.put("Unsqueeze", [name, self.constant(list(range(1, 1 + missing)))]) if missing > 0 else name

    def spread(self, name: str) -> str:
        """A tensor for each client, repeated if it is one for all."""
        if name in self.each:
            return name
        row = self.put("Unsqueeze", [name, self.constant([0])])
        sizes = self.put("Concat", [self.count, self.constant([1] * self.rank(name))], axis=0)
        return self.put("Expand", [row, sizes if self.rank(name) else self.count])

    @property
    def count(self) -> str:
        """[1] How many clients there are."""
        if "count" not in self._made:
            sizes = self.put("Shape", [self._clients])
            self._made["count"] = self.put("Slice", [sizes, self.constant([0]), self.constant([1])])
        return self._made["count"]

    @property
    def numbers(self) -> str:
        """[clients] 0, 1, 2, …"""
        if "numbers" not in self._made:
            count = self.put("Squeeze", [self.count])
            self._made["numbers"] = self.put("Range", [self.constant(0), count, self.constant(1)])
        return self._made["numbers"]


def ranks_of(model: ModelProto) -> dict[str, int]:
    """How many axes each tensor has, as far as that is known."""
    bare = ModelProto()
    bare.CopyFrom(model)
    del bare.graph.initializer[:]
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):  # which nobody needs to read
            bare.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            bare.graph.initializer.append(tensor)
    try:
        graph = onnx.shape_inference.infer_shapes(bare).graph
    except onnx.shape_inference.InferenceError:  # such as for operators of another domain
        return {}
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            ranks[value.name] = len(value.type.tensor_type.shape.dim)
    return ranks


def _behind(axis: int) -> int:
    """Where an axis stands behind that of the clients; those counted from the end stay."""
    return axis + 1 if axis >= 0 else axis


def _elementwise(to: _Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    rank = max(to.rank(name) for name in node.input if name)
    to.put(node.op_type, [to.lifted(name, rank) if name else "" for name in node.input], node.output, **attributes)


def _clip(to: _Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    for bound in node.input[1:]:
        to.shared(bound)
    _elementwise(to, node, attributes)


def _transpose(to: _Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    order = attributes.get("perm", range(to.rank(node.input[0]))[::-1])
    to.put("Transpose", node.input, node.output, perm=[0, *map(_behind, order)])


def _matmul(to: _Rewriting, node: NodeProto, _attributes: _Attributes) -> None:
    ranks = [to.rank(name) for name in node.input]
    if min(ranks) < 2:
        raise CannotBatch("a product with a vector")
    to.put("MatMul", [to.lifted(name, max(ranks)) for name in node.input], node.output)


def _gemm(to: _Rewriting, node: NodeProto, attributes: _Attributes) -> None:
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


def _reduce(to: _Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    rank = to.rank(node.input[0])
    axes = [_behind(axis) for axis in to.ints(node.input[1])] if len(node.input) > 1 else list(range(1, 1 + rank))
    if not axes or attributes.get("noop_with_empty_axes"):
        raise CannotBatch(f"a {node.op_type} over no axis")
    to.put(node.op_type, [node.input[0], to.constant(axes)], node.output, **attributes)


def _along_axis(to: _Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    """Operators with an axis, all of whose operands have the clients' in front."""
    default = 0 if node.op_type.endswith("Elements") else -1
    inputs = [to.spread(name) for name in node.input]
    to.put(node.op_type, inputs, node.output, **{**attributes, "axis": _behind(attributes.get("axis", default))})


def _layer_norm(to: _Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    inputs = [node.input[0], *map(to.shared, node.input[1:])]
    to.put(node.op_type, inputs, node.output, **{**attributes, "axis": _behind(attributes.get("axis", -1))})


def _move_axes(to: _Rewriting, node: NodeProto, _attributes: _Attributes) -> None:
    if len(node.input) < 2:
        raise CannotBatch(f"a {node.op_type} of whatever has one row")
    axes = [_behind(axis) for axis in to.ints(node.input[1])]
    to.put(node.op_type, [node.input[0], to.constant(axes)], node.output)


def _reshape(to: _Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    if attributes.get("allowzero"):
        raise CannotBatch("a Reshape in which 0 is no other axis")
    # 0 stands for the size that is there: those of the clients and, one further, all others.
    shape = to.put("Concat", [to.constant([0]), to.shared(node.input[1])], axis=0)
    to.put("Reshape", [node.input[0], shape], node.output)


def _expand(to: _Rewriting, node: NodeProto, _attributes: _Attributes) -> None:
    """Sizes are filled up in front with ones: to as many as there are axes, and one for the clients."""
    rank, shape = to.rank(node.output[0]), to.shared(node.input[1])
    missing = to.put("Sub", [to.constant([rank + 1]), to.put("Shape", [shape])])
    ones = to.put("ConstantOfShape", [missing], value=numpy_helper.from_array(np.ones(1, np.int64)))
    whole = to.put("Concat", [ones, shape], axis=0)
    to.put("Expand", [to.lifted(node.input[0], rank), whole], node.output)


def _shape(to: _Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    """Sizes are the same for all clients."""
    if attributes:
        raise CannotBatch("a part of a Shape")
    to.put("Slice", [to.put("Shape", node.input), to.constant([1]), to.constant([_FAR])], node.output)


def _size(to: _Rewriting, node: NodeProto, _attributes: _Attributes) -> None:
    """And so is how many numbers one client has."""
    sizes = to.put("Slice", [to.put("Shape", node.input), to.constant([1]), to.constant([_FAR])])
    to.put("ReduceProd", [sizes], node.output, keepdims=0)


def _slice(to: _Rewriting, node: NodeProto, _attributes: _Attributes) -> None:
    if len(node.input) < 4:
        raise CannotBatch("a Slice of all axes")
    array, starts, stops, axes, *steps = node.input
    moved = to.constant([_behind(axis) for axis in to.ints(axes)])
    to.put("Slice", [array, to.shared(starts), to.shared(stops), moved, *map(to.shared, steps)], node.output)


def _gather(to: _Rewriting, node: NodeProto, attributes: _Attributes) -> None:
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


def _scatter(to: _Rewriting, node: NodeProto, attributes: _Attributes) -> None:
    """Places get the number of their client in front."""
    array, places, values = map(to.spread, node.input)
    first = to.put("Slice", [places, to.constant([0]), to.constant([1]), to.constant([-1])])
    column = to.put("Reshape", [to.numbers, to.constant([-1] + [1] * to.rank(node.input[1]))])
    whose = to.put("Add", [column, to.put("Mul", [first, to.constant(0)])])
    to.put("ScatterND", [array, to.put("Concat", [whose, places], axis=-1), values], node.output, **attributes)


_Rule = Callable[[_Rewriting, NodeProto, _Attributes], None]
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
    "Reshape": _reshape,
    "ScatterND": _scatter,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Transpose": _transpose,
}


def _rule_of(node: NodeProto) -> _Rule:
    if node.domain or node.op_type not in _RULES:
        raise CannotBatch(f"no rule for {node.op_type}")
    return _RULES[node.op_type]
