"""A lowered signature as the bytes of a LiteRT file."""

from __future__ import annotations

from typing import Final

from torch import fx

from umbel.errors import CannotCompile
from umbel_models.litert import convolution, linear, pointwise, reductions, shapes
from umbel_models.litert.flatbuffer import Part, pack
from umbel_models.litert.graph import HANDLERS, Writer, dtype_of, shape_of
from umbel_models.litert.loop import add_loop
from umbel_models.lowering import Lowered
from umbel_models.onnx.graph import HANDLERS as ONNX_HANDLERS
from umbel_models.translation import attribute_of, handler_of, translated, writes_in_place

FAMILIES: Final = (convolution, linear, pointwise, reductions, shapes)
"""Importing a family registers its operators."""


def export(lowered: Lowered) -> bytes:
    """Translate a lowered signature; weights are inputs, also of `infer`, where the runtime binds them.

    Raises:
        OperatorNotSupported: an operator has no translation.
        CannotCompile: the translation pinned the batch size.
    """
    writer = Writer(has_constant_weights=lowered.signature.name == "infer")
    inputs: dict[str, int] = {}
    sums = {} if lowered.each is None else dict.fromkeys(lowered.each.outputs, -1)
    placeholders = [node for node in lowered.graph.graph.nodes if node.op == "placeholder"]
    named = list(zip(placeholders, lowered.signature.inputs, strict=True))
    for node, name in named:
        if name not in sums:
            writer.values[node] = inputs[name] = writer.tensor(shape_of(node), dtype_of(node))
    parts: tuple[Part, ...] = ()
    if lowered.each is not None:
        batch = [name for name in inputs if name in lowered.signature.batched]
        sums, parts = add_loop(writer, inputs, lowered.each, batch, _translate)
        writer.values |= {node: sums[name] for node, name in named if name in sums}
    for node in lowered.graph.graph.nodes:
        _translate(lowered, writer, node)
    outputs = _outputs(lowered, writer, set(inputs.values()))
    lowered.require_open_batch("translating to LiteRT")
    return pack(Part(lowered.signature.name, writer, inputs, outputs), *parts)


def _outputs(lowered: Lowered, writer: Writer, taken: set[int]) -> dict[str, int]:
    (output,) = (node for node in lowered.graph.graph.nodes if node.op == "output")
    outputs: dict[str, int] = {}
    for value, name in zip(output.args[0], lowered.outputs, strict=True):
        if not isinstance(value, fx.Node):
            raise CannotCompile(f"{lowered.signature.name!r}: output {name!r} is the constant {value!r}")
        number = writer.number(value)
        if number in taken or writer.tensors[number].data is not None:
            # An output must be a tensor of its own; this one is an input, a constant or another output.
            number = writer.op(
                "RESHAPE", [number, _own_shape(writer, value)], shape_of(value), dtype_of(value), name=name
            )
        taken.add(number)
        outputs[name] = number
    return outputs


def _own_shape(writer: Writer, value: fx.Node) -> int:
    return writer.ints(*(-1 if not isinstance(size, int) else size for size in shape_of(value)))


def _translate(lowered: Lowered, writer: Writer, node: fx.Node) -> None:
    if node.op == "get_attr":
        writer.values[node] = writer.constant(attribute_of(lowered.graph, str(node.target)))
    if node.op != "call_function":
        return
    hint = ", or try ONNX Runtime alone" if handler_of(node, ONNX_HANDLERS) else ""
    value = writer.values[node] = translated(lowered, writer, node, HANDLERS, " to LiteRT", hint)
    if writes_in_place(node):
        # From here on the written tensor is the new one.
        writer.values[node.args[0]] = value  # type: ignore[index]
