"""A matrix of layers and losses: each compiles, answers and trains as in torch, at several batch sizes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.models.function_nets import FUNCTIONS
from tests.models.nets import NETS, SLOW, Tokens
from umbel.runtime.litert import LiteRTRuntime
from umbel.runtime.onnx import OnnxRuntime
from umbel_models.compile import compile_model
from umbel_models.optimizers import SGD
from umbel_models.spec import ModelSpec
from umbel_models.translation import INSTEAD

MATRIX = NETS | FUNCTIONS


def compile_net(module: nn.Module, inputs: Tensor, target: Tensor, loss: Callable[..., Tensor], folder: Path) -> None:
    module(inputs)  # lets lazy layers find their sizes
    spec = ModelSpec("net", module, loss, {"x": inputs}, {"y": target}, metrics={}, optimizer=SGD(lr=0.05))
    compile_model(spec, folder, ("onnx", "litert"))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MATRIX])
def test_a_layer_answers_and_trains_as_in_torch(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    shape, build = MATRIX[name]
    compile_net(build(), torch.randn(12, *shape), torch.arange(12) % 3, F.cross_entropy, tmp_path)


@pytest.mark.slow  # tied weights, attention over one key and modules of attention are quick tests
def test_an_embedding_with_causal_attention_trains_as_in_torch(tmp_path: Path) -> None:
    torch.manual_seed(1)
    compile_net(Tokens(), torch.randint(0, 11, (12, 5)), torch.arange(12) % 3, F.cross_entropy, tmp_path)


class Masked(nn.Module):
    """Attention over tokens, where a second input says which of them are there."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor, there: Tensor) -> Tensor:
        x = self.embedding(tokens)
        q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=there[:, None, None, :])
        logits: Tensor = self.head(mixed.transpose(1, 2).flatten(2).mean(1))
        return logits


@pytest.mark.slow  # as the one before
def test_a_mask_of_attention_may_be_an_input_and_may_hide_everything(tmp_path: Path) -> None:
    torch.manual_seed(1)
    there = torch.arange(5) < torch.arange(12).remainder(6)[:, None]
    assert not there[0].any()
    inputs = {"tokens": torch.randint(0, 11, (12, 5)), "there": there}
    spec = ModelSpec("masked", Masked(), F.cross_entropy, inputs, {"y": torch.arange(12) % 3}, optimizer=SGD(0.05))
    compile_model(spec, tmp_path, ("onnx", "litert"))


class Siblings(nn.Module):
    """Two inputs in, two outputs out."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, near: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
        mixed = torch.tanh(self.left(near) + self.right(far))
        return mixed, mixed.mean(1)


def two_losses(output: tuple[Tensor, Tensor], pattern: Tensor, level: Tensor) -> Tensor:
    return F.mse_loss(output[0], pattern) + F.mse_loss(output[1], level)


def test_several_inputs_targets_and_outputs_keep_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = ModelSpec(
        "siblings",
        Siblings(),
        two_losses,
        {"near": torch.randn(6, 3), "far": torch.randn(6, 2)},
        {"pattern": torch.randn(6, 4), "level": torch.randn(6)},
        outputs=("mixed", "mean"),
        metrics={"error": lambda output, _, level: (output[1] - level).abs().sum()},
    )
    bundle = compile_model(spec, tmp_path, ("onnx", "litert")).bundle
    assert bundle.manifest.metrics == ("loss", "error", "examples")
    for runtime in (OnnxRuntime(), LiteRTRuntime()):
        answers = runtime.infer(bundle, bundle.weights())(bundle.golden().inputs)
        assert {name: array.shape for name, array in answers.items()} == {"mixed": (6, 4), "mean": (6,)}


class Tied(nn.Module):
    """The head shares the embedding's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.mix(self.embedding(tokens))).mean(1))
        return logits


def test_weights_that_are_tied_are_one_weight(tmp_path: Path) -> None:
    torch.manual_seed(1)
    spec = ModelSpec("tied", Tied(), F.cross_entropy, {"x": torch.randint(0, 7, (12, 5))}, {"y": torch.arange(12) % 7})
    bundle = compile_model(spec, tmp_path, ("onnx", "litert")).bundle
    assert set(bundle.manifest.shared_shapes) == {"p_embedding.weight", "p_mix.bias", "p_mix.weight"}


LOSSES: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "label smoothing": (lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1), torch.arange(12) % 3),
    "class weights": (
        lambda o, y: F.cross_entropy(o, y, weight=torch.tensor([1.0, 2.0, 0.5]), reduction="sum") / y.shape[0],
        torch.arange(12) % 3,
    ),
    "classes of many places": (
        lambda o, y: F.cross_entropy(
            o.reshape(-1, 3, 1).expand(-1, -1, 2), torch.stack([y, (y + 1) % 3], 1), ignore_index=2
        ),
        torch.arange(12) % 3,
    ),
    "squares": (F.mse_loss, torch.linspace(-1, 1, 36).reshape(12, 3)),
    "absolute": (F.l1_loss, torch.linspace(-1, 1, 36).reshape(12, 3)),
    "smooth absolute": (F.smooth_l1_loss, torch.linspace(-1, 1, 36).reshape(12, 3)),
    "huber": (F.huber_loss, torch.linspace(-1, 1, 36).reshape(12, 3)),
    "divergence": (
        lambda o, y: F.kl_div(o.log_softmax(1), y, reduction="batchmean"),
        torch.eye(3)[torch.arange(12) % 3] * 0.9 + 0.1 * torch.arange(3) / 3,
    ),
    "yes or no": (F.binary_cross_entropy_with_logits, (torch.arange(36) % 2).reshape(12, 3).to(torch.float32)),
}


LIKE_OTHERS = {
    "absolute",
    "smooth absolute",
    "huber",
    "class weights",
    "divergence",
    "squares",
    "yes or no",
    "classes of many places",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LIKE_OTHERS else n for n in LOSSES])
def test_a_loss_and_its_gradient_are_those_of_torch(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    loss, target = LOSSES[name]
    compile_net(nn.Linear(6, 3), torch.randn(12, 6), target, loss, tmp_path)


ELSEWHERE = {
    "attention with a mask as input",
    "embedding with causal attention",
    "several inputs and outputs",
    "weights that are tied",
}
"""What has a test of its own in this file."""


def test_the_page_on_what_can_be_compiled_names_what_is_tested() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "what-compiles.md").read_text("utf-8")
    tables, refused = page.split("## What is refused")
    cells = [line.rstrip(" |").rpartition("|")[2] for line in tables.splitlines() if line.startswith("| ")]
    assert {name for cell in cells for name in re.findall("`([^`]+)`", cell)} == {*MATRIX, *LOSSES, *ELSEWHERE}
    assert not [words for words in INSTEAD.values() if words not in refused]
