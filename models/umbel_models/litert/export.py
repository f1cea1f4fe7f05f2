"""A lowered signature as the bytes of a LiteRT file."""

from __future__ import annotations

from typing import Any, Final

from torch import fx

from umbel.errors import CannotCompile, OperatorNotSupported
from umbel_models.litert import convolution, linear, pointwise, reductions, shapes
from umbel_models.litert.flatbuffer import Part, pack
from umbel_models.litert.graph import HANDLERS, Writer, dtype_of, shape_of
from umbel_models.litert.loop import add_loop
from umbel_models.lowering import Lowered, module_of, require_no_write_through
from umbel_models.onnx.graph import HANDLERS as ONNX_HANDLERS
from umbel_models.translation import attribute_of, in_words, instead_of, not_in_place, writes_in_place

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


def _or_onnx(node: fx.Node) -> str:
    translated = node.target in ONNX_HANDLERS or not_in_place(node.target) in ONNX_HANDLERS
    return ", or try ONNX Runtime alone" if translated else ""


def _translate(lowered: Lowered, writer: Writer, node: fx.Node) -> None:
    if node.op == "get_attr":
        writer.values[node] = writer.constant(attribute_of(lowered.graph, str(node.target)))
    if node.op != "call_function":
        return
    handler = HANDLERS.get(node.target) or HANDLERS.get(not_in_place(node.target))
    if handler is None:
        raise OperatorNotSupported(
            f"{lowered.signature.name!r}: no translation to LiteRT for {node.target} {module_of(node)}; "
            f"write that part with {instead_of(node)}{_or_onnx(node)}"
        )
    try:
        if writes_in_place(node):
            require_no_write_through(node)
        value: Any = handler(writer, node, *node.args, **node.kwargs)
    except (TypeError, OperatorNotSupported) as error:
        raise OperatorNotSupported(
            f"{lowered.signature.name!r}: {node.target} {module_of(node)} is used in a way that has no translation to "
            f"LiteRT: {in_words(error, node)}"
        ) from error
    writer.values[node] = value
    if writes_in_place(node):
        # From here on the written tensor is the new one.
        writer.values[node.args[0]] = value  # type: ignore[index]
