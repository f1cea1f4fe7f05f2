"""A loss, a metric or a module that would train or judge wrongly without a word is refused before all else."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from umbel.errors import CannotCompile
from umbel_models.compile import compile_model
from umbel_models.eager import write_uncompiled
from umbel_models.losses import absolute_error, binary_correct, correct, squared_error, token_correct
from umbel_models.spec import ModelSpec
from umbel_models.vetting import require_sound

Loss = Callable[..., Tensor]


def spec_of(module: nn.Module | None = None, loss: Loss = F.mse_loss, target: Any = None, **rest: Any) -> ModelSpec:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"inputs": {"x": torch.randn(12, 6)}, "metrics": {}, **rest}
    wanted = torch.randn(12, 1) if target is None else target
    return ModelSpec("odd", nn.Linear(6, 1) if module is None else module, loss, targets={"y": wanted}, **settings)


def far(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().mean()


@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, F.huber_loss, F.smooth_l1_loss, far])
def test_a_loss_that_pairs_each_output_with_all_targets_is_refused(loss: Loss, tmp_path: Path) -> None:
    spec = spec_of(loss=loss, target=torch.randn(12))
    for compile_or_write in (compile_model, write_uncompiled):
        with pytest.raises(CannotCompile, match="broadcast"):
            compile_or_write(spec, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    require_sound(spec_of(loss=loss))


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, y: (o * o).mean(),
        lambda o, y: F.binary_cross_entropy(torch.sigmoid(o), torch.sigmoid(y)),
        lambda o, y: F.cross_entropy(o.expand(-1, 3), (y[:, 0] > 0).long(), weight=torch.ones(3)),
        lambda o, y: (o - o.t()).square().mean() + F.mse_loss(o, y),
    ],
)
def test_losses_that_look_alike_and_are_sound_pass(loss: Loss) -> None:
    require_sound(spec_of(loss=loss))
    require_sound(spec_of(loss=loss, target=torch.zeros(12, 1)))


def test_a_model_that_is_right_about_all_of_the_example_batch_passes() -> None:
    """Its loss is 0, which is twice itself."""
    spec = spec_of()
    require_sound(replace(spec, targets={"y": spec.module(*spec.inputs.values()).detach()}))


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda o, y: F.mse_loss(o, y, reduction="sum"), "it is a sum; give the mean"),
        (lambda o, y: F.mse_loss(o, y, reduction="none"), r"shape \[12, 1\]"),
        (lambda o, y: F.mse_loss(o, y).reshape(1), r"shape \[1\]"),
        (lambda o, y: 1.0, "a float"),
        (lambda o, y: o.mean() / 0, "the loss of the example batch is"),
        (lambda o, y: o.missing, "loss fails.*has no attribute 'missing'"),
        (lambda o, y: F.mse_loss(o.detach(), y), "depend on any weight that is trained"),
    ],
)
def test_a_loss_that_is_no_mean_over_the_batch_is_refused(loss: Loss, match: str, tmp_path: Path) -> None:
    with pytest.raises(CannotCompile, match=match):
        compile_model(spec_of(loss=loss), tmp_path)


@pytest.mark.parametrize(
    ("metric", "match"),
    [
        (lambda o, y: (o - y).abs().mean(), "'odd one' is .* give a sum"),
        (lambda o, y: (o - y).abs().sum(1), r"'odd one' is of shape \[12\]"),
        (lambda o, y: 12, "'odd one' is a int"),
    ],
)
def test_a_metric_that_would_not_add_over_devices_is_refused(metric: Loss, match: str) -> None:
    with pytest.raises(CannotCompile, match=match):
        require_sound(spec_of(metrics={"odd one": metric}))


@pytest.mark.parametrize(
    ("metric", "output", "target"),
    [
        (correct, (4, 3), (4, 1)),
        (token_correct, (4, 5, 3), (4, 1)),
        (binary_correct, (4, 1), (4,)),
        (absolute_error, (4, 1), (4,)),
        (squared_error, (4, 1), (4,)),
    ],
)
def test_metric_sums_refuse_targets_of_another_shape(metric: Loss, output: tuple[int], target: tuple[int]) -> None:
    with pytest.raises(CannotCompile, match="targets of shape"):
        metric(torch.zeros(output), torch.zeros(target))


class Returns(nn.Module):
    """A dense layer, and a function of what it gives."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(6, 1), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer(x))


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda y: {"y": y}, "returns a dict"),
        (lambda y: (y, y), "returns 2 tensors"),
        (lambda y: y.mean(), "the first dimension of each output is the batch"),
        (lambda y: y / 0, "NaN or infinity"),
        (lambda y: y.no_such_thing, "the module fails.*AttributeError"),
        (lambda y: nn.Linear(5, 1)(y), "the module fails.*called with x in this order"),
    ],
)
def test_what_a_module_returns_or_raises_is_told_in_words(function: Callable[[Tensor], Any], match: str) -> None:
    with pytest.raises(CannotCompile, match=match):
        require_sound(spec_of(Returns(function)))


def test_the_part_of_a_module_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(CannotCompile, match="in module '1'"):
        compile_model(spec_of(nn.Sequential(nn.Linear(6, 5), nn.Linear(4, 1))), tmp_path)


def test_weights_that_are_no_numbers_are_named() -> None:
    module = nn.Linear(6, 1)
    nn.init.constant_(module.weight, float("nan"))
    with pytest.raises(CannotCompile, match="weights weight hold"):
        require_sound(spec_of(module))


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": {"loss": correct}},
        {"metrics": {"examples": correct}},
        {"outputs": ("x",)},
        {"inputs": {"": torch.randn(12, 6)}},
        {"inputs": {"loss": torch.randn(12, 6)}},
        {"inputs": {"x": [[0.0] * 6] * 12}},
    ],
)
def test_names_that_mean_two_things_and_things_that_are_no_tensors_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CannotCompile, match=r"come twice|give a torch\.Tensor"):
        spec_of(**changes)


