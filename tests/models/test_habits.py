"""Habits of models that others wrote: each is met whole in a published one, and stands here as small as it can be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from umbel.errors import CannotCompile, ParityFailed
from umbel_models import parity
from umbel_models.compile import compile_model
from umbel_models.optimizers import SGD
from umbel_models.spec import ModelSpec

BOTH = ("onnx", "litert")


class Around(nn.Module):
    """A function between two dense layers over positions: [N, 4, 6] to [N, 3]."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

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
    """As masks of attention are looked up by the number of the example."""
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


def asks_whether_it_is_exported(_: nn.Module, x: Tensor) -> Tensor:
    """As masks leave out what they would otherwise ask the numbers of."""
    return x if torch.compiler.is_exporting() or bool((x > -1e9).all()) else x * 0


@pytest.mark.parametrize(
    "habit",
    [
        shifted,
        interleaved,
        windows,
        noisy,
        counted,
        one_key_for_all,
        whole_numbers_gathered,
        asks_whether_it_is_exported,
    ],
)
def test_a_habit_of_sequence_models_trains_as_in_torch(
    habit: Callable[[nn.Module, Tensor], Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    compile_model(spec_of(Around(habit), 4, 6), tmp_path, BOTH)


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
        nn.AvgPool2d(2, 2, ceil_mode=True),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.AvgPool2d((3, 4), (2, 3), (1, 2), ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d(2, 2, ceil_mode=True, divisor_override=3),
        nn.Sequential(nn.Flatten(2), nn.AvgPool1d(3, 2, 1, True, False)),
        StandardisedConv(4, 4, 3),
        ChannelsLast(),
    ],
)
def test_a_habit_of_vision_models_trains_as_in_torch(layer: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.Flatten(), nn.LazyLinear(3))
    net(torch.randn(2, 3, 5, 6))
    compile_model(spec_of(net, 3, 5, 6), tmp_path, BOTH)


class Named(nn.Module):
    """Answers under names, among things that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        hidden = torch.tanh(self.body(x))
        return {"hidden": hidden, "loss": None, "logits": self.head(hidden)}


def named_spec(*outputs: str) -> ModelSpec:
    return ModelSpec(
        "named",
        Named(),
        lambda output, y: F.cross_entropy(output["logits"], y),
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
    with pytest.raises(CannotCompile, match=r"a dict of hidden, loss, logits, without scores.*outputs"):
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
