"""What is particular to ONNX Runtime, and to the weight of a device's process."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.crossing import crossed
from tests.protos.watch import WATCH
from umbel.errors import OutOfBounds
from umbel.runtime import onnx
from umbel.runtime.onnx import OnnxRuntime

START = WATCH.shared_weights()


def test_stock_onnxruntime_runs_the_infer_graph_where_it_lies() -> None:
    session = onnxruntime.InferenceSession(str(WATCH.graph_path("onnx", "infer")), providers=["CPUExecutionProvider"])
    golden = WATCH.golden()
    (logits,) = session.run(None, dict(golden.inputs))
    np.testing.assert_allclose(logits, golden.outputs["logits"], atol=1e-5)


def test_a_native_session_serves_every_round_and_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    native = onnxruntime.InferenceSession

    def counting(*args: Any, **kwargs: Any) -> onnxruntime.InferenceSession:
        made.append(args[0])
        return native(*args, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", counting)
    runtime = OnnxRuntime(keep=1)
    for _ in range(3):
        runtime.train(WATCH, START)
    assert len(made) == 1
    runtime.evaluate(WATCH, START)
    runtime.train(WATCH, START)
    assert len(made) == 3


def test_two_threads_that_need_a_session_at_once_share_one() -> None:
    runtime = OnnxRuntime()
    begin = functools.partial(runtime.evaluate, WATCH, START)
    one, other = crossed(runtime, onnx, "_Native", begin, begin)
    assert one._native is other.result()._native


def test_nothing_of_a_large_model_is_kept_when_its_session_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umbel.runtime.onnx._SMALL", 0)
    runtime = OnnxRuntime()
    for begin in (runtime.train, runtime.evaluate):
        session = begin(WATCH, START)
        native = weakref.ref(session._native)
        del session
        assert native() is None


@pytest.mark.parametrize("settings", [{"threads": 0}, {"keep": 0}])
def test_a_runtime_without_threads_or_memory_is_out_of_bounds(settings: dict[str, int]) -> None:
    with pytest.raises(OutOfBounds):
        OnnxRuntime(**settings)


DEVICE = """
import sys
import numpy as np
from umbel.bundle import Bundle
from umbel.runtime import onnx
from umbel.runtime.onnx import OnnxRuntime
from umbel_models.zoo import bundle_path

bundle = Bundle.open(bundle_path("smartwatch"))
session = OnnxRuntime().train(bundle, bundle.weights())
inputs = {"x": np.ones((4, 6, 100), np.float32)}
session.step(inputs, {"y": np.array([0, 1, 2, 3])})
OnnxRuntime().infer(bundle, session.weights())(inputs)
heavy = {"torch", "onnx", "tensorflow", "flwr", "typer"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def test_a_device_trains_without_torch_or_onnx_in_its_process_and_onnx_runtime_reports_to_nobody(
    tmp_path: Path,
) -> None:
    """Its telemetry begins with files in the user's cache, where none of these variables holds it back."""
    quiet = {"ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "CI", "XDG_CACHE_HOME"}
    alone = {name: value for name, value in os.environ.items() if name not in quiet} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", DEVICE], env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_whoever_runs_no_graph_loads_no_runtime() -> None:
    script = "import sys, umbel.bundle, umbel.messages, umbel.runtime; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
