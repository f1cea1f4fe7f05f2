"""A net's first dense layer in dual form: what a client's weight moved, told by the client's own examples.

    W_t = W_0 + pull_t' X            W [out, in], X [examples, in], pull [examples, out]
    x W_t' = x W_0' + (x X') pull_t

Gradient descent adds multiples of `gradient' x` to the weight of a layer that reads the examples themselves, so the
weight stays within what they span (Irie, Csordás and Schmidhuber, arXiv:2202.05798). Where examples have many features,
`pull` is much smaller than W, X W_0' and X X' are made once for all steps, and W moves once, at the end. The same holds
for whatever is made of such weights by sums and by factors: a velocity, a proximal term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnx.external_data_helper import uses_external_data
from onnx.helper import make_node as _node

from umbel.manifest import ANCHOR_PREFIX, NEXT_PREFIX, Manifest
from umbel_simulations.cohort.graphs import needed, owner_of
from umbel_simulations.cohort.vmap import ranks_of

FEATURES: Final = "@features"
"""[all, in] What the layer reads, of all examples of all clients."""
FIRST: Final = "@first"
"""[all, out] X W_0', what it answers before it moves; a step takes a batch of it."""
GRAM: Final = "@gram"
"""[all, examples] Each example's products with all examples of its client; likewise."""
PICKED: Final = "@picked"
"""[batch] Which of its examples a client takes."""
PULL: Final = "@pull"
"""[all, out] Of all clients, each times its weight."""
MOVED: Final = "@moved"
_PLACES: Final = "@places"
_FLOAT: Final = TensorProto.FLOAT
_BY_ROW: Final = frozenset({"Add", "Cast", "Div", "Identity", "Mul", "Reshape", "Sub"})
"""What examples may go through on their way to the layer, with constants that are the same for all of them."""


class HasNone(Exception):
    """The graph's first layer has no dual form."""


@dataclass(frozen=True, slots=True)
class DualStep:
    """A training step of one client in dual form, and the graphs that begin and end it for many."""

    model: ModelProto
    """Takes PICKED, and of FIRST and GRAM a batch, in place of what the layer reads."""
    weight: str
    """The layer's. In the step it, and what is kept for it, are [examples, out], and begin as zeros."""
    pulls: frozenset[str]
    """All of these, by name."""
    taken: str
    """The input that the layer reads."""
    reads_input: bool
    """Just as it is: it is FEATURES, which `begin` doesn't make then."""
    begin: bytes
    """`taken` [all, ...] and the weight -> FEATURES, FIRST"""
    gram: bytes
    """FEATURES of one client -> GRAM"""
    end: bytes
    """FEATURES, PULL -> MOVED [out, in], how far the weight moves"""


@dataclass(frozen=True, slots=True)
class _Span:
    """`start * W_0 + pull' X`; without a pull, that is 0."""

    start: int
    pull: str
    turned: bool = False


def in_dual_form(model: ModelProto, manifest: Manifest) -> DualStep:
    """The step whose first dense layer is in dual form.

    Args:
        model: one step of one client, with `next_…` and `loss` for outputs.
        manifest: of its bundle.

    Raises:
        HasNone: no dense layer reads the examples themselves, or its optimiser does more than add and scale.
    """
    graph, ranks = model.graph, ranks_of(model)
    makers = {name: node for node in graph.node for name in node.output}
    inputs = {spec.name: spec.shape[1:] for spec in manifest.inputs if spec.dtype == "float32"}
    inline = (tensor for tensor in graph.initializer if not uses_external_data(tensor))
    known = {tensor.name for tensor in inline if len(tensor.dims) <= 1}
    for weight in manifest.trainable:
        turned = [node.output[0] for node in graph.node if node.op_type == "Transpose" and node.input[0] == weight.name]
        for node in graph.node:
            if node.op_type in ("Gemm", "MatMul") and node.input[1] in turned and ranks.get(node.input[0]) == 2:
                taken, way = _way_from(node.input[0], makers, inputs, known)
                # As many features as the input has numbers: else a layer for places, of which an example has many.
                if taken and math.prod(size or 0 for size in inputs[taken]) == weight.fixed_shape[1]:
                    return _Rewriting(model, manifest, weight.name, node.input[0]).done(taken, way)
    raise HasNone("no dense layer reads the examples themselves")


