"""Which shoulder exercise a wrist is doing: two seconds of a smartwatch's motion sensors in, seven scores out.

The data come inside the `seglearn` package (Burns et al., 2018, https://arxiv.org/abs/1802.01489): 6 axes at 50 Hz,
seven exercises, ten people, both wrists. The model scales its input by fixed physical units, so that no statistic of
anybody's data is needed to begin with.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor, nn

from umbel_models.optimizers import SGD, Proximal
from umbel_models.spec import ModelSpec
from umbel_models.zoo.building import seeded

LABELS: Final = (
    "pendulum",
    "abduction",
    "forward elevation",
    "internal rotation",
    "external rotation",
    "trapezius extension",
    "upright row",
)
AXES: Final = 6
STEPS: Final = 100
# Acceleration is in g; 3 rad/s is a brisk turn of the wrist.
UNITS: Final = (1.0, 1.0, 1.0, 3.0, 3.0, 3.0)


class Smartwatch(nn.Module):
    """Two convolutions over time, then the mean and the peak of each channel; 12,391 weights."""

    units: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("units", torch.tensor(UNITS).reshape(AXES, 1))
        self.conv1 = nn.Conv1d(AXES, 32, 5, padding=2)
        self.norm1 = nn.GroupNorm(8, 32)
        self.conv2 = nn.Conv1d(32, 64, 5, padding=2)
        self.norm2 = nn.GroupNorm(8, 64)
        self.head = nn.Linear(128, len(LABELS))

    def forward(self, x: Tensor) -> Tensor:
        """Motion [N, 6, 100] (g and rad/s) to scores [N, 7]."""
        x = F.relu(self.norm1(self.conv1(x / self.units)))
        x = F.max_pool1d(x, 2)
        x = F.relu(self.norm2(self.conv2(x)))
        # The peak as a pooling over the whole length: its gradient is one operator, that of amax is eight.
        peak = F.max_pool1d(x, x.shape[2]).squeeze(2)
        logits: Tensor = self.head(torch.cat([x.mean(2), peak], 1))
        return logits


def spec(seed: int = 0) -> ModelSpec:
    """The model with fresh weights, and made-up motion as examples."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(STEPS) / 50.0
    speeds = torch.rand(16, AXES, 1, generator=generator) * 3 + 0.3
    sizes = torch.randn(16, AXES, 1, generator=generator) * torch.tensor(UNITS).reshape(AXES, 1)
    return ModelSpec(
        name="smartwatch",
        module=seeded(Smartwatch, seed),
        loss=F.cross_entropy,
        inputs={"x": sizes * torch.sin(6.2831853 * speeds * time)},
        targets={"y": torch.arange(16) % len(LABELS)},
        optimizer=Proximal(SGD(lr=0.05)),
        labels=LABELS,
        description="Shoulder exercises from 2 s of wrist motion: x is acceleration (g) and rotation (rad/s) at 50 Hz",
    )
