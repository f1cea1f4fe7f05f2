"""An operator for many clients at once comes to what it comes to for each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from umbel_simulations.cohort.batching_rules import CannotBatch
from umbel_simulations.cohort.vmap import over_clients

CLIENTS = 3
Array = NDArray[Any]
RNG = np.random.default_rng(0)


def node(operator: str, inputs: str, **attributes: Any) -> NodeProto:
    return helper.make_node(operator, inputs.split(","), ["out"], **attributes)


def f(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def i(high: int, *shape: int) -> Array:
    return RNG.integers(0, high, shape)


def fixed(*values: int) -> Array:
    return np.array(values, np.int64)


# What each client has of its own ("a", "b", "c"), what all share ("s", "t"), and numbers in the graph ("k", "l", "m").
CASES: dict[str, tuple[NodeProto, dict[str, Array]]] = {
    "numbers meet columns": (node("Add", "a,b"), {"a": f(2, 4), "b": f(4)}),
    "a number of each meets a table": (node("Mul", "a,s"), {"a": f(), "s": f(2, 4)}),
    "a column of each meets a cube for all": (node("Sub", "a,s"), {"a": f(4), "s": f(5, 2, 4)}),
    "a choice by each": (node("Where", "a,s,b"), {"a": f(2, 4) > 0, "s": f(1, 1), "b": f()}),
    "clipped": (node("Clip", "a,s,t"), {"a": f(2, 4), "s": np.float32(-0.5), "t": np.float32(0.5)}),
    "turned": (node("Transpose", "a", perm=[1, 2, 0]), {"a": f(2, 3, 4)}),
    "turned about": (node("Transpose", "a"), {"a": f(2, 3, 4)}),
    "matrices of each": (node("MatMul", "a,b"), {"a": f(2, 3), "b": f(3, 4)}),
    "a matrix for all behind": (node("MatMul", "a,s"), {"a": f(2, 3), "s": f(3, 4)}),
    "a matrix for all in front": (node("MatMul", "s,a"), {"a": f(3, 4), "s": f(2, 3)}),
    "many matrices and one": (node("MatMul", "a,b"), {"a": f(5, 2, 3), "b": f(3, 4)}),
    "one matrix and many for all": (node("MatMul", "a,s"), {"a": f(2, 3), "s": f(5, 3, 4)}),
    "a layer": (node("Gemm", "a,b,c"), {"a": f(2, 3), "b": f(3, 4), "c": f(4)}),
    "a layer of turned weights": (node("Gemm", "a,s,b", transB=1), {"a": f(2, 3), "s": f(4, 3), "b": f(4)}),
    "a descent": (node("Gemm", "a,b,c", alpha=-1.0, transA=1), {"a": f(5, 2), "b": f(5, 3), "c": f(2, 3)}),
    "a descent from what all share": (
        node("Gemm", "a,b,s", alpha=-1.0, transA=1),
        {"a": f(5, 2), "b": f(5, 3), "s": f(2, 3)},
    ),
    "a product as Gemm": (node("Gemm", "a,b", transA=1), {"a": f(5, 2), "b": f(5, 3)}),
    "a sum of all": (node("ReduceSum", "a", keepdims=0), {"a": f(2, 4)}),
    "a sum of all, kept": (node("ReduceSum", "a"), {"a": f(2, 4)}),
    "a mean along an axis": (node("ReduceMean", "a,k", keepdims=0), {"a": f(2, 4), "k": fixed(0)}),
    "a largest one along the last": (node("ReduceMax", "a,k"), {"a": f(2, 4), "k": fixed(-1)}),
    "shares along an axis": (node("LogSoftmax", "a", axis=0), {"a": f(2, 4)}),
    "shares along the last": (node("Softmax", "a"), {"a": f(2, 4)}),
    "joined with what all share": (node("Concat", "a,s", axis=0), {"a": f(2, 4), "s": f(3, 4)}),
    "joined with a number for all": (node("Concat", "a,s", axis=-1), {"a": f(4), "s": f(1)}),
    "picked in each row": (node("GatherElements", "a,b", axis=1), {"a": f(2, 4), "b": i(4, 2, 3)}),
    "picked by column, by default": (node("GatherElements", "a,b"), {"a": f(2, 4), "b": i(2, 1, 4)}),
    "picked in rows for all": (node("GatherElements", "s,a", axis=1), {"s": f(2, 4), "a": i(4, 2, 3)}),
    "put into each row": (
        node("ScatterElements", "a,b,c", axis=1, reduction="add"),
        {"a": f(2, 4), "b": i(4, 2, 1), "c": f(2, 1)},
    ),
    "rows at places for all": (node("Gather", "a,s", axis=1), {"a": f(2, 4), "s": i(4, 3)}),
    "rows of a table for all": (node("Gather", "s,a", axis=0), {"s": f(5, 4), "a": i(5, 2, 3)}),
    "rows of each one's table": (node("Gather", "a,b", axis=0), {"a": f(5, 4), "b": i(5, 2, 3)}),
    "added at places": (node("ScatterND", "a,b,c", reduction="add"), {"a": f(5, 4), "b": i(5, 6, 1), "c": f(6, 4)}),
    "added to zeros for all": (
        node("ScatterND", "s,a,b", reduction="add"),
        {"s": f(5, 4), "a": i(5, 6, 1), "b": f(6, 4)},
    ),
    "added at places of two numbers": (
        node("ScatterND", "a,b,c", reduction="add"),
        {"a": f(5, 5), "b": i(5, 6, 2), "c": f(6)},
    ),
    "spread out": (node("Expand", "a,k"), {"a": f(4), "k": fixed(2, 3, 4)}),
    "spread out along an axis of its own": (node("Expand", "a,k"), {"a": f(2, 1, 4), "k": fixed(3, 1)}),
    "another shape": (node("Reshape", "a,k"), {"a": f(2, 3, 4), "k": fixed(0, -1)}),
    "a part": (node("Slice", "a,k,l,m"), {"a": f(2, 5), "k": fixed(1), "l": fixed(4), "m": fixed(1)}),
    "a part from the end": (node("Slice", "a,k,l,m"), {"a": f(2, 5), "k": fixed(-2), "l": fixed(9), "m": fixed(-1)}),
    "an axis more": (node("Unsqueeze", "a,k"), {"a": f(2, 5), "k": fixed(1)}),
    "an axis more at the end": (node("Unsqueeze", "a,k"), {"a": f(2, 5), "k": fixed(-1)}),
    "an axis less": (node("Squeeze", "a,k"), {"a": f(1, 5), "k": fixed(0)}),
    "a norm": (node("LayerNormalization", "a,s,t"), {"a": f(2, 5), "s": f(5), "t": f(5)}),
    "a norm with scales of each": (node("LayerNormalization", "a,b,c"), {"a": f(3, 2, 5), "b": f(5), "c": f(5)}),
    "a norm with scales of each alone": (node("LayerNormalization", "a,b", axis=1), {"a": f(3, 2, 5), "b": f(2, 5)}),
    "a norm with offsets of each": (node("LayerNormalization", "a,s,b"), {"a": f(2, 5), "s": f(5), "b": f(5)}),
    "parts of unlike sizes": (node("Split", "a,k", axis=-1), {"a": f(2, 5), "k": fixed(5)}),
    "parts along the first": (node("Split", "a", num_outputs=1), {"a": f(2, 5)}),
    "padded": (node("Pad", "a,k,s"), {"a": f(2, 5), "k": fixed(0, 1, 2, 3), "s": np.float32(7)}),
    "an activation": (node("LeakyRelu", "a", alpha=0.2), {"a": f(2, 5)}),
    "whole numbers": (node("Cast", "a", to=TensorProto.INT64), {"a": f(2, 5) * 3}),
}


def of(name: str) -> str:
    """ "each" client's, "all" clients', or "known" in the graph."""
    return "each" if name in "abc" else "all" if name in "st" else "known"


def model_of(made: NodeProto, arrays: Mapping[str, Array]) -> Any:
    given = {name: np.asarray(array) for name, array in arrays.items()}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in given.items()
        if of(name) != "known"
    ]
    known = [numpy_helper.from_array(array, name) for name, array in given.items() if of(name) == "known"]
    graph = helper.make_graph([made], "one", inputs, [helper.make_tensor_value_info("out", 0, None)], known)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def run(nodes: list[NodeProto], given: Mapping[str, Array], known: list[TensorProto]) -> Array:
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in given.items()
    ]
    outputs = [helper.make_tensor_value_info("out", 0, None)]
    for output in outputs:
        output.ClearField("type")
    graph = helper.make_graph(nodes, "run", inputs, outputs, known)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    found: Array = ort.InferenceSession(model.SerializeToString()).run(["out"], dict(given))[0]
    return found


@pytest.mark.parametrize("name", CASES)
def test_each_rule_comes_to_what_the_operator_comes_to_for_each_client(name: str) -> None:
    made, arrays = CASES[name]
    model = model_of(made, arrays)
    each = {
        name: np.stack([np.roll(array, turn) for turn in range(CLIENTS)])
        for name, array in arrays.items()
        if of(name) == "each"
    }
    shared = {name: np.asarray(array) for name, array in arrays.items() if of(name) == "all"}
    known = list(model.graph.initializer)
    batched = over_clients(model, each, ["out"], "a")
    found = run(batched.nodes, {**each, **shared}, [*known, *batched.constants.values()])
    for client in range(CLIENTS):
        own = {name: np.asarray(array[client]) for name, array in each.items()}
        wanted = run([made], {**own, **shared}, known)
        assert found[client].dtype == wanted.dtype
        np.testing.assert_allclose(found[client], wanted, rtol=1e-6, atol=1e-6)


REFUSED: dict[str, tuple[NodeProto, dict[str, Array]]] = {
    "no rule": (node("CumSum", "a,k"), {"a": f(2, 4), "k": fixed(0)[0]}),
    "a vector": (node("MatMul", "a,b"), {"a": f(2, 3), "b": f(3)}),
    "a Gemm with a beta": (node("Gemm", "a,b,c", beta=0.5), {"a": f(2, 3), "b": f(3, 4), "c": f(4)}),
    "a Gemm with an alpha": (node("Gemm", "a,b,c", alpha=0.5), {"a": f(2, 3), "b": f(3, 4), "c": f(4)}),
    "a negative Gemm of nothing": (node("Gemm", "a,b", alpha=-1.0), {"a": f(2, 3), "b": f(3, 4)}),
    "bounds of each": (node("Clip", "a,b"), {"a": f(2, 4), "b": f()}),
    "axes that are reckoned": (node("ReduceSum", "a,s"), {"a": f(2, 4), "s": fixed(0)}),
    "a sum over no axis": (node("ReduceSum", "a,k", noop_with_empty_axes=1), {"a": f(2, 4), "k": fixed()}),
    "a sum of nothing": (node("ReduceSum", "a", noop_with_empty_axes=1), {"a": f(2, 4)}),
    "spread out by each": (node("Expand", "s,a"), {"s": f(2, 4), "a": fixed(3, 2, 4)}),
    "a shape of each": (node("Reshape", "s,a"), {"s": f(2, 4), "a": fixed(4, 2)}),
    "a shape with a real zero": (node("Reshape", "a,k", allowzero=1), {"a": f(2, 4), "k": fixed(4, 2)}),
    "whatever has one row": (node("Squeeze", "a"), {"a": f(1, 4)}),
    "a Slice of all axes": (node("Slice", "a,k,l"), {"a": f(2, 4), "k": fixed(0), "l": fixed(1)}),
    "columns at places of each": (node("Gather", "s,a", axis=1), {"s": f(2, 4), "a": i(4, 3)}),
    "padded along some axes": (
        node("Pad", "a,k,s,l"),
        {"a": f(2, 5), "k": fixed(1, 3), "s": np.float32(7), "l": fixed(1)},
    ),
    "padded as is reckoned": (node("Pad", "a,s"), {"a": f(2, 5), "s": fixed(0, 1, 2, 3)}),
    "the same for all": (node("Relu", "s"), {"s": f(2, 4), "a": f(1)}),
    "a part of a shape": (node("Shape", "a", start=1), {"a": f(2, 4)}),
    "another domain": (helper.make_node("Gelu", ["a"], ["out"], domain="com.microsoft"), {"a": f(2, 4)}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused(name: str) -> None:
    made, arrays = REFUSED[name]
    with pytest.raises(CannotBatch):
        over_clients(model_of(made, arrays), {name for name in arrays if of(name) == "each"}, ["out"], "a")


def test_parts_are_those_of_one_client() -> None:
    parts = helper.make_node("Split", ["a", "k"], ["left", "out"], axis=1)
    model = model_of(parts, {"a": f(2, 5), "k": fixed(2, 3)})
    batched = over_clients(model, {"a"}, ["left", "out"], "a")
    given = f(CLIENTS, 2, 5)
    found = run(batched.nodes, {"a": given}, [*model.graph.initializer, *batched.constants.values()])
    np.testing.assert_array_equal(found, given[:, :, 2:])


@pytest.mark.parametrize(("operator", "wanted"), [("Shape", [2, 4]), ("Size", 8)])
def test_sizes_are_those_of_one_client_and_the_same_for_all(operator: str, wanted: object) -> None:
    model = model_of(node(operator, "a"), {"a": f(2, 4)})
    model.graph.node.append(helper.make_node("Relu", ["a"], ["end"]))
    batched = over_clients(model, {"a"}, ["end"], "a")
    found = run(batched.nodes, {"a": f(CLIENTS, 2, 4)}, list(batched.constants.values()))
    assert found.tolist() == wanted
    with pytest.raises(CannotBatch, match="same for all"):
        over_clients(model, {"a"}, ["out"], "a")


def test_a_branch_that_captures_what_is_a_clients_is_refused() -> None:
    inner = helper.make_graph(
        [helper.make_node("Relu", ["a"], ["inner"])], "then", [], [helper.make_tensor_value_info("inner", 1, None)]
    )
    made = helper.make_node("If", ["s"], ["out"], then_branch=inner, else_branch=inner)
    model = model_of(made, {"s": np.array(True), "a": f(2, 4)})
    model.graph.node.append(helper.make_node("Relu", ["a"], ["end"]))
    with pytest.raises(CannotBatch, match="no rule for If"):
        over_clients(model, {"a"}, ["end"], "a")
