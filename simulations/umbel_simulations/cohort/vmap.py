"""`vmap` for training graphs: one step of one client becomes one step of many clients side by side.

    step(w, x, lr)  ->  step(w of each client, x of each client, lr)

Whatever hangs on a client gets a first axis for clients; what is the same for all of them stays as it is. How, says a
rule for each operator (`batching_rules`), as in JAX (https://docs.jax.dev/en/latest/automatic-vectorization.html). A
small model spends its time on starting operators, and so starts them once for many clients. Batches stay open in size.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import uses_external_data
from onnx.helper import make_node as _node

from umbel_simulations.cohort.batching_rules import SAME_FOR_ALL, CannotBatch, rule_of
from umbel_simulations.cohort.graphs import needs


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
    rewriting = Rewriting(model, each, clients)
    for node in model.graph.node:
        rewriting.rewrite(node)
    for name in ends:
        if name not in rewriting.each:
            raise CannotBatch(f"{name!r} is the same for all clients")
    return rewriting.done


class Rewriting:
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
        rule = rule_of(node)
        rule(self, node, {one.name: helper.get_attribute_value(one) for one in node.attribute})
        if rule not in SAME_FOR_ALL:
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
