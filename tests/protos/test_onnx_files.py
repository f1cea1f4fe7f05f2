"""A graph reads no file of the machine that it runs on, wherever in it the tensor stands that would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.protos.watch import WATCH
from umbel.bundle import Bundle, file_refs
from umbel.errors import RuntimeFailure
from umbel.runtime.onnx import OnnxRuntime
from umbel.runtime.onnx_files import require_no_files
from umbel_models.zoo import bundle_path

FLOATS = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in ("x", "y")]


def outside(location: str, name: str = "stolen") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def _graph(*nodes: onnx.NodeProto, **parts: list[TensorProto]) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "g", FLOATS[:1], FLOATS[1:], **parts)


def initialiser(tensor: TensorProto) -> onnx.GraphProto:
    return _graph(helper.make_node("Add", ["x", tensor.name], ["y"]), initializer=[tensor])


def constant(tensor: TensorProto) -> onnx.GraphProto:
    nodes = helper.make_node("Constant", [], ["c"], value=tensor), helper.make_node("Add", ["x", "c"], ["y"])
    return _graph(*nodes)


def branch(tensor: TensorProto) -> onnx.GraphProto:
    """One that golden examples never enter."""
    names = [helper.make_tensor_value_info("b", TensorProto.FLOAT, [None])]
    inner = helper.make_graph([helper.make_node("Add", ["x", tensor.name], ["b"])], "then", [], names, [tensor])
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["b"])], "else", [], names)
    never = helper.make_tensor("never", TensorProto.BOOL, [], [False])
    return _graph(helper.make_node("If", ["never"], ["y"], then_branch=inner, else_branch=other), initializer=[never])


def sparse(tensor: TensorProto) -> onnx.GraphProto:
    graph = _graph(helper.make_node("Identity", ["x"], ["y"]))
    graph.sparse_initializer.add(values=tensor, dims=[4])
    return graph


def model(graph: onnx.GraphProto) -> bytes:
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(made.SerializeToString())


def function(tensor: TensorProto) -> bytes:
    made = onnx.ModelProto()
    made.ParseFromString(model(_graph(helper.make_node("Steal", ["x"], ["y"], domain="own"))))
    nodes = [helper.make_node("Constant", [], ["c"], value=tensor), helper.make_node("Add", ["x", "c"], ["y"])]
    made.functions.append(helper.make_function("own", "Steal", ["x"], ["y"], nodes, made.opset_import))
    return bytes(made.SerializeToString())


PLACES: list[Callable[[TensorProto], bytes]] = [
    *((lambda tensor, place=place: model(place(tensor))) for place in (initialiser, constant, branch, sparse)),
    function,
]


@pytest.mark.parametrize("name", ["stolen", "p_head.bias"])
@pytest.mark.parametrize("place", range(len(PLACES)), ids=["initialiser", "constant", "branch", "sparse", "function"])
@pytest.mark.parametrize(
    "location", ["beside", "../personal/weights", "/etc/passwd", "*/_ORT_MEM_ADDR_/*", "weights.safetensors"]
)
def test_a_graph_that_would_read_a_file_is_refused(location: str, place: int, name: str) -> None:
    graph = PLACES[place](outside(location, name))
    if place == 0 and name == "p_head.bias":
        require_no_files(graph, {name})  # bound from memory, so that the file isn't read
    else:
        with pytest.raises(RuntimeFailure, match="from a file"):
            require_no_files(graph, {"p_head.bias"})


def test_words_that_look_like_it_are_no_reason() -> None:
    plain = helper.make_tensor("geolocation", TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
    for place in (initialiser, constant, branch):
        require_no_files(model(place(plain)), set())


@pytest.mark.parametrize("signature", ["infer", "evaluate", "train"])
def test_a_runtime_opens_no_graph_that_would_read_the_shelf(signature: str, tmp_path: Path) -> None:
    (tmp_path / "beside").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    hostile = tmp_path / "graph"
    hostile.write_bytes(model(initialiser(outside("beside"))))
    name = WATCH.manifest.graphs["onnx"][signature]
    manifest = replace(WATCH.manifest, files=WATCH.manifest.files | file_refs({name: hostile.read_bytes()}))
    bundle = Bundle(manifest, {**WATCH.paths, name: hostile})
    with pytest.raises(RuntimeFailure, match="from a file"):
        getattr(OnnxRuntime(), signature)(bundle, bundle.shared_weights())


@pytest.mark.parametrize("broken", [b"location\xff\xff", b"\x3a\x0alocation", b"\x3a\xff\xff\xff\xff\x7flocation"])
def test_what_cannot_be_looked_through_is_not_run(broken: bytes) -> None:
    with pytest.raises(RuntimeFailure):
        require_no_files(broken, set())


def test_a_graph_nested_without_end_is_refused() -> None:
    nested = b"\x08\x01location"
    for _ in range(2000):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # a graph in an attribute, that in a node, that in a graph
            nested = tag + _varint(len(nested)) + nested
    with pytest.raises(RuntimeFailure):
        require_no_files(b"\x3a" + _varint(len(nested)) + nested, set())


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@pytest.mark.parametrize("name", ["digits", "flights", "smartwatch"])
def test_the_packaged_bundles_read_none(name: str) -> None:
    bundle = Bundle.open(bundle_path(name))
    for signature in ("infer", "evaluate", "train"):
        require_no_files(bundle.graph_path("onnx", signature).read_bytes(), bundle.manifest.weight_shapes)
