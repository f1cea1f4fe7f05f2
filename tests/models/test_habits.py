"""Habits of models that others wrote: each is met whole in a published one, and stands here as small as it can be."""

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
from torch.utils.checkpoint import checkpoint

from umbel.errors import CannotCompile, ParityFailed
from umbel_models import parity
from umbel_models.compile import compile_model
from umbel_models.eager import EagerRuntime
from umbel_models.measure import torch_works
from umbel_models.optimizers import SGD
from umbel_models.spec import ModelSpec
from umbel_models.trainable import LoRA

BOTH = ("onnx", "litert")


class Around(nn.Module):
    """A function between two dense layers over positions: [N, 4, 6] to [N, 3]."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        if function is masked_stacks:
            layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
            self.stack = nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.function(self, self.first(x)).flatten(1).unflatten(1, (-1, 8)).mean(1))
        return logits


def spec_of(module: nn.Module, *shape: int) -> ModelSpec:
    targets = {"y": torch.arange(8) % 3}
    return ModelSpec(
        "habit", module, F.cross_entropy, {"x": torch.randn(8, *shape)}, targets, optimizer=SGD(0.05), metrics={}
    )


def shifted(_: nn.Module, x: Tensor) -> Tensor:
    """As decoders shift what they have said to the right."""
    moved = x.new_zeros(x.shape)
    moved[:, 1:] = x[:, :-1].clone()
    moved[:, 0] = 3.0
    return moved


def interleaved(_: nn.Module, x: Tensor) -> Tensor:
    """As positions are turned; then in place, by numbers from the back, by a mask, and seen through an earlier part."""
    turned = torch.empty_like(x)
    turned[..., ::2], turned[..., 1::2] = x[..., 1::2].sin(), x[..., ::2].cos()
    early = turned[:, 1]
    turned[:, 1:3, 2:4] *= 2
    turned[:, -1] += turned[:, 0]
    turned[turned > 1] = 0.25
    turned[:, 0].mul_(0.5)
    return turned + early.unsqueeze(1)


def windows(_: nn.Module, x: Tensor) -> Tensor:
    """As shifted windows mark the regions of an image."""
    regions = torch.zeros([4, 8])
    for region, (rows, columns) in enumerate([(slice(0, 2), slice(0, -3)), (slice(-2, None), slice(-3, None))]):
        regions[rows, columns] = region + 1.0
    return x * regions


def noisy(module: nn.Module, x: Tensor) -> Tensor:
    """As variational encoders draw, and as some drop whole examples; nothing of it in answers."""
    if not module.training:
        return x
    x = (
        torch.distributions.Normal(x, 0.1).rsample()
        + 0.1 * torch.randn_like(x)
        + torch.zeros_like(x).uniform_(-0.1, 0.1)
    )
    kept = (0.8 + torch.rand([x.shape[0], 1, 1])).floor_()
    return x / 0.8 * kept * torch.bernoulli(torch.full_like(x, 0.9))


def counted(_: nn.Module, x: Tensor) -> Tensor:
    """As masks of attention are looked up by the example's number, unless they may be asked whether all is seen."""
    if not torch.compiler.is_exporting() and bool((x > 1e9).all()):
        return x
    each = torch.arange(x.shape[0])
    return x * (x[..., 0] > 0)[each[:, None], torch.arange(4)[None]].unsqueeze(-1)


def one_key_for_all(_: nn.Module, x: Tensor) -> Tensor:
    """As multi-query attention shares keys and values."""
    heads, shared = x.unflatten(-1, (2, 4)).transpose(1, 2), x[..., :4].unsqueeze(1)
    return F.scaled_dot_product_attention(heads, shared, shared, is_causal=True).transpose(1, 2).flatten(2)


def whole_numbers_gathered(_: nn.Module, x: Tensor) -> Tensor:
    """As kinds of tokens are picked from a buffer; and places told for a part of the other dimensions alone."""
    places = (x[..., 0] > 0).to(torch.int64) + 2
    kinds = torch.gather((torch.arange(6) % 5).expand(x.shape[0], 6), 1, places)
    return x * F.embedding(kinds, torch.arange(5.0).unsqueeze(1)) + torch.gather(x, 1, places.unsqueeze(2) % 4)


def joined_to_themselves(_: nn.Module, x: Tensor) -> Tensor:
    """As a graph's nodes are."""
    joined, each = torch.zeros([1, 4, 4]), torch.arange(4)
    joined[:, each, each] = 1.0
    return joined @ x


