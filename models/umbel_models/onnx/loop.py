"""A loop over the examples of a batch, one after the other, whose outputs are added up: ONNX's Scan."""

from __future__ import annotations

from collections.abc import Callable

from onnx import ValueInfoProto, helper
from torch import Tensor, fx

from umbel_models.lowering import Lowered
from umbel_models.onnx.graph import Writer, onnx_dtype

PREFIX = "each_"

Translate = Callable[[Lowered, Writer, fx.Node], None]


def add_loop(writer: Writer, body: Lowered, batch: list[str], translate: Translate) -> dict[str, str]:
    """Run a lowered signature of one example for each example, and add up what it gives.

    Args:
        writer: the graph around the loop.
        body: a signature whose inputs named in `batch` have a batch of one; others come from around the loop.
        batch: the inputs that are cut into examples.
        translate: puts one node of the body into a graph.

    Returns:
        Where the sum of each output stands, by the output's name.
    """
    inner = Writer(PREFIX + writer.prefix)
    placeholders = [node for node in body.graph.graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, body.signature.inputs, strict=True):
        # Scan takes the first dimension away; what it was traced with is a batch of one.
        inner.values[node] = inner.node("Unsqueeze", PREFIX + name, inner.ints(0)) if name in batch else name
    for node in body.graph.graph.nodes:
        translate(body, inner, node)
    (output,) = (node for node in body.graph.graph.nodes if node.op == "output")
    sums = dict(zip(body.outputs, output.args[0], strict=True))
    for name, value in sums.items():
        now = inner.node("Add", PREFIX + name, value)
        inner.nodes.append(helper.make_node("Identity", [now], [f"{PREFIX}new_{name}"], name=f"{PREFIX}out_{name}"))
    shapes = {name: value.meta["val"] for name, value in sums.items()}
    examples = {name: body.signature.inputs[name][0] for name in batch}
    nodes, constants = inner.used([f"{PREFIX}new_{name}" for name in sums])
    graph = helper.make_graph(
        nodes,
        "each",
        [_info(PREFIX + name, tensor) for name, tensor in (*shapes.items(), *examples.items())],
        [_info(f"{PREFIX}new_{name}", tensor) for name, tensor in shapes.items()],
        constants,
    )
    zeros = [writer.node("Expand", writer.constant(0.0, "float32"), writer.ints(*t.shape)) for t in shapes.values()]
    made = writer.node("Scan", *zeros, *batch, outputs=len(sums), body=graph, num_scan_inputs=len(batch))
    return dict(zip(sums, made, strict=True))


def _info(name: str, example: Tensor) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx_dtype(example.dtype), list(example.shape))
