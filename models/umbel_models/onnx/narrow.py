"""An `infer` graph in fewer bits: the same file format and inputs, dense layers in int8 or float16.

The graph still takes float32 weights, and turns them into fewer bits itself. That hangs on constants alone, so ONNX
Runtime works it out once, when it opens the graph with a version's weights: one quantised graph serves every version
of an architecture, and the weights that travel stay as they are.

int8 is dynamic: activations get their range from each batch, weights one scale for each column. Seven bits of the
weights are used, since processors without VNNI add two products in 16 bits (255 * 63 * 2 just fits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from umbel.manifest import WEIGHTS_FILE

LEVELS: Final = 63.0
KINDS: Final = ("int8", "float16")


def narrowed(graph: bytes, kind: str) -> tuple[bytes, int]:
    """The graph with its dense layers in fewer bits, and how many those are.

    Args:
        graph: an ONNX file whose weights are external constants.
        kind: one of `KINDS`.
    """
    model = onnx.load_from_string(graph)
    weights = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer if _is_weight(tensor)}
    turned = {node.output[0]: node.input[0] for node in model.graph.node if _turns_weight(node, weights)}
    form = {"int8": _in_int8, "float16": _in_float16}[kind]
    nodes: list[NodeProto] = []
    count = 0
    for node in model.graph.node:
        if _is_dense(node, weights, turned):
            nodes += form(node, f"narrow{count}_")
            count += 1
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(_constants() if count else [])
    return model.SerializeToString(deterministic=True), count


def _is_weight(tensor: TensorProto) -> bool:
    external = {entry.key: entry.value for entry in tensor.external_data}
    return external.get("location") == WEIGHTS_FILE and len(tensor.dims) == 2


def _turns_weight(node: NodeProto, weights: dict[str, list[int]]) -> bool:
    return node.op_type == "Transpose" and node.input[0] in weights


def _is_dense(node: NodeProto, weights: dict[str, list[int]], turned: dict[str, str]) -> bool:
    plain = all(attribute.f == 1.0 for attribute in node.attribute if attribute.name in ("alpha", "beta"))
    return node.op_type in ("Gemm", "MatMul") and plain and (node.input[1] in weights or node.input[1] in turned)


def _constants() -> list[TensorProto]:
    values = {
        "levels": np.float32(LEVELS),
        "least": np.float32(1e-20),
        "rows": np.array([0], np.int64),
    }
    return [numpy_helper.from_array(np.asarray(value), f"narrow_{name}") for name, value in values.items()]


def _in_int8(node: NodeProto, prefix: str) -> Iterator[NodeProto]:
    add = _adder(prefix)
    weight = node.input[1]
    yield add("Abs", [weight], "size")
    yield add("ReduceMax", [prefix + "size", "narrow_rows"], "largest", keepdims=1)
    yield add("Div", [prefix + "largest", "narrow_levels"], "step")
    yield add("Max", [prefix + "step", "narrow_least"], "scale")
    yield add("Div", [weight, prefix + "scale"], "levels")
    yield add("Round", [prefix + "levels"], "whole")
    yield add("Cast", [prefix + "whole"], "weight", to=TensorProto.INT8)
    yield helper.make_node(
        "DynamicQuantizeLinear", [node.input[0]], [prefix + "x", prefix + "x_scale", prefix + "x_zero"]
    )
    yield add("MatMulInteger", [prefix + "x", prefix + "weight", prefix + "x_zero"], "product")
    yield add("Cast", [prefix + "product"], "sum", to=TensorProto.FLOAT)
    yield add("Mul", [prefix + "x_scale", prefix + "scale"], "both")
    yield from _with_bias(node, prefix, add("Mul", [prefix + "sum", prefix + "both"], "y"))


def _in_float16(node: NodeProto, prefix: str) -> Iterator[NodeProto]:
    add = _adder(prefix)
    yield add("Cast", [node.input[0]], "x", to=TensorProto.FLOAT16)
    yield add("Cast", [node.input[1]], "weight", to=TensorProto.FLOAT16)
    yield add("MatMul", [prefix + "x", prefix + "weight"], "product")
    yield from _with_bias(node, prefix, add("Cast", [prefix + "product"], "y", to=TensorProto.FLOAT))


def _adder(prefix: str) -> Callable[..., NodeProto]:
    def add(kind: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
        return helper.make_node(kind, inputs, [prefix + output], **attributes)

    return add


def _with_bias(node: NodeProto, prefix: str, last: NodeProto) -> Iterator[NodeProto]:
    """The last node of a product, and the bias where there is one, under the old node's name."""
    if len(node.input) < 3:
        last.output[0] = node.output[0]
        yield last
        return
    yield last
    yield helper.make_node("Add", [prefix + "y", node.input[2]], list(node.output))
