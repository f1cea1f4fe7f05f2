"""A base install, without torch and without the compiler, loads, answers with and trains every bundle of the zoo."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from umbel_models.compile import compile_model
from umbel_models.spec import ModelSpec
from umbel_models.zoo import BUNDLES, digits, residual, shakespeare, shakespeare_lstm

RUNTIMES = ("onnx", "litert")

DEVICE = """
import json, sys
from pathlib import Path

class Absent:
    names = {"torch", "onnx", "onnxscript", "tensorflow", "typer", "rich", "flwr", "umbel_models", "umbel_server"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} isn't part of a base install", name=name)

sys.meta_path.insert(0, Absent())

import numpy as np
from umbel.bundle import Bundle
from umbel.clock import SystemClock
from umbel.self_check import verify_golden
from umbel.plan import Plan
from umbel.runtime.named import runtime_named
from umbel_client.examples import Examples, Split
from umbel_client.trainer import Job, run

def target(spec, count):
    size = [count, *spec.shape[1:]]
    return (np.arange(np.prod(size)) % (2 if spec.dtype == "float32" else 7)).reshape(size).astype(spec.dtype)

told = {}
for folder in map(Path, sys.argv[1:]):
    bundle = Bundle.open(folder)
    inputs = bundle.golden().inputs
    count = len(next(iter(inputs.values())))
    given = Examples(inputs, {spec.name: target(spec, count) for spec in bundle.manifest.targets}, count)
    for name in sorted(bundle.manifest.graphs):
        runtime = runtime_named(name)
        plan = Plan(epochs=4, batch_size=4, seed=1)
        update = run(Job(plan, "learn", 1, "d"), bundle, Split(given, given), runtime, SystemClock())
        moved = bundle.shared_weights() + update.delta
        answers = runtime.infer(bundle, moved)(inputs)
        told[f"{bundle.manifest.model} {name}"] = [
            verify_golden(runtime, bundle) <= bundle.manifest.golden_tolerance,
            bool(update.delta.norm() > 0),
            all(np.isfinite(array).all() for array in answers.values()),
            update.metrics["examples"] > 0,
        ]
print(json.dumps(told))
"""


def on_a_device(folders: list[Path]) -> dict[str, Any]:
    command = [sys.executable, "-c", DEVICE, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_the_packaged_bundles_run_and_train_without_torch() -> None:
    told = on_a_device(sorted(path.parent for path in BUNDLES.glob("*/manifest.json")))
    assert set(told) == {
        f"{model} {runtime}" for model in ("digits-mlp", "flights", "smartwatch") for runtime in RUNTIMES
    }
    assert all(all(checks) for checks in told.values()), told


BUILT: dict[Callable[[], ModelSpec], tuple[str, ...]] = {
    digits.cnn: RUNTIMES,
    residual.spec: RUNTIMES,
    residual.batch_normed: ("onnx",),  # otherwise the one before it
    shakespeare.spec: RUNTIMES,
    shakespeare.adam: ("onnx",),
    shakespeare_lstm.spec: RUNTIMES,
}


@pytest.mark.slow
def test_the_other_models_of_the_zoo_pass_the_gate_and_train_without_torch(tmp_path: Path) -> None:
    for build, runtimes in BUILT.items():
        spec = build()
        for parity in compile_model(spec, tmp_path / spec.name, runtimes).parity.values():
            assert max(parity.infer, parity.evaluate, parity.train_short) < 1e-5, spec.name
    told = on_a_device(sorted(tmp_path.iterdir()))
    assert set(told) == {f"{build().name} {runtime}" for build, runtimes in BUILT.items() for runtime in runtimes}
    assert all(all(checks) for checks in told.values()), told
