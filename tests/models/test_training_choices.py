"""Optimisers, frozen weights, running statistics: the choices a spec offers pass the same gate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from umbel.bundle import Bundle
from umbel.errors import CannotCompile, ParityFailed
from umbel.runtime.onnx import OnnxRuntime
from umbel.successor import successor
from umbel.weights import Weights
from umbel_models.accumulation import Accumulated
from umbel_models.compile import compile_model
from umbel_models.losses import correct
from umbel_models.optimizers import SGD, Adam, Optimizer, Proximal, TorchOptimizer
from umbel_models.parity import check_parity
from umbel_models.spec import ModelSpec
from umbel_models.zoo import digits

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": SGD(0.05),
    "momentum": SGD(0.05, momentum=0.9),
    "adam": Adam(1e-3),
    "adamw": Adam(1e-3, weight_decay=0.1),
    "proximal sgd": Proximal(SGD(0.05), mu=0.5),
    "proximal adam": Proximal(Adam(1e-3), mu=0.1),
}


INSIDE_OTHERS = {"sgd", "momentum", "adam", "adamw", "proximal sgd"}
"""Optimizers of which the others, and other quick tests, are made."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in INSIDE_OTHERS else n for n in OPTIMIZERS]
)
def test_an_optimizer_moves_weights_as_torch_does(name: str, tmp_path: Path) -> None:
    parity = compile_model(replace(digits.mlp(), optimizer=OPTIMIZERS[name]), tmp_path, ("onnx", "litert")).parity
    assert all(found.train_short < 2e-5 for found in parity.values())


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: SGD(-0.1), "lr"),
        (lambda: SGD(float("nan")), "lr"),
        (lambda: SGD(momentum=1.0), "momentum"),
        (lambda: Adam(beta2=1.0), "beta2"),
        (lambda: Adam(epsilon=0.0), "epsilon"),
        (lambda: Adam(weight_decay=-0.1), "weight_decay"),
        (lambda: Proximal(SGD(), mu=-1.0), "mu"),
        *((lambda every=every: Accumulated(SGD(), every), "accumulate") for every in (0, 2.5, math.inf, math.nan)),
    ],
)
def test_settings_that_would_spoil_weights_are_refused(make: Callable[[], Optimizer], setting: str) -> None:
    with pytest.raises(CannotCompile, match=f"{setting} is .* or more"):
        make()


@pytest.mark.parametrize("adam", [Adam(0.1), Adam(0.1, beta1=0.9, beta2=0.9)], ids=str)
def test_adams_reach_is_how_far_a_step_goes_whatever_the_gradient(adam: Adam) -> None:
    """The first step, and the first gradient after a long time without any."""
    still, moved = {"moment1": torch.zeros(()), "moment2": torch.zeros(())}, []
    for steps in (1.0, 1e6):
        rate = {"lr": torch.tensor(adam.lr)}
        weight, _ = adam.update(torch.zeros(()), torch.tensor(0.01), still, {"steps": torch.tensor(steps)}, rate)
        moved.append(abs(float(weight)))
    assert adam.reach == pytest.approx(max(moved), rel=1e-3)


def test_without_the_proximal_term_nothing_of_it_is_in_the_graph(tmp_path: Path) -> None:
    plain = compile_model(replace(digits.mlp(), optimizer=SGD()), tmp_path / "plain").bundle
    pulled = compile_model(replace(digits.mlp(), optimizer=Proximal(SGD())), tmp_path / "pulled").bundle
    assert plain.manifest.slots == ()
    assert "mu" not in plain.manifest.hyperparameters
    assert {spec.name for spec in pulled.manifest.slots} == {
        "s_anchor_head.bias",
        "s_anchor_head.weight",
        "s_anchor_hidden.bias",
        "s_anchor_hidden.weight",
    }


def test_a_strong_pull_keeps_weights_near_where_they_started(tmp_path: Path) -> None:
    spec = replace(digits.mlp(), optimizer=Proximal(SGD(0.05)))
    bundle = compile_model(spec, tmp_path).bundle
    inputs, targets = ({name: t.numpy() for name, t in part.items()} for part in spec.batch(16))
    start = bundle.shared_weights()

    def moved(mu: float) -> float:
        session = OnnxRuntime().train(bundle, start, {"mu": mu})
        for _ in range(50):
            session.step(inputs, targets)
        return (session.weights() - start).norm()

    assert moved(10.0) < moved(1.0) < moved(0.0)


def head_only(name: str) -> bool:
    return name.startswith("head")


def test_frozen_weights_stay_out_of_what_travels_but_in_the_answers(tmp_path: Path) -> None:
    bundle = compile_model(replace(digits.mlp(), trainable=head_only), tmp_path).bundle
    assert set(bundle.manifest.shared_shapes) == {"p_head.weight", "p_head.bias"}
    assert set(bundle.manifest.weight_shapes) == {*bundle.manifest.shared_shapes, "f_hidden.weight", "f_hidden.bias"}
    runtime, golden = OnnxRuntime(), bundle.golden()
    shared_alone = runtime.infer(bundle, bundle.shared_weights())(golden.inputs)
    np.testing.assert_allclose(shared_alone["logits"], golden.outputs["logits"], atol=1e-5)


