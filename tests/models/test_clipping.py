"""Clipped by itself, no example moves a model further than its share; what the loop can't be right for is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import nn

from umbel.bundle import Bundle
from umbel.errors import CannotCompile, OperatorNotSupported
from umbel.runtime.onnx import OnnxRuntime
from umbel.weights import Weights
from umbel_models.accumulation import Accumulated
from umbel_models.compile import compile_model
from umbel_models.optimizers import SGD
from umbel_models.spec import ModelSpec
from umbel_models.trainable import LoRA
from umbel_models.zoo import digits


def spec_of(*layers: nn.Module, clip: float | None = 0.05) -> ModelSpec:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), *(layers or (nn.Tanh(),)), nn.Linear(8, 3))
    x, y = {"x": torch.randn(12, 6)}, {"y": torch.arange(12) % 3}
    return ModelSpec("clipped", module, F.cross_entropy, x, y, optimizer=SGD(1.0), clip_examples=clip)


@pytest.fixture(scope="module")
def clipped(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compile_model(spec_of(), tmp_path_factory.mktemp("clipped")).bundle


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compile_model(spec_of(clip=None), tmp_path_factory.mktemp("plain")).bundle


def moved(bundle: Bundle, x: NDArray[np.float32], **chosen: float) -> Weights:
    session = OnnxRuntime().train(bundle, bundle.weights(), chosen)
    session.step({"x": x}, {"y": np.arange(len(x)) % 3})
    return session.weights() - bundle.shared_weights()


def test_an_odd_example_moves_the_model_by_no_more_than_its_share(clipped: Bundle, plain: Bundle) -> None:
    usual = spec_of().inputs["x"][:8].numpy()
    odd = usual.copy()
    odd[3] *= 1000.0
    # Taking one example for another changes the sum by at most two clips; a step is the mean, at a rate of one.
    share = 2 * 0.05 / 8
    assert (
        0 < (moved(clipped, usual, example_clip=0.05) - moved(clipped, odd, example_clip=0.05)).norm() <= share * 1.001
    )
    assert (moved(plain, usual) - moved(plain, odd)).norm() > 10 * share


def test_a_limit_that_nothing_reaches_changes_nothing(clipped: Bundle, plain: Bundle) -> None:
    x = spec_of().inputs["x"].numpy()
    found, expected = moved(clipped, x, example_clip=1e6), moved(plain, x)
    for name, array in expected.arrays.items():
        np.testing.assert_allclose(found[name], array, atol=1e-6)


@pytest.mark.parametrize(
    "spec",
    [
        replace(digits.cnn(), clip_examples=0.1),
        replace(spec_of(), trainable=LoRA(2, ("2",))),
        replace(spec_of(), optimizer=Accumulated(SGD(0.1), 2)),
    ],
    ids=["convolutions and adam", "adapters", "accumulated"],
)
def test_clipping_by_example_is_that_of_a_plain_loop_in_torch(spec: ModelSpec, tmp_path: Path) -> None:
    compiled = compile_model(spec, tmp_path)
    assert compiled.parity["onnx"].train_short < 1e-5
    assert "example_clip" in compiled.bundle.manifest.hyperparameters


@pytest.mark.parametrize(
    ("spec", "runtime", "error", "match"),
    [
        (spec_of(nn.BatchNorm1d(8)), "onnx", CannotCompile, "statistics of the batch"),
        (spec_of(nn.Dropout(0.1)), "onnx", CannotCompile, "dropout, which would drop alike"),
        (spec_of(), "litert", OperatorNotSupported, "compile for onnx"),
    ],
)
def test_what_a_loop_over_examples_would_get_wrong_is_refused(
    spec: ModelSpec, runtime: str, error: type[CannotCompile], match: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match):
        compile_model(spec, tmp_path / "bundle", (runtime,))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_that_is_no_limit_is_refused(clip: float) -> None:
    with pytest.raises(CannotCompile, match="clip_examples"):
        spec_of(clip=clip)
