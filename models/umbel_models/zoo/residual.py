"""A small residual net (He et al., 2015) for the digits of `umbel_models.zoo.digits`, with group or batch norm.

Group norm is the one to federate: it keeps no running statistics, which devices with different data disagree on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor, nn

from umbel_models.optimizers import SGD, Proximal
from umbel_models.spec import ModelSpec
from umbel_models.zoo.building import seeded
from umbel_models.zoo.digits import LABELS

Norm = Callable[[int], nn.Module]


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels)


class Block(nn.Module):
    """Two convolutions beside a short cut, [N, in, H, W] to [N, out, H / stride, W / stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = norm(outputs)
        self.cut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the convolutions make of x to x."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.cut(x))


class Residual(nn.Module):
    """A convolution, three blocks, the mean over the image: 77,562 weights."""

    def __init__(self, norm: Norm = _group_norm) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.norm = norm(16)
        self.blocks = nn.Sequential(Block(16, 16, 1, norm), Block(16, 32, 2, norm), Block(32, 64, 2, norm))
        self.head = nn.Linear(64, len(LABELS))

    def forward(self, x: Tensor) -> Tensor:
        """Pixels [N, 1, 8, 8] from 0 to 16, to scores [N, 10]."""
        x = F.relu(self.norm(self.stem(x / 16.0)))
        logits: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return logits


def spec(seed: int = 0) -> ModelSpec:
    """The net with group norm."""
    return _spec("residual", Residual, seed)


def batch_normed(seed: int = 0) -> ModelSpec:
    """The net with batch norm, whose running statistics travel with the weights."""
    return _spec("residual-batch-norm", lambda: Residual(nn.BatchNorm2d), seed)


def _spec(name: str, build: Callable[[], nn.Module], seed: int) -> ModelSpec:
    generator = torch.Generator().manual_seed(seed)
    return ModelSpec(
        name=name,
        module=seeded(build, seed),
        loss=F.cross_entropy,
        inputs={"x": torch.randint(0, 17, (16, 1, 8, 8), generator=generator).to(torch.float32)},
        targets={"y": torch.arange(16) % len(LABELS)},
        optimizer=Proximal(SGD(lr=0.05)),
        labels=LABELS,
        description="Handwritten digits of 8 x 8 pixels from 0 to 16, by a residual net",
    )