@pytest.mark.parametrize(
    "changes", [{"trainable": "head"}, {"optimizer": None}, {"optimizer": torch.optim.SGD([torch.zeros(1)], 0.1)}]
)
def test_words_and_torch_s_own_in_place_of_a_choice_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CannotCompile, match=r"give Head\(\)|give one of umbel_models.optimizers"):
        spec_of(**changes)


def test_something_that_is_no_module_is_refused() -> None:
    with pytest.raises(CannotCompile, match=r"give a torch\.nn\.Module"):
        spec_of(lambda x: x)  # type: ignore[arg-type]


def test_vetting_warns_of_nothing() -> None:
    with warnings.catch_warnings(action="error"):
        require_sound(spec_of(loss=F.huber_loss))


class Held(nn.Module):
    """Reads a tensor that it holds in an attribute of its own."""

    def __init__(self, held: Any, keep: bool = False) -> None:
        super().__init__()
        self.layer, self.held, self.keep = nn.Linear(6, 1), held, keep

    def forward(self, x: Tensor) -> Tensor:
        held = self.held[0]
        if self.keep:
            self.held = [x.mean(0).detach()]
        logits: Tensor = self.layer(x * held)
        return logits


def test_weights_that_would_never_be_trained_are_refused(tmp_path: Path) -> None:
    module, scale = nn.Linear(6, 1), nn.Parameter(torch.ones(1))
    for spec in (
        spec_of(module, loss=lambda o, y: F.mse_loss(o, y) + module.weight.square().mean()),
        spec_of(loss=lambda o, y: F.mse_loss(o * scale, y)),
        spec_of(Held([nn.Parameter(torch.ones(6))])),
    ):
        with pytest.raises(CannotCompile, match="would never be trained"):
            compile_model(spec, tmp_path / "bundle")
    scale.requires_grad_(False)
    compile_model(spec_of(loss=lambda o, y: F.mse_loss(o * scale, y)), tmp_path / "bundle")


def test_a_tensor_kept_from_call_to_call_is_refused_and_the_module_stays_as_it_was(tmp_path: Path) -> None:
    module = Held([torch.ones(6)], keep=True)
    with pytest.raises(CannotCompile, match=r"an earlier call is read.*buffer"):
        compile_model(spec_of(module), tmp_path)
    assert torch.equal(module.held[0], torch.ones(6))
    assert module.training


def test_hooks_on_the_gradients_of_weights_are_refused(tmp_path: Path) -> None:
    module = nn.Linear(6, 1)
    module.weight.register_hook(lambda gradient: 0.1 * gradient)
    with pytest.raises(CannotCompile, match="hooks on the gradients of weight"):
        compile_model(spec_of(module), tmp_path)


@pytest.mark.parametrize(
    ("function", "size"),
    [(lambda y: y if y.shape[0] <= 64 else 2 * y, 100), (lambda y: y / min(y.shape[0], 200), 256)],
)
def test_a_way_that_is_right_for_small_batches_only_is_refused(
    function: Callable[[Tensor], Any], size: int, tmp_path: Path
) -> None:
    with pytest.raises(CannotCompile, match=f"wrong one for a batch of {size}"):
        compile_model(spec_of(Returns(function)), tmp_path)


def test_weights_that_are_elsewhere_or_empty_are_named(tmp_path: Path) -> None:
    with pytest.raises(CannotCompile, match=r"weight on meta.*\.cpu\(\)"):
        compile_model(spec_of(nn.Linear(6, 1, device="meta")), tmp_path)
    empty = nn.Linear(6, 1)
    empty.register_parameter("spare", nn.Parameter(torch.zeros(0, 3)))
    with pytest.raises(CannotCompile, match=r"p_spare of shape \[0, 3\] is empty"):
        compile_model(spec_of(empty), tmp_path)


@pytest.mark.parametrize("function", [lambda y: (y, y @ y.t()), lambda y: (y, torch.ones(12, 2) * y[:1])])
def test_an_output_that_has_no_row_for_each_example_is_refused(
    function: Callable[[Tensor], Any], tmp_path: Path
) -> None:
    spec = spec_of(Returns(function), loss=lambda o, y: F.mse_loss(o[0], y), outputs=("one", "other"))
    with pytest.raises(CannotCompile, match=r"'other' has sizes .* must be the batch's"):
        compile_model(spec, tmp_path)


@pytest.mark.parametrize("labels", [("yes",), ("yes", "no", "no"), ("yes", "no", "maybe", "never")])
def test_labels_that_do_not_fit_the_scores_are_refused(labels: tuple[str, ...]) -> None:
    target = torch.arange(12) % 3
    with pytest.raises(CannotCompile, match="different labels for 3 scores"):
        require_sound(spec_of(nn.Linear(6, 3), F.cross_entropy, target, labels=labels))
    require_sound(spec_of(nn.Linear(6, 3), F.cross_entropy, target, labels=("yes", "no", "maybe")))
    with pytest.raises(CannotCompile, match="12 different labels for 1 scores"):  # one number for each example
        require_sound(
            spec_of(nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), target=torch.randn(12), labels=(*"abcdefghijkl",))
        )


def test_a_count_that_does_not_add_over_batches_is_refused() -> None:
    with pytest.raises(CannotCompile, match="metric 'count' is 1, and 1 when each example comes twice"):
        require_sound(spec_of(count=lambda output, y: torch.tensor(1.0)))
    require_sound(spec_of(count=lambda output, y: torch.tensor(float(len(y)))))
