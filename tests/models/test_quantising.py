"""Answers in fewer bits: taken where they are faster and accurate enough, tried again wherever weights are bound."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from umbel.bundle import Bundle, write_bundle
from umbel.errors import BundleInvalid, CannotCompile
from umbel.manifest import QUANTISED, Manifest, Precision
from umbel.runtime.named import runtime_named
from umbel.runtime.precision import fastest, largest_difference
from umbel.self_check import verify_golden
from umbel.successor import successor
from umbel.weights import Weights
from umbel_client.predictor import Predictor
from umbel_models.checking import check_bundle
from umbel_models.compile import compile_model
from umbel_models.describing import describe
from umbel_models.quantising import Quantise, Trial, _drop
from umbel_models.spec import Loss, ModelSpec

ANY_SPEED = Quantise(least_gain=0.0, turns=1, largest_drop=1.0)


def dense() -> ModelSpec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5, bias=False))
        x = torch.randn(16, 20)
    return ModelSpec("dense", module, F.cross_entropy, {"x": x}, {"y": torch.arange(16) % 5})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compile_model(dense(), tmp_path_factory.mktemp("dense"), ("onnx", "litert"), quantised=ANY_SPEED).bundle


def test_a_quantised_graph_is_taken_when_it_is_as_wished(bundle: Bundle) -> None:
    assert bundle.manifest.precision["onnx"].kind == "int8"
    assert bundle.manifest.graphs["onnx"][QUANTISED] == "infer_quantised.onnx"
    assert "times as fast at a batch of 1" in describe(bundle)["precision"]["onnx"]
    assert describe(bundle)["precision"]["litert"].startswith("float32: ")
    assert check_bundle(bundle, dense()).answers_in == {"onnx": "int8", "litert": "float32"}


def test_the_app_is_answered_by_it_and_close_to_float32(bundle: Bundle) -> None:
    runtime = runtime_named("onnx")
    predictor = Predictor(bundle, bundle.weights(), runtime, "here")
    assert predictor.precision == "int8"
    inputs = bundle.golden().inputs
    exact = runtime.infer(bundle, bundle.weights())(inputs)
    assert 0 < largest_difference(predictor(inputs), exact) <= bundle.manifest.precision["onnx"].tolerance
    assert verify_golden(runtime, bundle) < 1e-5  # of the float32 graph, as ever


def test_new_weights_are_quantised_by_whoever_binds_them(bundle: Bundle, tmp_path: Path) -> None:
    """After a round only weights travel; the graph in fewer bits is the same file."""
    generator = np.random.default_rng(0)
    moved = {n: a + generator.normal(0, 0.05, a.shape).astype(np.float32) for n, a in bundle.weights().arrays.items()}
    manifest, files = successor(bundle, Weights(moved), runtime_named("onnx"))
    files |= {name: path.read_bytes() for name, path in bundle.paths.items() if name not in files}
    following = write_bundle(tmp_path, manifest, files)
    assert following.manifest.files["infer_quantised.onnx"] == bundle.manifest.files["infer_quantised.onnx"]
    session, kind = fastest(runtime_named("onnx"), following, following.weights())
    assert kind == "int8"
    assert largest_difference(session(following.golden().inputs), following.golden().outputs) < 0.05


def test_weights_that_fewer_bits_dont_suit_are_answered_in_float32(bundle: Bundle) -> None:
    """Large numbers that cancel out: what is left is smaller than a step of eight bits."""
    arrays = {name: array.copy() for name, array in bundle.weights().arrays.items()}
    arrays["p_0.bias"][:] = 1e5
    arrays["p_2.weight"][:] = np.where(np.arange(64) % 2, 1.0, -1.0)
    session, kind = fastest(runtime_named("onnx"), bundle, Weights(arrays))
    assert kind == "float32"
    exact = runtime_named("onnx").infer(bundle, Weights(arrays))(bundle.golden().inputs)
    assert largest_difference(session(bundle.golden().inputs), exact) == 0


def test_a_device_fetches_it_with_the_graphs_of_its_runtime(bundle: Bundle) -> None:
    assert "infer_quantised.onnx" in bundle.manifest.files_for("onnx")
    assert "infer_quantised.onnx" not in bundle.manifest.files_for("litert")


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        (Quantise(least_gain=1e9, turns=1), "times as fast at a batch of"),
        (Quantise(least_gain=0.0, turns=1, largest_drop=-2.0), "of the accuracy on 16 examples, -2 is allowed"),
        (Quantise(("float16", "int8"), least_gain=1e9, turns=1), "float16 is"),
    ],
)
def test_otherwise_the_compiler_says_why_it_kept_float32(wish: Quantise, says: str, tmp_path: Path) -> None:
    made = compile_model(dense(), tmp_path, quantised=wish).bundle
    kept = made.manifest.precision["onnx"]
    assert kept.kind == "float32"
    assert says in kept.reason
    assert set(made.manifest.graphs["onnx"]) == {"infer", "evaluate", "train"}
    assert Manifest.from_bytes(made.manifest.to_bytes()) == made.manifest


def test_a_model_without_dense_layers_stays_as_it_is(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten())
    spec = ModelSpec("conv", module, F.mse_loss, {"x": torch.ones(2, 2, 4)}, {"y": torch.ones(2, 6)}, metrics={})
    reason = compile_model(spec, tmp_path, quantised=ANY_SPEED).bundle.manifest.precision["onnx"].reason
    assert "no dense layer" in reason


def test_without_an_accuracy_the_loss_decides(tmp_path: Path) -> None:
    spec = replace(dense(), metrics={})
    reason = compile_model(spec, tmp_path, quantised=ANY_SPEED).bundle.manifest.precision["onnx"].reason
    assert "of the loss, relatively" in reason


def test_the_calibration_examples_are_what_counts(tmp_path: Path) -> None:
    x = torch.zeros(3, 20)
    spec = replace(dense(), calibration=({"x": x}, {"y": torch.zeros(3, dtype=torch.int64)}))
    reason = compile_model(spec, tmp_path, quantised=ANY_SPEED).bundle.manifest.precision["onnx"].reason
    assert "on 3 examples" in reason


def test_a_model_that_gets_nothing_right_has_nothing_to_lose_and_stays_as_it_is(tmp_path: Path) -> None:
    spec = replace(dense(), calibration=({"x": torch.zeros(3, 20)}, {"y": torch.full((3,), 99)}))
    kept = compile_model(spec, tmp_path, quantised=ANY_SPEED).bundle.manifest.precision["onnx"]
    assert kept.kind == "float32"
    assert "float32 gets none right" in kept.reason


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(x), "size": x.abs().mean()}


@pytest.mark.parametrize(
    ("loss", "kind", "reason"),
    [
        (lambda found, y: F.cross_entropy(found["logits"], y), "int8", "of the loss, relatively"),
        (lambda found, y: F.cross_entropy(found["logits"], y) + found["size"], "float32", "'size' of what the module"),
    ],
)
def test_answers_under_names_are_judged_by_them_as_far_as_they_are_answers(
    loss: Loss, kind: str, reason: str, tmp_path: Path
) -> None:
    spec = replace(dense(), module=Named(), loss=loss, metrics={})
    found = compile_model(spec, tmp_path, quantised=ANY_SPEED).bundle.manifest.precision["onnx"]
    assert found.kind == kind
    assert reason in found.reason


def test_a_kind_has_to_be_faster_at_every_batch() -> None:
    trial = Trial("int8", {1: 3.0, 16: 1.05}, 0.0, "the accuracy", 4, 0.1)
    assert "1.05 times as fast at a batch of 16" in trial.objection(Quantise())
    assert not replace(trial, gains={1: 3.0, 16: 1.2}).objection(Quantise())


def test_a_trial_that_gives_no_numbers_is_refused() -> None:
    trial = Trial("int8", {1: 2.0}, 0.0, "the accuracy", 4, float("inf"))
    assert trial.objection(Quantise())
    assert not replace(trial, off=0.1).objection(Quantise())


def test_a_drop_is_a_share_of_what_counts_or_of_the_loss_whatever_its_sign() -> None:
    exact, narrow = {"logits": np.full((8, 4), 2.0, np.float32)}, {"logits": np.full((8, 4), 1.5, np.float32)}
    targets = [torch.zeros(8)]
    below = replace(dense(), metrics={}, loss=lambda output, y: -output.mean())
    assert _drop(below, exact, narrow, targets) == (pytest.approx(0.25), "the loss, relatively,")
    tokens = replace(
        dense(),
        metrics={"correct": lambda output, y: output[:, :3].sum() / 2},
        count=lambda output, y: torch.tensor(24.0),
    )
    assert _drop(tokens, exact, narrow, targets) == (pytest.approx(0.25), "the accuracy")
    trial = Trial("int8", {1: 2.0}, -0.1, "the accuracy", 8, 0.1)
    assert "loses 0.0000 of the accuracy" in trial.precision().reason


def test_nothing_is_said_where_nothing_was_asked(tmp_path: Path) -> None:
    made = compile_model(dense(), tmp_path).bundle
    assert not made.manifest.precision
    assert b"precision" not in made.manifest.to_bytes()
    assert "not asked for" in describe(made)["precision"]


@pytest.mark.parametrize(
    "precision",
    [
        {},
        {"onnx": Precision("float32", "no")},
        {"onnx": Precision("int8", "yes", float("nan"))},
        {"onnx": Precision("int8", "yes", 0.1), "litert": Precision("int8", "yes", 0.1)},
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(bundle: Bundle, precision: dict[str, Precision]) -> None:
    with pytest.raises(BundleInvalid):
        replace(bundle.manifest, precision=precision)


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        ({"kinds": ("int4",)}, "int4"),
        ({"kinds": ()}, "known are int8"),
        ({"largest_drop": math.nan}, "largest drop is nan"),
        ({"least_gain": math.nan}, "least gain nan"),
        ({"batches": ()}, "at least one of each"),
        ({"batches": (16, 0)}, "at least one of each"),
        ({"turns": 0}, "at least one of each"),
    ],
)
def test_a_wish_that_nothing_could_be_measured_by_is_refused(wish: dict[str, Any], told: str) -> None:
    with pytest.raises(CannotCompile, match=told):
        Quantise(**wish)
