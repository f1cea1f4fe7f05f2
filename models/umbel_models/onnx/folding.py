"""A sum with a matrix product as one operator, which ONNX Runtime's own optimiser leaves apart.

`w - a @ b` as one `Gemm` reads and writes a dense weight once, not three times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx import NodeProto, helper

Shape = Sequence[str]
"""Sizes as text, so that open ones compare too."""


def folded(nodes: Sequence[NodeProto], shapes: Mapping[str, Shape]) -> list[NodeProto]:
    """The same graph with sums and products in one; the products that nothing hangs on any more are still there.

    Args:
        nodes: in order, and each with something that hangs on it.
        shapes: of their values, as far as they are known.
    """
    graph = _Graph(
        {name: node for node in nodes for name in node.output},
        Counter(name for node in nodes for name in node.input),
        shapes,
    )
    return [_with_product(node, graph) or node for node in nodes]


@dataclass(frozen=True, slots=True)
class _Graph:
    makers: Mapping[str, NodeProto]
    uses: Mapping[str, int]
    shapes: Mapping[str, Shape]

    def only_for_this(self, name: str, kind: str) -> NodeProto | None:
        """What made a value, if it is an operator of this kind and the value has one use."""
        maker = self.makers.get(name)
        return maker if maker is not None and maker.op_type == kind and self.uses[name] == 1 else None

    def unturned(self, name: str, alone: bool = False) -> tuple[str, bool]:
        """What a matrix is, or is the transpose of; `alone` passes only transposes that have one use."""
        is_turned = False
        while (maker := self.makers.get(name)) is not None and maker.op_type == "Transpose":
            if [*maker.attribute[0].ints] != [1, 0] or (alone and self.uses[name] != 1):
                break
            name, is_turned = maker.input[0], not is_turned
        return name, is_turned


def _with_product(node: NodeProto, graph: _Graph) -> NodeProto | None:
    """A `Gemm` in place of a sum of two matrices of the same shape, if one of them is a product."""
    if node.op_type not in ("Add", "Sub"):
        return None
    shape = graph.shapes.get(node.output[0], ())
    if len(shape) != 2 or any(graph.shapes.get(name) != shape for name in node.input):
        return None
    orders = [(0, 1)] if node.op_type == "Sub" else [(0, 1), (1, 0)]
    for other, term in orders:
        name, is_turned = graph.unturned(node.input[term], alone=True)
        product = graph.only_for_this(name, "MatMul")
        if product is not None:
            factors = [graph.unturned(factor) for factor in product.input]
            if is_turned:
                factors = [(factor, not turned) for factor, turned in reversed(factors)]
            (left, turn_left), (right, turn_right) = factors
            return helper.make_node(
                "Gemm",
                [left, right, node.input[other]],
                node.output,
                name=node.name,
                alpha=-1.0 if node.op_type == "Sub" else 1.0,
                transA=int(turn_left),
                transB=int(turn_right),
            )
    return None
