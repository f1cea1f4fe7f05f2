"""What a LiteRT graph is made of: operators that its quick kernels take, whatever the layer's settings."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from ai_edge_litert import schema_py_generated as schema
from torch import Tensor, nn

from tests.models.nets import Beside
from umbel.bundle import Bundle
from umbel.runtime.litert import LiteRTRuntime
from umbel_models.compile import compile_model
from umbel_models.optimizers import SGD
from umbel_models.spec import ModelSpec

CONVOLUTIONS = {
    "uneven": ((3, 9, 8), lambda: nn.Conv2d(3, 4, (3, 2), padding=(1, 0))),
    "two by two steps": ((3, 8, 9), lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1)),
    "long steps": ((3, 11, 7), lambda: nn.Conv2d(3, 4, (2, 3), stride=(4, 3))),
    "gaps": ((3, 9, 9), lambda: nn.Conv2d(3, 4, 3, padding=2, dilation=(2, 1))),
    "steps and gaps": ((3, 9, 9), lambda: nn.Conv2d(3, 4, 3, stride=(1, 2), padding=(0, 1), dilation=(2, 2))),
    "one tap, with steps": ((3, 9, 9), lambda: nn.Conv2d(3, 4, 1, stride=2, bias=False)),
    "in time": ((3, 13), lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2)),
    "transposed": ((3, 5, 6), lambda: nn.ConvTranspose2d(3, 4, 3, stride=(2, 3), padding=1)),
}


class Every(nn.Module):
    """Picks every n-th number of a series."""

    def __init__(self, start: int, step: int) -> None:
        super().__init__()
        self.start, self.step = start, step

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.start :: self.step]


class Turning(nn.Module):
    """Turns and turns back, and multiplies by what was turned."""

    def forward(self, x: Tensor) -> Tensor:
        there = x.permute(0, 2, 1).transpose(1, 2)
        scores = torch.bmm(there, x.transpose(1, 2)).unsqueeze(1)
        turned = scores.permute(0, 2, 3, 1).permute(0, 3, 2, 1)
        return (turned * torch.arange(9.0).reshape(3, 3)).sum((1, 3))


def compiled(module: nn.Module, shape: tuple[int, ...], folder: Path) -> Bundle:
    """Compiled for LiteRT, which ends with a comparison with torch: answers, metrics and training steps."""
    torch.manual_seed(1)
    module(torch.zeros(2, *shape))  # lets lazy layers find their sizes
    inputs, targets = {"x": torch.randn(6, *shape)}, {"y": torch.arange(6) % 3}
    spec = ModelSpec("net", module, F.cross_entropy, inputs, targets, optimizer=SGD(lr=0.05))
    return compile_model(spec, folder, ("litert",)).bundle


def operators(bundle: Bundle, signature: str) -> Counter[str]:
    names = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
    model = schema.ModelT.InitFromPackedBuf(bundle.graph_path("litert", signature).read_bytes(), 0)
    codes = [names[code.builtinCode] for code in model.operatorCodes]
    return Counter(codes[operator.opcodeIndex] for graph in model.subgraphs for operator in graph.operators)


QUICK = ("steps and gaps", "transposed")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONVOLUTIONS]
)
def test_a_convolution_trains_as_in_torch_however_its_kernel_moves(name: str, tmp_path: Path) -> None:
    shape, build = CONVOLUTIONS[name]
    # A layer before it, so that there is a gradient with respect to its input too.
    before = nn.Conv1d(3, 3, 1) if len(shape) == 2 else nn.Conv2d(3, 3, 1)
    compiled(nn.Sequential(before, build(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)), shape, tmp_path)


def test_every_nth_number_is_picked_also_where_n_does_not_divide(tmp_path: Path) -> None:
    picked = [Every(start, step) for start in (0, 1, 4) for step in (2, 3, 5)]
    bundle = compiled(nn.Sequential(nn.Linear(11, 11), Beside(*picked), nn.LazyLinear(3)), (11,), tmp_path)
    assert operators(bundle, "infer")["SLICE"] == len(picked)


def test_what_has_constant_weights_is_a_layer_and_what_has_not_is_a_product(tmp_path: Path) -> None:
    bundle = compiled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 3)), (3, 5, 5), tmp_path)
    layers = {"CONV_2D", "FULLY_CONNECTED"}
    assert set(operators(bundle, "infer")) & (layers | {"BATCH_MATMUL"}) == layers
    for signature in ("evaluate", "train"):
        assert set(operators(bundle, signature)) & (layers | {"BATCH_MATMUL"}) == {"BATCH_MATMUL"}


def test_windows_of_a_convolution_are_unfolded_once_for_answer_and_gradient(tmp_path: Path) -> None:
    bundle = compiled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 3)), (3, 5, 5), tmp_path)
    assert operators(bundle, "train")["CONCATENATION"] == 2  # columns, then rows


def test_what_is_turned_twice_is_turned_once_and_within_a_product_not_at_all(tmp_path: Path) -> None:
    found = operators(compiled(nn.Sequential(Turning(), nn.Linear(3, 3)), (3, 4), tmp_path), "infer")
    assert (found["TRANSPOSE"], found["BATCH_MATMUL"]) == (1, 1)


def test_every_run_gives_the_same_numbers_however_memory_lies(tmp_path: Path) -> None:
    """LiteRT 2.3.0 would give others from the second run on in every second session: see `umbel.runtime.litert`."""

    def marked(out: Tensor, y: Tensor) -> Tensor:
        # Comparing whole numbers is not for XNNPACK, so that it gets the graph in several pieces.
        return -(F.log_softmax(out, 1) * (y.unsqueeze(1) == torch.arange(7)).to(out.dtype)).sum(1).mean()

    torch.manual_seed(1)
    layers = (nn.Conv1d(6, 32, 5, stride=2), nn.ReLU(), nn.Conv1d(32, 64, 5, stride=2), nn.ReLU(), nn.Flatten())
    net = nn.Sequential(*layers, nn.Linear(1408, 7))
    spec = ModelSpec("pieces", net, marked, {"x": torch.randn(6, 6, 100)}, {"y": torch.arange(6) % 7})
    bundle = compile_model(spec, tmp_path, ("litert",)).bundle
    chance = np.random.default_rng(0)
    for size in (5, 14, 8, 3) * 4:
        x, y = chance.normal(size=(size, 6, 100)).astype(np.float32), np.arange(size) % 7
        session = LiteRTRuntime().train(bundle, bundle.weights(), {"lr": 0.0})
        assert len({session.step({"x": x}, {"y": y}) for _ in range(4)}) == 1
