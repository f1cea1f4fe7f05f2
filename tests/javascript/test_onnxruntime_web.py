"""The same `train.onnx` fine-tunes in JavaScript (onnxruntime-web, wasm, under Node) and comes to the same numbers.

Node and npm are not among the project's own requirements, so the test is there only where they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tests.javascript.node import has_node
from umbel.bundle import Bundle
from umbel.runtime.onnx import OnnxRuntime
from umbel_models.zoo import bundle_path

HERE = Path(__file__).parent
STEPS, BATCH = 12, 6
TOLERANCE = 1e-5


def packages() -> Path:
    """The folder that holds the locked packages; installed once for each lock file, in the user's cache."""
    lock = hashlib.sha256((HERE / "package-lock.json").read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "umbel"
    folder = cache / f"javascript-{lock}"
    if not folder.exists():
        draft = cache / f"javascript-{lock}-{os.getpid()}"
        draft.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, draft)
        npm = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        subprocess.run(npm, cwd=draft, check=True, capture_output=True, timeout=300)
        try:
            draft.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(draft)
    return folder


def batches_of(bundle: Bundle) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Batches of different sizes, of the golden inputs; each example has a target that it keeps."""
    generator = np.random.default_rng(3)
    golden, made = bundle.golden().inputs, []
    for step in range(STEPS):
        rows = generator.integers(len(next(iter(golden.values()))), size=BATCH - step % 3)
        targets = {}
        for spec in bundle.manifest.targets:
            shape = (len(rows), *(length or 1 for length in spec.shape[1:]))
            targets[spec.name] = np.broadcast_to(rows.reshape([-1, *[1] * (len(shape) - 1)]) % 2, shape)
            targets[spec.name] = np.ascontiguousarray(targets[spec.name], spec.dtype)
        made.append(({name: array[rows] for name, array in golden.items()}, targets))
    return made


def run_javascript(bundle: Bundle, folder: Path, batches: list[tuple[dict[str, Any], dict[str, Any]]]) -> Any:
    tensors = {}
    for step, (inputs, targets) in enumerate(batches):
        tensors |= {f"input.{step}.{name}": array for name, array in inputs.items()}
        tensors |= {f"target.{step}.{name}": array for name, array in targets.items()}
    file = folder / "batches.safetensors"
    file.write_bytes(safetensors.numpy.save(tensors))
    modules = packages() / "node_modules"
    command = ["node", str(HERE / "train.mjs"), str(modules), str(bundle.paths["train.onnx"].parent), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def compare(name: str, folder: Path) -> None:
    bundle = Bundle.open(bundle_path(name))
    batches = batches_of(bundle)
    found = run_javascript(bundle, folder, batches)
    session = OnnxRuntime().train(bundle, bundle.weights())
    losses = [session.step(inputs, targets) for inputs, targets in batches]
    np.testing.assert_allclose(found["losses"], losses, atol=TOLERANCE)
    for key, array in {**session.weights().arrays, **session.slots().arrays}.items():
        np.testing.assert_allclose(found["state"][key], array.ravel(), atol=TOLERANCE, err_msg=key)
    answers = OnnxRuntime().infer(bundle, bundle.weights())(batches[0][0])
    for key, array in answers.items():
        np.testing.assert_allclose(found["answers"][key], array.ravel(), atol=TOLERANCE, err_msg=key)


if has_node():

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["digits", "flights", "smartwatch"])
    def test_training_in_javascript_comes_to_the_same_numbers(name: str, tmp_path: Path) -> None:
        compare(name, tmp_path)


def test_no_package_is_named_by_where_it_was_fetched_from() -> None:
    lock = json.loads((HERE / "package-lock.json").read_text())
    assert all("resolved" not in package for package in lock["packages"].values())
    assert lock["packages"]["node_modules/onnxruntime-web"]["version"] == "1.30.0"