def measured(_: nn.Module, x: Tensor) -> Tensor:
    """As areas are multiplied, and the nearest of a few codes is looked up."""
    nearest = F.embedding(torch.cdist(x, x[:, :2]).argmin(-1), torch.arange(4.0).reshape(2, 2))
    return x * (x.prod(1, keepdim=True) + x[..., :3].prod(-1, keepdim=True)) + nearest.sum(-1, keepdim=True)


def masked_stacks(module: nn.Module, x: Tensor) -> Tensor:
    """As stacks of torch's own layers look whether their mask is the causal one; then windows of a series."""
    stack: Any = module.stack
    later, padding = torch.ones(4, 4, dtype=torch.bool).triu(1), (torch.arange(4) == 3).expand(x.shape[:2])
    return stack(x, later, padding).unfold(1, 3, 1).mean(-1)


def the_best_alone(_: nn.Module, x: Tensor) -> Tensor:
    """As gates let a few experts through: all others are hidden, by scores of minus infinity."""
    best, places = x.topk(3, -1)
    return torch.softmax(torch.full_like(x, -torch.inf).scatter(-1, places, best), -1) + places[..., :1] * 0.1


def written_over(_: nn.Module, x: Tensor) -> Tensor:
    """As states begin from one row for all; then an angle over a zero that has a sign."""
    state = torch.zeros([4, 8]) + 1.0
    state.copy_(torch.arange(8.0).unsqueeze(0))
    return x * state + torch.atan2(x.abs() + 1, -torch.relu(-x.abs())) * state.sum(0)


RARER = (
    the_best_alone,
    written_over,
    counted,
    interleaved,
    one_key_for_all,
    windows,
    noisy,
    whole_numbers_gathered,
    measured,
    masked_stacks,
)


