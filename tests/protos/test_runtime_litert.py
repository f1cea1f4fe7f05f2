"""What is particular to LiteRT: weights as constants, builtin operators only."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flatbuffers
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


def test_threads_that_ask_at_once_get_their_own_answers() -> None:
    session = LiteRTRuntime().infer(WATCH, WATCH.shared_weights())
    asked = [batch(size)[0] for size in (1, 2, 3, 4) * 25]
    expected = [session(inputs) for inputs in asked]
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(session, asked))
    finally:
        sys.setswitchinterval(usual)
    for mine, alone in zip(found, expected, strict=True):
        for name in alone:
            np.testing.assert_array_equal(mine[name], alone[name])


def test_a_damaged_graph_is_a_runtime_failure(tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"not a graph")
    spoilt = Bundle(
        WATCH.manifest, {**WATCH.paths, "train.tflite": tmp_path / "junk", "infer.tflite": tmp_path / "junk"}
    )
    with pytest.raises(RuntimeFailure, match="'train'"):
        LiteRTRuntime().train(spoilt, WATCH.shared_weights())
    with pytest.raises(RuntimeFailure, match="'infer'"):
        LiteRTRuntime().infer(spoilt, WATCH.shared_weights())


def test_a_graph_that_contradicts_itself_or_the_manifest_is_a_runtime_failure(tmp_path: Path) -> None:
    for signature, spoil in (("infer", _reads_what_is_not_there), ("infer", _renamed), ("evaluate", _renamed)):
        model = schema.ModelT.InitFromPackedBuf(WATCH.graph_path("litert", signature).read_bytes(), 0)
        spoil(model)
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        (tmp_path / "spoilt").write_bytes(bytes(builder.Output()))
        spoilt = Bundle(WATCH.manifest, {**WATCH.paths, f"{signature}.tflite": tmp_path / "spoilt"})
        inputs, targets = batch(2)
        with pytest.raises(RuntimeFailure, match="graph"):
            if signature == "infer":
                LiteRTRuntime().infer(spoilt, WATCH.shared_weights())(inputs)
            else:
                LiteRTRuntime().evaluate(spoilt, WATCH.shared_weights())(inputs, targets)


def _reads_what_is_not_there(model: Any) -> None:
    operator = model.subgraphs[0].operators[0]
    operator.inputs = [10_000, *operator.inputs[1:]]


def _renamed(model: Any) -> None:
    model.signatureDefs[0].outputs[0].name = b"another"
    model.subgraphs[0].tensors[model.signatureDefs[0].outputs[0].tensorIndex].name = b"another"


def test_a_runtime_without_threads_is_out_of_bounds() -> None:
    with pytest.raises(OutOfBounds):
        LiteRTRuntime(threads=0)


def test_a_class_that_is_not_there_is_refused_when_judging() -> None:
    inputs, _ = batch(2)
    with pytest.raises(RuntimeFailure):
        LiteRTRuntime().evaluate(WATCH, WATCH.shared_weights())(inputs, {"y": np.array([0, 99])})