def _way_from(
    name: str, makers: Mapping[str, NodeProto], inputs: Collection[str], known: Collection[str]
) -> tuple[str, list[NodeProto]]:
    """From which input features come and by which nodes, if row by row; else from none."""
    way: list[NodeProto] = []
    while name not in inputs:
        node = makers.get(name)
        if node is None or node.op_type not in _BY_ROW:
            return "", []
        before = [one for one in node.input if one not in known]
        if len(before) != 1:
            return "", []
        way.append(node)
        name = before[0]
    return name, way[::-1]


class _Rewriting:
    """What each tensor of the weight's shape is in terms of W_0 and X."""

    def __init__(self, model: ModelProto, manifest: Manifest, weight: str, features: str) -> None:
        self._model, self._weight, self._features = model, weight, features
        self._out, self._in = manifest.shared_shapes[weight]
        trainable = [spec.name for spec in manifest.trainable]
        slots = {spec.name for spec in manifest.slots if owner_of(spec.name, trainable) == weight}
        anchors = {name for name in slots if name.startswith(ANCHOR_PREFIX)}
        kept = {name for name in slots - anchors if any(one.name == name for one in model.graph.input)}
        self._known = {weight: _Span(1, weight)}
        self._known |= {name: _Span(0, name) for name in kept} | {name: _Span(1, "") for name in anchors}
        self._pulls = frozenset({weight, *kept})
        self._ranks = ranks_of(model)
        self._nodes: list[NodeProto] = []

    def done(self, taken: str, way: list[NodeProto]) -> DualStep:
        """The step, and what comes before the first and after the last."""
        for node in self._model.graph.node:
            if any(name in self._known for name in node.input):
                self._rewrite(node)
            else:
                self._nodes.append(node)
        for name in self._pulls:
            if self._known.get(NEXT_PREFIX + name) != _Span(int(name == self._weight), NEXT_PREFIX + name):
                raise HasNone(f"{name!r} moves by more than sums and factors")
        begin, gram, end = self._begin(taken, way), self._gram(), self._end()
        return DualStep(self._step(), self._weight, self._pulls, taken, not way, begin, gram, end)

    def _step(self) -> ModelProto:
        step = ModelProto()
        step.CopyFrom(self._model)
        ends = [value.name for value in step.graph.output]
        nodes = needed(self._nodes, ends)
        taken = {name for node in nodes for name in node.input}
        pulls, size = sorted(self._pulls), list[int | str](["examples", self._out])
        inputs = [value for value in step.graph.input if value.name in taken and value.name not in self._pulls]
        inputs += [_info(name, _FLOAT, size) for name in pulls]
        inputs += [_info(FIRST, _FLOAT, ["batch", self._out]), _info(GRAM, _FLOAT, ["batch", "examples"])]
        inputs.append(_info(PICKED, TensorProto.INT64, ["batch"]))
        kept = [value for value in step.graph.output if value.name.removeprefix(NEXT_PREFIX) not in self._pulls]
        pulled = [_info(NEXT_PREFIX + name, _FLOAT, size) for name in pulls]
        for field, values in (("node", nodes), ("input", inputs), ("output", [*kept, *pulled])):
            step.graph.ClearField(field)
            getattr(step.graph, field).extend(values)
        step.graph.ClearField("value_info")
        step.graph.initializer.append(numpy_helper.from_array(np.array([-1]), _PLACES))
        return step

    def _begin(self, taken: str, way: list[NodeProto]) -> bytes:
        given = {value.name: value for value in self._model.graph.input}
        nodes = [
            *way,
            _node("Transpose", [self._weight], ["turned"], perm=[1, 0]),
            _node("MatMul", [self._features, "turned"], [FIRST]),
        ]
        if way:
            nodes.append(_node("Identity", [self._features], [FEATURES]))
        return self._made(nodes, [given[taken], given[self._weight]], [*([FEATURES] if way else []), FIRST])

    def _gram(self) -> bytes:
        nodes = [_node("Transpose", [FEATURES], ["turned"], perm=[1, 0]), _node("MatMul", [FEATURES, "turned"], [GRAM])]
        return self._made(nodes, [_info(FEATURES, _FLOAT, ["all", self._in])], [GRAM])

    def _end(self) -> bytes:
        nodes = [_node("Transpose", [PULL], ["turned"], perm=[1, 0]), _node("MatMul", ["turned", FEATURES], [MOVED])]
        inputs = [_info(FEATURES, _FLOAT, ["all", self._in]), _info(PULL, _FLOAT, ["all", self._out])]
        return self._made(nodes, inputs, [MOVED])

    def _made(self, nodes: list[NodeProto], inputs: list[ValueInfoProto], outputs: list[str]) -> bytes:
        taken = {name for node in nodes for name in node.input}
        known = [tensor for tensor in self._model.graph.initializer if tensor.name in taken]
        made = [_info(name, _FLOAT, None) for name in outputs]
        graph = helper.make_graph(nodes, "dual", inputs, made, known)
        model = helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)
        return bytes(model.SerializeToString())

    def _rewrite(self, node: NodeProto) -> None:
        rule = _RULES.get(node.op_type)
        if rule is None:
            raise HasNone(f"a {node.op_type} of the weight")
        attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        found = rule(self, node, attributes)
        if found is not None:
            self._known[node.output[0]] = found

    def _put(self, operator: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        name = output or f"@dual_{len(self._nodes)}"
        self._nodes.append(_node(operator, inputs, [name], **attributes))
        return name

    def transpose(self, node: NodeProto, _attributes: Mapping[str, Any]) -> _Span:
        """W'"""
        span = self._known[node.input[0]]
        return _Span(span.start, span.pull, not span.turned)

    def product(self, node: NodeProto, attributes: Mapping[str, Any]) -> _Span | None:
        """`x W' + b`, the layer's answer; or `W +- gradient' x`, its descent."""
        factors, added = list(node.input[:2]), node.input[2] if len(node.input) > 2 else ""
        alpha, turns = attributes.get("alpha", 1.0), (attributes.get("transA", 0), attributes.get("transB", 0))
        if attributes.get("beta", 1.0) != 1:
            raise HasNone("a Gemm with a beta")
        if factors[0] == self._features and turns == (0, 0) and alpha == 1 and added not in self._known:
            self._answer(node.output[0], self._known[factors[1]], added)
            return None
        if factors[1] == self._features and turns == (1, 0) and alpha in (1, -1) and factors[0] not in self._known:
            return self._descent(node.output[0], factors[0], alpha, self._known[added])
        raise HasNone("a product of the weight")

    def _answer(self, output: str, span: _Span, bias: str) -> None:
        if span.start != 1 or not span.pull or not span.turned:
            raise HasNone("an answer of something beside the weight")
        first = self._put("Add", [FIRST, bias]) if bias else FIRST
        self._put("Add", [first, self._put("MatMul", [GRAM, span.pull])], output)

    def _descent(self, output: str, gradient: str, alpha: float, span: _Span) -> _Span:
        if not span.pull or span.turned:
            raise HasNone("a descent from something beside the weight")
        places = self._put("Unsqueeze", [PICKED, _PLACES])
        values = gradient if alpha == 1 else self._put("Neg", [gradient])
        return _Span(span.start, self._put("ScatterND", [span.pull, places, values], output, reduction="add"))

    def scaled(self, node: NodeProto, _attributes: Mapping[str, Any]) -> _Span:
        """A number times what lies in the span alone."""
        spans = [name for name in node.input if name in self._known]
        if len(spans) != 1 or self._known[spans[0]].start or self._known[spans[0]].turned:
            raise HasNone("a weight that shrinks")
        (factor,) = (name for name in node.input if name not in self._known)
        if self._ranks.get(factor) != 0:
            raise HasNone("a factor that is no number")
        pull = self._known[spans[0]].pull
        return _Span(0, self._put("Mul", [factor, pull], node.output[0]) if pull else "")

    def added(self, node: NodeProto, _attributes: Mapping[str, Any]) -> _Span:
        """A sum or a difference of such."""
        if any(name not in self._known or self._known[name].turned for name in node.input):
            raise HasNone("a sum of the weight with something else")
        left, right = (self._known[name] for name in node.input)
        sign = 1 if node.op_type == "Add" else -1
        pulls = [span.pull for span in (left, right)]
        if all(pulls):
            pull = self._put(node.op_type, pulls, node.output[0])
        elif right.pull:
            pull = self._put("Identity" if sign == 1 else "Neg", [right.pull], node.output[0])
        else:
            pull = self._put("Identity", [left.pull], node.output[0]) if left.pull else ""
        return _Span(left.start + sign * right.start, pull)


def _info(name: str, kind: int, shape: list[int | str] | None) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


_Rule = Callable[[_Rewriting, NodeProto, Mapping[str, Any]], "_Span | None"]
_RULES: Final[Mapping[str, _Rule]] = {
    "Add": _Rewriting.added,
    "Gemm": _Rewriting.product,
    "MatMul": _Rewriting.product,
    "Mul": _Rewriting.scaled,
    "Sub": _Rewriting.added,
    "Transpose": _Rewriting.transpose,
}
