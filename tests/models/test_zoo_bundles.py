"""Each model of the zoo does as a bundle what it does in torch, and compiling again gives the same bundle."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from umbel.bundle import Bundle
from umbel.errors import NotFound
from umbel.runtime.onnx import OnnxRuntime
from umbel.self_check import verify_golden
from umbel_models.compile import compile_model
from umbel_models.spec import ModelSpec
from umbel_models.zoo import bundle_path, digits, features, flights, smartwatch

RUNTIMES = ("onnx", "litert")
PACKAGED: dict[str, Callable[[], ModelSpec]] = {
    "digits": digits.mlp,
    "flights": flights.spec,
    "smartwatch": smartwatch.spec,
}


def passes_the_gate(spec: ModelSpec, folder: Path) -> Bundle:
    compiled = compile_model(spec, folder, RUNTIMES)
    for parity in compiled.parity.values():
        assert parity.infer < 1e-5
        assert parity.evaluate < 1e-5
        assert parity.train_short < 1e-5
    return compiled.bundle


def test_a_zoo_model_passes_the_gate_far_within_its_tolerances(tmp_path: Path) -> None:
    passes_the_gate(digits.cnn(), tmp_path)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name != "digits" else name for name in PACKAGED]
)
def test_compiling_a_packaged_model_again_gives_the_same_graphs_and_numbers(name: str, tmp_path: Path) -> None:
    packaged = Bundle.open(bundle_path(name))
    again = passes_the_gate(PACKAGED[name](), tmp_path)
    for runtime, signature in itertools.product(RUNTIMES, ("infer", "evaluate", "train")):
        old, new = (bundle.graph_path(runtime, signature).read_bytes() for bundle in (packaged, again))
        assert new == old, (
            f"{signature} for {runtime} changed; compile the packaged bundle again and say so in the changelog"
        )
    assert again.weights() == packaged.weights()
    # Torch's own answers may differ in the last bit between processors.
    for name, expected in packaged.golden().outputs.items():
        np.testing.assert_allclose(again.golden().outputs[name], expected, atol=1e-5)


@pytest.mark.slow  # the quick tests compare with packaged bundles, which another process made
def test_the_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    """A net with convolutions, and no cache to take its graphs from."""
    script = "import torch; torch.set_num_threads(1); from umbel_models.cli import main; main()"
    arguments = ["build", "umbel_models.zoo.digits:cnn", "-o", str(tmp_path / "there"), "--runtime", "onnx,litert"]
    command = [sys.executable, "-c", script, *arguments]
    other = {"PYTHONHASHSEED": "7", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run(command, check=True, env={**os.environ, **other}, capture_output=True)
    compile_model(digits.cnn(), tmp_path / "here", RUNTIMES)
    here, there = (sorted((tmp_path / name).iterdir()) for name in ("here", "there"))
    assert [path.name for path in here] == [path.name for path in there]
    assert [path.read_bytes() for path in here] == [path.read_bytes() for path in there]


def test_the_packaged_bundle_answers_its_golden_examples_here() -> None:
    bundle = Bundle.open(bundle_path("smartwatch"))
    assert verify_golden(OnnxRuntime(), bundle) < 1e-5
    assert bundle.manifest.labels[0] == "pendulum"
    assert sum(array.size for array in bundle.weights().arrays.values()) == 12_391


def test_a_bundle_that_does_not_come_with_the_package_is_not_found() -> None:
    with pytest.raises(NotFound, match="smartwatch"):
        bundle_path("no-such-model")


def test_graphs_and_weights_travel_apart() -> None:
    bundle = Bundle.open(bundle_path("smartwatch"))
    for signature in ("infer", "evaluate", "train"):
        graph = bundle.graph_path("onnx", signature).read_bytes()
        for array in bundle.weights().arrays.values():
            if array.size > 64:
                assert array.tobytes() not in graph


def test_text_becomes_tokens_and_text_again() -> None:
    tokens = features.encode("Exit, pursued by a bear.\n\u00e9")
    assert tokens.dtype == np.int64
    assert features.UNKNOWN in tokens
    assert features.PADDING not in tokens
    assert tokens.max() < features.TOKENS
    padded = np.concatenate([tokens, np.zeros(3, np.int64)])
    assert features.decode(padded) == "Exit, pursued by a bear.\n?"
    assert len({*features.encode(features.CHARACTERS)}) == features.TOKENS - 2