@pytest.mark.parametrize(
    "habit",
    [
        shifted,
        *(pytest.param(habit, marks=pytest.mark.slow) for habit in RARER),
    ],
)
def test_a_habit_of_sequence_models_trains_as_in_torch(
    habit: Callable[[nn.Module, Tensor], Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    compile_model(spec_of(Around(habit), 4, 6), tmp_path, BOTH)


def test_what_is_written_at_places_trains_as_in_torch(tmp_path: Path) -> None:
    torch.manual_seed(1)
    compile_model(spec_of(Around(joined_to_themselves), 4, 6), tmp_path)


class StandardisedConv(nn.Conv2d):
    """Weights without mean and scale, by a batch norm that keeps no statistics."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        return F.conv2d(x, F.batch_norm(flat, None, None, training=True).reshape_as(self.weight), self.bias)


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 1)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Sequential(
            nn.AvgPool2d(2, 2, ceil_mode=True),
            nn.AvgPool2d(3, 1, 1, count_include_pad=False),
            nn.AvgPool2d((3, 4), (2, 3), (1, 2), ceil_mode=True, count_include_pad=False),
            nn.AvgPool2d(2, 2, ceil_mode=True, divisor_override=3),
            nn.Flatten(2),
            nn.AvgPool1d(3, 2, 1, True, False),
        ),
        pytest.param(nn.Sequential(StandardisedConv(4, 4, 3), ChannelsLast()), marks=pytest.mark.slow),
        pytest.param(
            nn.Sequential(
                nn.MaxPool2d(2, 2, ceil_mode=True),
                nn.MaxPool2d((3, 2), (2, 3), (1, 0), ceil_mode=True),
                nn.Conv2d(4, 4, (3, 2), padding=(1, 0)),
                nn.ReLU(inplace=True),
                nn.Flatten(2),
                nn.MaxPool1d(2, ceil_mode=True),
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_habit_of_vision_models_trains_as_in_torch(layer: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.Flatten(), nn.LazyLinear(3))
    net(torch.randn(2, 3, 9, 10))
    compile_model(spec_of(net, 3, 9, 10), tmp_path, BOTH)


@pytest.mark.parametrize(
    "settings", [{"mode": "mean", "padding_idx": 0}, pytest.param({"mode": "sum"}, marks=pytest.mark.slow)]
)
def test_a_bag_of_embeddings_trains_as_in_torch(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.EmbeddingBag(9, 4, **settings), nn.Linear(4, 3))
    places = {"x": torch.arange(40).reshape(8, 5) % 7}
    compile_model(replace(spec_of(net), inputs=places), tmp_path, BOTH)


@pytest.mark.parametrize(
    "norm",
    [nn.utils.weight_norm, pytest.param(nn.utils.parametrizations.spectral_norm, marks=pytest.mark.slow)],
)
def test_weights_that_are_worked_out_at_each_call_train_as_in_torch(
    norm: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        net = nn.Sequential(norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    net(torch.randn(2, 6))
    compile_model(spec_of(net, 6), tmp_path, BOTH)


def test_a_module_that_keeps_worked_out_weights_is_measured_and_run_in_torch_too() -> None:
    """Torch refuses to copy those where a gradient hangs on them."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        net = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    spec = replace(spec_of(net, 6), trainable=LoRA(2, ("2",)))
    for work in torch_works(spec, 4).values():
        work()
    assert EagerRuntime(spec).name == "torch"


def unlikeliness(output: Tensor, y: Tensor) -> Tensor:
    return F.gaussian_nll_loss(output[:, 0], y.to(torch.float32), F.softplus(output[:, 1]))


def of_places(output: Tensor, y: Tensor) -> Tensor:
    places = torch.stack([y, y * 0], 1)
    each = F.cross_entropy(output.reshape(-1, 2, 2).transpose(1, 2), (places > 0).to(torch.int64), reduction="none")
    return (each * (places < 2)).mean()


@pytest.mark.parametrize("loss", [pytest.param(unlikeliness, marks=pytest.mark.slow), of_places])
def test_a_loss_of_single_places_trains_as_in_torch(loss: Callable[[Tensor, Tensor], Tensor], tmp_path: Path) -> None:
    torch.manual_seed(1)
    compile_model(replace(spec_of(nn.Linear(6, 4), 6), loss=loss), tmp_path, BOTH)


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(torch.tanh, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (
            nn.Sequential(nn.DataParallel(nn.Linear(6, 3))),
            "module '0' is a DataParallel; give what it holds as `module`",
        ),
        (Around(lambda _, x: Backwards.apply(x)), r"autograd.Function .*setup_context \(in the module's own forward\)"),
        (Around(checkpointed), r"checkpoints; switch that off"),
        (Around(lambda _, x: x * x[x > 0].sum()), "selecting by a mask; use torch.where"),
    ],
)
def test_what_no_trace_goes_through_is_refused_with_what_to_do(module: nn.Module, match: str, tmp_path: Path) -> None:
    with pytest.raises(CannotCompile, match=match):
        compile_model(spec_of(module, 4, 6), tmp_path)


class Named(nn.Module):
    """Answers under names, among things that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        hidden = torch.tanh(self.body(x))
        return {"hidden": hidden, "loss": None, "logits": self.head(hidden), "balance": hidden.square().mean()}


def named_spec(*outputs: str) -> ModelSpec:
    return ModelSpec(
        "named",
        Named(),
        lambda output, y: F.cross_entropy(output["logits"], y) + output["balance"],
        {"x": torch.randn(8, 6)},
        {"y": torch.arange(8) % 3},
        outputs=outputs,
        metrics={},
    )


def test_of_a_dict_the_named_answers_are_taken(tmp_path: Path) -> None:
    torch.manual_seed(1)
    manifest = compile_model(named_spec("logits", "hidden"), tmp_path, BOTH).bundle.manifest
    assert [(spec.name, spec.shape) for spec in manifest.outputs] == [("logits", (None, 3)), ("hidden", (None, 4))]


def test_a_dict_without_a_named_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotCompile, match=r"a dict of hidden, loss, logits, balance, without scores.*outputs"):
        compile_model(named_spec("scores"), tmp_path)


def test_the_gate_forgives_what_torch_does_to_itself_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As batch norm over two numbers needs it, where rounding comes to thousandths; here the gate is made as tight."""
    torch.manual_seed(1)
    spec = spec_of(nn.Sequential(nn.Flatten(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 3)), 4, 6)
    monkeypatch.setattr(parity, "STEP_TOLERANCE", 1e-12)
    assert compile_model(spec, tmp_path / "forgiven").parity["onnx"].train_short < 1e-6
    monkeypatch.setattr(parity, "ROUNDING_MARGIN", 0)
    with pytest.raises(ParityFailed, match=r"train \(step 1\)"):
        compile_model(spec, tmp_path / "refused")
