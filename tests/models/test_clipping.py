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
from umbel.errors import CannotCompile
from umbel.runtime.named import runtime_named
from umbel.weights import Weights
from umbel_models.accumulation import Accumulated
from umbel_models.compile import compile_model
from umbel_models.losses import token_correct, token_count, token_cross_entropy
from umbel_models.optimizers import SGD
from umbel_models.spec import ModelSpec
from umbel_models.trainable import LoRA
from umbel_models.zoo import digits

RUNTIMES = ("onnx", "litert")


def spec_of(*layers: nn.Module, clip: float | None = 0.05) -> ModelSpec:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), *(layers or (nn.Tanh(),)), nn.Linear(8, 3))
    x, y = {"x": torch.randn(12, 6)}, {"y": torch.arange(12) % 3}
    return ModelSpec("clipped", module, F.cross_entropy, x, y, optimizer=SGD(1.0), clip_examples=clip)


@pytest.fixture(scope="module")
def clipped(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compile_model(spec_of(), tmp_path_factory.mktemp("clipped"), RUNTIMES).bundle


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compile_model(spec_of(clip=None), tmp_path_factory.mktemp("plain"), RUNTIMES).bundle


def moved(runtime: str, bundle: Bundle, x: NDArray[np.float32], **chosen: float) -> Weights:
    session = runtime_named(runtime).train(bundle, bundle.weights(), chosen)
    session.step({"x": x}, {"y": np.arange(len(x)) % 3})
    return session.weights() - bundle.shared_weights()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_odd_example_moves_the_model_by_no_more_than_its_share(clipped: Bundle, plain: Bundle, runtime: str) -> None:
    usual = spec_of().inputs["x"][:8].numpy()
    odd = usual.copy()
    odd[3] *= 1000.0
    # Taking one example for another changes the sum by at most two clips; a step is the mean, at a rate of one.
    share = 2 * 0.05 / 8
    one, other = (moved(runtime, clipped, x, example_clip=0.05) for x in (usual, odd))
    assert 0 < (one - other).norm() <= share * 1.001
    assert (moved(runtime, plain, usual) - moved(runtime, plain, odd)).norm() > 10 * share


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_limit_that_nothing_reaches_changes_nothing(clipped: Bundle, plain: Bundle, runtime: str) -> None:
    x = spec_of().inputs["x"].numpy()
    found, expected = moved(runtime, clipped, x, example_clip=1e6), moved(runtime, plain, x)
    for name, array in expected.arrays.items():
        np.testing.assert_allclose(found[name], array, atol=1e-6)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(replace(digits.cnn(), clip_examples=0.1), marks=pytest.mark.slow),
        pytest.param(replace(spec_of(), trainable=LoRA(2, ("2",))), marks=pytest.mark.slow),
        replace(spec_of(), optimizer=Accumulated(SGD(0.1), 2)),
    ],
    ids=["convolutions and adam", "adapters", "accumulated"],
)
def test_clipping_by_example_is_that_of_a_plain_loop_in_torch(spec: ModelSpec, tmp_path: Path) -> None:
    compiled = compile_model(spec, tmp_path, RUNTIMES)
    assert all(found.train_short < 1e-5 for found in compiled.parity.values())
    assert "example_clip" in compiled.bundle.manifest.hyperparameters


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (spec_of(nn.BatchNorm1d(8)), "statistics of the batch"),
        (spec_of(nn.Dropout(0.1)), "dropout, which would drop alike"),
    ],
)
def test_what_a_loop_over_examples_would_get_wrong_is_refused(spec: ModelSpec, match: str, tmp_path: Path) -> None:
    with pytest.raises(CannotCompile, match=match):
        compile_model(spec, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_where_examples_are_clipped_they_are_what_a_gathered_batch_counts_for(tmp_path: Path) -> None:
    """A long text has no more weight than a short one: both were held to the same norm."""
    words = torch.arange(40).reshape(8, 5) % 9
    following = words.roll(1, 0) * (torch.arange(5) < torch.arange(8).unsqueeze(1) % 5 + 1)
    spec = ModelSpec(
        "texts",
        nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9)),
        token_cross_entropy,
        {"x": words},
        {"y": following},
        metrics={"correct": token_correct},
        count=token_count,
        optimizer=Accumulated(SGD(0.5), 2),
        clip_examples=2.0,
    )
    assert compile_model(spec, tmp_path).parity["onnx"].train_short < 2e-5


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_that_is_no_limit_is_refused(clip: float) -> None:
    with pytest.raises(CannotCompile, match="clip_examples"):
        spec_of(clip=clip)
