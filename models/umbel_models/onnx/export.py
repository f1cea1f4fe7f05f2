"""A lowered signature as the bytes of an ONNX file."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import torch
from onnx import NodeProto, TensorProto, ValueInfoProto, helper
from torch import Tensor, fx

from umbel.errors import CannotCompile
from umbel.manifest import WEIGHTS_FILE
from umbel.weights import Weights
from umbel_models.lowering import Lowered
from umbel_models.onnx import indexing, linear, pointwise, reductions, shapes
from umbel_models.onnx.folding import written_where_made
from umbel_models.onnx.graph import HANDLERS, Writer, onnx_dtype
from umbel_models.onnx.loop import add_loop
from umbel_models.translation import attribute_of, translated, writes_in_place

OPSET: Final = 20
IR_VERSION: Final = 10
FAMILIES: Final = (indexing, linear, pointwise, reductions, shapes)
"""Importing a family registers its operators."""

External = Mapping[str, tuple[int, int]]
"""Weight name -> offset and length of its bytes in the weights file."""


def external_weights(weights: Weights) -> External:
    """Where each weight's bytes lie in its safetensors file; the same for every version of an architecture."""
    data = weights.to_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: (8 + length + begin, end - begin) for name, (begin, end) in sorted(spans.items())}


def export(lowered: Lowered, weights: External) -> bytes:
    """Translate a lowered signature.

    Args:
        lowered: what `lower` gave.
        weights: where the weights lie that the signature takes as constants.

    Raises:
        OperatorNotSupported: an operator has no translation.
        CannotCompile: the translation pinned the batch size.
    """
    writer = Writer(_prefix_beside([*lowered.signature.inputs, *lowered.outputs]))
    inputs = _declare_inputs(lowered, writer)
    if lowered.each is not None:
        batch = [name for name in lowered.signature.inputs if name in lowered.signature.batched]
        sums = add_loop(writer, lowered.each, batch, _translate)
        writer.values |= {node: sums[value] for node, value in writer.values.items() if value in sums}
    for node in lowered.graph.graph.nodes:
        _translate(lowered, writer, node)
    outputs = _declare_outputs(lowered, writer)
    lowered.require_open_batch("translating to ONNX")
    names = {output.name for output in outputs}
    if lowered.signature.name == "train":
        writer.fold(names)
    nodes, constants = writer.used(names)
    nodes = written_where_made(nodes, names)
    nodes += _readers(lowered.signature.weights, nodes)
    external = [
        _external(name, lowered.signature.inputs[name], weights[name])
        for name in lowered.signature.inputs
        if name in lowered.signature.weights
    ]
    graph = helper.make_graph(nodes, lowered.signature.name, inputs, outputs, [*external, *constants])
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="umbel")
    return model.SerializeToString(deterministic=True)


def _prefix_beside(names: Sequence[str]) -> str:
    """What the names that a writer makes begin with, so that an author's input may be called `t1` too."""
    prefix = ""
    while any(re.match(rf"{prefix}[ct]\d", name) for name in names):
        prefix += "_"
    return prefix


def _declare_inputs(lowered: Lowered, writer: Writer) -> list[ValueInfoProto]:
    placeholders = [node for node in lowered.graph.graph.nodes if node.op == "placeholder"]
    declared = []
    for node, name in zip(placeholders, lowered.signature.inputs, strict=True):
        writer.values[node] = name
        writer.shapes[name] = [str(size) for size in node.meta["val"].shape]
        summed = lowered.each is not None and name in lowered.each.outputs
        if name not in lowered.signature.weights and not summed:
            declared.append(_value_info(name, node.meta["val"]))
    return declared


def _declare_outputs(lowered: Lowered, writer: Writer) -> list[ValueInfoProto]:
    (output,) = (node for node in lowered.graph.graph.nodes if node.op == "output")
    declared = []
    for value, name in zip(output.args[0], lowered.outputs, strict=True):
        if not isinstance(value, fx.Node):
            raise CannotCompile(f"{lowered.signature.name!r}: output {name!r} is the constant {value!r}")
        writer.nodes.append(helper.make_node("Identity", [writer.name(value)], [name], name=f"out_{name}"))
        declared.append(_value_info(name, value.meta["val"]))
    return declared


def _readers(weights: Collection[str], nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Nodes for weights that nothing reads here, as those of a branch for training: ONNX Runtime would drop them on
    opening the graph, and then refuse their values."""
    read = {name for node in nodes for name in node.input}
    return [helper.make_node("Identity", [name], [f"unread_{name}"]) for name in sorted(weights) if name not in read]


def _value_info(name: str, example: Tensor) -> ValueInfoProto:
    sizes = ["batch" if isinstance(size, torch.SymInt) else size for size in example.shape]
    return helper.make_tensor_value_info(name, onnx_dtype(example.dtype), sizes)


def _external(name: str, example: Tensor, span: tuple[int, int]) -> TensorProto:
    tensor = TensorProto(name=name, data_type=onnx_dtype(example.dtype), dims=list(example.shape))
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", WEIGHTS_FILE), ("offset", str(span[0])), ("length", str(span[1]))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _translate(lowered: Lowered, writer: Writer, node: fx.Node) -> None:
    if node.op == "get_attr":
        writer.values[node] = writer.constant(attribute_of(lowered.graph, str(node.target)))
    if node.op != "call_function":
        return
    value = writer.values[node] = translated(lowered, writer, node, HANDLERS)
    if isinstance(value, str) and isinstance(node.meta["val"], Tensor):
        writer.shapes[value] = [str(size) for size in node.meta["val"].shape]
    if writes_in_place(node):
        # From here on the written tensor is the new one.
        writer.values[node.args[0]] = value  # type: ignore[index]
