"""What ONNX Runtime's own optimiser leaves undone where weights move, each of which saves passes over a whole weight.

`w - a @ b` as one `Gemm` reads and writes a dense weight once, not three times; a new velocity, which the new weight
hangs on too, stands at once where the caller wants it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from onnx import NodeProto, helper

Shape = Sequence[str]
"""Sizes as text, so that open ones compare too."""


def views_last(nodes: Sequence[NodeProto], shapes: dict[str, Shape]) -> list[NodeProto]:
    """The same graph with sums of matrices that were seen in another shape taken before that, and then seen so.

    Args:
        nodes: in order, and each with something that hangs on it.
        shapes: of their values, as far as they are known; those of new values are put in.
    """
    graph = _Graph.of(nodes, shapes)
    made: list[NodeProto] = []
    for node in nodes:
        views = [graph.only_for_this(name, "Reshape") for name in node.input]
        sources = [view.input[0] for view in views if view is not None]
        shape = shapes.get(sources[0], ()) if sources else ()
        same = len(shape) == 2 and all(shapes.get(source) == shape for source in sources)
        if node.op_type != "Add" or views[0] is None or len(sources) != 2 or not same:
            made.append(node)
            continue
        flat = f"{node.output[0]}_flat"
        total = helper.make_node("Add", sources, [flat], name=f"{node.name}_flat")
        view = helper.make_node("Reshape", [flat, views[0].input[1]], node.output, name=node.name)
        graph.makers[node.output[0]], shapes[flat] = view, shape
        made += [total, view]
    return made


def folded(nodes: Sequence[NodeProto], shapes: Mapping[str, Shape]) -> list[NodeProto]:
    """The same graph with sums and products in one; the products that nothing hangs on any more are still there.

    Args:
        nodes: in order, and each with something that hangs on it.
        shapes: of their values, as far as they are known.
    """
    graph = _Graph.of(nodes, shapes)
    return [_with_product(node, graph) or node for node in nodes]


def written_where_made(nodes: Sequence[NodeProto], outputs: Collection[str]) -> list[NodeProto]:
    """The same graph without copies into its outputs, but for those of inputs, of constants, and of another output.

    Args:
        nodes: in order; none holds a graph that reads what another one makes.
        outputs: of the graph; each is an `Identity` of what it tells.
    """
    made = {name for node in nodes for name in node.output}
    copies = {n.output[0]: n.input[0] for n in nodes if n.op_type == "Identity" and n.output[0] in outputs}
    # Of several copies of one value the first gives it its name, and the others are copies of that.
    names = {source: copy for copy, source in reversed(copies.items()) if source in made}
    kept = [node for node in nodes if names.get(copies.get(node.output[0], "")) != node.output[0]]
    for node in kept:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    return kept


@dataclass(frozen=True, slots=True)
class _Graph:
    makers: dict[str, NodeProto]
    uses: Mapping[str, int]
    shapes: Mapping[str, Shape]

    @classmethod
    def of(cls, nodes: Sequence[NodeProto], shapes: Mapping[str, Shape]) -> _Graph:
        makers = {name: node for node in nodes for name in node.output}
        return cls(makers, Counter(name for node in nodes for name in node.input), shapes)

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