def test_a_successor_keeps_the_frozen_weights_of_its_parent(tmp_path: Path) -> None:
    parent = compile_model(replace(digits.mlp(), trainable=head_only), tmp_path).bundle
    manifest, files = successor(parent, parent.shared_weights().scaled(2.0), OnnxRuntime())
    weights = Weights.from_bytes(files["weights.safetensors"])
    assert np.array_equal(weights["f_hidden.weight"], parent.weights()["f_hidden.weight"])
    assert np.array_equal(weights["p_head.bias"], 2 * parent.weights()["p_head.bias"])
    assert manifest.graphs == parent.manifest.graphs


def test_running_statistics_travel_with_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    spec = ModelSpec("normed", module, F.cross_entropy, {"x": torch.randn(8, 5)}, {"y": torch.arange(8) % 2})
    bundle = compile_model(spec, tmp_path).bundle
    assert {spec.name for spec in bundle.manifest.buffers} == {"b_1.running_mean", "b_1.running_var"}
    session = OnnxRuntime().train(bundle, bundle.weights())
    session.step({"x": np.ones((4, 5), np.float32)}, {"y": np.zeros(4, np.int64)})
    assert not np.array_equal(session.weights()["b_1.running_mean"], bundle.weights()["b_1.running_mean"])


class Beginning(nn.Module):
    """A batch norm of what begins as zeros, whose running mean the first batch leaves as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        self.register_buffer("units", torch.full((5,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.norm(self.layer(x / self.units)) + x[:, :4]))
        return logits


def test_statistics_that_the_first_batch_leaves_as_they_are_travel_too(tmp_path: Path) -> None:
    """Else devices would judge and answer by a mean of nothing, however far the layer has come."""
    torch.manual_seed(0)
    spec = ModelSpec("begins", Beginning(), F.cross_entropy, {"x": torch.randn(8, 5)}, {"y": torch.arange(8) % 2})
    bundle = compile_model(spec, tmp_path).bundle
    assert {spec.name for spec in bundle.manifest.buffers} == {"b_norm.running_mean", "b_norm.running_var"}


class Folding(nn.Module):
    """Works its weights out once for answers, as some do that are faster so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(5, 2), nn.Parameter(torch.ones(2, 1))
        self.folded: Tensor | None = None

    def train(self, mode: bool = True) -> Self:
        self.folded = None if mode else (self.scale * self.layer.weight).detach().clone()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.scale * self.layer.weight if self.folded is None else self.folded, self.layer.bias)


def test_answers_that_would_not_follow_what_training_moves_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = ModelSpec("folds", Folding(), F.cross_entropy, {"x": torch.randn(8, 5)}, {"y": torch.arange(8) % 2})
    with pytest.raises(ParityFailed, match="infer, after training: 'logits' differs"):
        compile_model(spec, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_compiling_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    spec = digits.cnn()
    spec.module.eval()
    before = {name: tensor.clone() for name, tensor in spec.module.state_dict().items()}
    compile_model(spec, tmp_path)
    assert not spec.module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in spec.module.state_dict().items())
    assert all(parameter.grad is None for parameter in spec.module.parameters())


def test_a_compiled_bundle_opens_from_its_folder(tmp_path: Path) -> None:
    compiled = compile_model(digits.mlp(), tmp_path / "deep" / "er").bundle
    assert Bundle.open(tmp_path / "deep" / "er").manifest == compiled.manifest


class Keys(nn.Module):
    """Attention, where the bias of the keys changes nothing, behind batch norm, which takes its bias away."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)
        self.q, self.k, self.v, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).transpose(1, 2)
        logits: Tensor = self.head(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)).mean(1))
        return logits


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [Adam(0.01), Accumulated(Proximal(Adam(0.01), 0.1), 2)], ids=["plain", "around"])
def test_weights_that_change_nothing_may_go_where_rounding_sends_them(optimizer: Optimizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = {"x": torch.randn(12, 4, 9)}, {"y": torch.arange(12) % 3}
    spec = ModelSpec("keys", Keys(), F.cross_entropy, x, y, optimizer=optimizer)
    for parity in compile_model(spec, tmp_path, ("onnx", "litert")).parity.values():
        assert parity.train_short < 2e-5


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"metrics": {"correct": lambda output, y: correct(output, y) + (y > -1).sum()}}, "'correct'"),
        ({"loss": lambda output, y: 1.01 * F.cross_entropy(output, y)}, "'loss'"),
        ({"count": lambda output, y: 2.0 * (y > -1).sum()}, "'(loss|examples)'"),
    ],
    ids=["metric", "loss", "count"],
)
def test_a_bundle_that_judges_otherwise_than_its_spec_is_no_bundle_of_it(
    change: dict[str, Any], differs: str, tmp_path: Path
) -> None:
    bundle = compile_model(digits.mlp(), tmp_path).bundle
    with pytest.raises(ParityFailed, match=rf"evaluate \(batch of 1\): {differs} differs"):
        check_parity(replace(digits.mlp(), **change), bundle, OnnxRuntime())


def test_no_other_weight_may(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        Adam, "torch_optimizer", lambda self, weights: TorchOptimizer(torch.optim.AdamW(weights, 1.01 * self.lr))
    )
    torch.manual_seed(0)
    x, y = {"x": torch.randn(12, 4, 9)}, {"y": torch.arange(12) % 3}
    with pytest.raises(ParityFailed, match=r"train \(step 1\)"):
        compile_model(ModelSpec("keys", Keys(), F.cross_entropy, x, y, optimizer=Adam(0.01)), tmp_path / "bundle")
