"""What is particular to LiteRT: weights as constants, builtin operators only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from tests.protos.watch import WATCH, batch
from umbel.bundle import Bundle
from umbel.errors import OutOfBounds, RuntimeFailure
from umbel.runtime.binding import bind_constants
from umbel.runtime.litert import LiteRTRuntime
from umbel.runtime.signature import bind_weights


@pytest.mark.parametrize("signature", ["infer", "evaluate", "train"])
def test_a_stock_interpreter_runs_each_signature_by_its_name(signature: str) -> None:
    native = Interpreter(model_path=str(WATCH.graph_path("litert", signature)))
    assert list(native.get_signature_list()) == [signature]


@pytest.mark.parametrize("signature", ["infer", "evaluate", "train"])
def test_graphs_hold_builtin_operators_only(signature: str) -> None:
    model = schema.ModelT.InitFromPackedBuf(WATCH.graph_path("litert", signature).read_bytes(), 0)
    codes = {code.builtinCode for code in model.operatorCodes}
    assert schema.BuiltinOperator.CUSTOM not in codes
    assert len(codes) > 5


def test_binding_leaves_only_the_inputs_open_and_works_out_what_it_can() -> None:
    graph = WATCH.graph_path("litert", "infer").read_bytes()
    weights = bind_weights(WATCH, WATCH.shared_weights())
    bound = schema.ModelT.InitFromPackedBuf(bind_constants(graph, weights), 0)
    before = schema.ModelT.InitFromPackedBuf(graph, 0)
    assert [entry.name for entry in bound.signatureDefs[0].inputs] == [b"x"]
    assert len(bound.subgraphs[0].operators) < len(before.subgraphs[0].operators)


def test_a_damaged_graph_is_a_runtime_failure(tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"not a graph")
    spoilt = Bundle(
        WATCH.manifest, {**WATCH.paths, "train.tflite": tmp_path / "junk", "infer.tflite": tmp_path / "junk"}
    )
    with pytest.raises(RuntimeFailure, match="'train'"):
        LiteRTRuntime().train(spoilt, WATCH.shared_weights())
    with pytest.raises(RuntimeFailure, match="'infer'"):
        LiteRTRuntime().infer(spoilt, WATCH.shared_weights())


def test_a_runtime_without_threads_is_out_of_bounds() -> None:
    with pytest.raises(OutOfBounds):
        LiteRTRuntime(threads=0)


def test_a_class_that_is_not_there_is_refused_when_judging() -> None:
    inputs, _ = batch(2)
    with pytest.raises(RuntimeFailure):
        LiteRTRuntime().evaluate(WATCH, WATCH.shared_weights())(inputs, {"y": np.array([0, 99])})
