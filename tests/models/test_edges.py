"""Values, types and weights at the edges give what torch gives, or a refusal, and never a number of another kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from umbel.errors import CannotCompile, ParityFailed, RuntimeFailure
from umbel.runtime.named import runtime_named
from umbel_models.checking import check_bundle
from umbel_models.compile import compile_model
from umbel_models.optimizers import SGD, Adam, Optimizer
from umbel_models.spec import ModelSpec

RUNTIMES = ("onnx", "litert")


def spec_of(module: nn.Module, x: Tensor, optimizer: Optimizer | None = None) -> ModelSpec:
    targets, chosen = {"y": torch.arange(12) % 3}, optimizer or SGD(0.05)
    return ModelSpec("edge", module, F.cross_entropy, {"x": x}, targets, metrics={}, optimizer=chosen)


class Of(nn.Module):
    """A dense layer over a function of whole numbers."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(self.function(x))
        return logits


def compared(x: Tensor) -> Tensor:
    """Whole numbers beside fractions: 2 is below 2.5, as torch has it, and not beside a 2.5 that was cut to 2."""
    sides = [x < 2.5, x <= -0.5, x == 0.5, x != 1.5, x.clamp(max=1.5) > 1.2, x >= 2.5]
    return torch.cat([side.to(torch.float32) for side in sides], 1)


def mixed(x: Tensor) -> Tensor:
    """Sums and products of yes and no."""
    low, high = x < 1, x > 2
    sides = [low * high, low + high, low * (x == 0), torch.maximum(low, high), low == high]
    return torch.cat([side.to(torch.float32) for side in sides], 1)


@pytest.mark.parametrize(("function", "width"), [(compared, 6 * 4), pytest.param(mixed, 5 * 4, marks=pytest.mark.slow)])
def test_whole_numbers_and_booleans_meet_others_as_in_torch(
    function: Callable[[Tensor], Tensor], width: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.arange(48).reshape(12, 4) * 7 % 5 - 1
    compile_model(spec_of(Of(function, width), x), tmp_path, RUNTIMES)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_one_hot_of_what_is_no_class_is_refused(runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = spec_of(Of(lambda x: F.one_hot(x, 9).to(torch.float32), 9), torch.arange(12) % 9)
    bundle = compile_model(spec, tmp_path, (runtime,)).bundle
    session = runtime_named(runtime).infer(bundle, bundle.weights())
    for wrong in (-1, 9):
        with pytest.raises(RuntimeFailure):
            session({"x": np.array([1, wrong])})


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_places_beyond_a_dimension_are_refused_and_are_not_those_of_the_next_row(runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    table, rows = torch.arange(12.0).reshape(3, 4), torch.tensor([[0], [2]])
    spec = spec_of(Of(lambda x: table[rows, x[:, None]].flatten(1), 4), torch.randint(-4, 4, (12, 2)))
    bundle = compile_model(spec, tmp_path, (runtime,)).bundle
    session = runtime_named(runtime).infer(bundle, bundle.weights())
    for wrong in (4, -5):
        with pytest.raises(RuntimeFailure):
            session({"x": np.array([[1, wrong]])})


@pytest.mark.parametrize("clip", [pytest.param(None, marks=pytest.mark.slow), 0.5])
def test_inputs_and_answers_may_go_by_names_that_the_graph_would_give_itself(
    clip: float | None, tmp_path: Path
) -> None:
    """As two moments are called, and constants."""
    given, targets = {"t0": torch.randn(8, 6), "c1": torch.randn(8, 6)}, {"c0": torch.arange(8) % 3}
    module = nn.Bilinear(6, 6, 3)
    spec = ModelSpec("two", module, F.cross_entropy, given, targets, outputs=("t3",), clip_examples=clip)
    compile_model(spec, tmp_path, RUNTIMES)


def test_tokens_may_be_of_32_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(24, 3))
    bundle = compile_model(spec_of(net, torch.randint(0, 9, (12, 4), dtype=torch.int32)), tmp_path, RUNTIMES).bundle
    assert [spec.dtype for spec in bundle.manifest.inputs] == ["int32"]


class Helped(nn.Module):
    """A branch that only training has, and a layer that nothing has."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.helper, self.spare = nn.Linear(6, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.body(x))
        logits: Tensor = self.head(x) + 0.3 * self.helper(x) if self.training else self.head(x)
        return logits


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [SGD(0.05), Adam(0.01, weight_decay=0.1)])
def test_weights_that_an_answer_or_nothing_at_all_reads_do_no_harm(optimizer: Optimizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    bundle = compile_model(spec_of(Helped(), torch.randn(12, 6), optimizer), tmp_path, RUNTIMES).bundle
    assert {"p_helper.weight", "p_spare.weight"} <= set(bundle.manifest.shared_shapes)


def test_answers_in_large_numbers_pass_the_check_that_devices_make(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), Of(lambda x: x * 30_000, 64))
    spec = ModelSpec(
        "prices",
        net,
        lambda o, y: F.mse_loss(o, y) / 1e9,
        {"x": torch.randn(12, 6)},
        {"y": 30_000 * torch.randn(12, 3)},
        metrics={},
    )
    bundle = compile_model(spec, tmp_path, RUNTIMES).bundle
    assert np.abs(bundle.golden().outputs["logits"]).max() > 10_000
    assert all(difference < 1e-5 for difference in check_bundle(bundle).golden.values())


def test_a_bundle_that_its_maker_could_not_check_is_not_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = spec_of(nn.Linear(6, 3), torch.randn(12, 6))
    with pytest.raises(ParityFailed, match="golden"):
        compile_model(replace(spec, golden_tolerance=0.0), tmp_path / "bundle", RUNTIMES)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_batch_of_one_leaves_running_variances_as_they_are(runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    bundle = compile_model(spec_of(net, torch.randn(12, 6)), tmp_path, (runtime,)).bundle
    session = runtime_named(runtime).train(bundle, bundle.shared_weights())
    batch = np.ones((5, 6), np.float32) * np.arange(5, dtype=np.float32)[:, None]
    session.step({"x": batch}, {"y": np.zeros(5, np.int64)})
    before = session.weights()
    session.step({"x": batch[:1]}, {"y": np.zeros(1, np.int64)})
    after = session.weights()
    assert after.is_finite()
    assert np.array_equal(after["b_1.running_var"], before["b_1.running_var"])
    assert not np.array_equal(after["b_1.running_mean"], before["b_1.running_mean"])


def test_one_hot_needs_a_count_and_a_bag_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CannotCompile, match="say num_classes"):
        compile_model(spec_of(Of(lambda x: F.one_hot(x) * 1.0, 9), torch.arange(12) % 9), tmp_path)
    bag = nn.Sequential(nn.EmbeddingBag(9, 4, mode="max"), nn.Linear(4, 3))
    with pytest.raises(CannotCompile, match=r"embedding_bag .*mode='sum' or 'mean'.*module '0'"):
        compile_model(spec_of(bag, torch.randint(0, 9, (12, 4))), tmp_path)
