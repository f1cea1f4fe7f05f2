"""Handwritten digits of 8 x 8 pixels, as scikit-learn's `load_digits` has them: a dense net and a small convolution.

Pixels are numbers from 0 to 16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor, nn

from umbel_models.optimizers import SGD, Adam
from umbel_models.spec import ModelSpec
from umbel_models.zoo.building import seeded

LABELS = tuple("0123456789")


class MLP(nn.Module):
    """64 pixels, 32 hidden units, 10 scores."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels [N, 64] to scores [N, 10]."""
        logits: Tensor = self.head(F.relu(self.hidden(x / 16.0)))
        return logits


class CNN(nn.Module):
    """Two convolutions with max-pooling, then a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels [N, 1, 8, 8] to scores [N, 10]."""
        x = F.max_pool2d(F.relu(self.conv1(x / 16.0)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        logits: Tensor = self.head(x.flatten(1))
        return logits


def mlp(seed: int = 0) -> ModelSpec:
    """The dense net, trained by gradient descent with momentum."""
    return _spec("digits-mlp", MLP, (64,), SGD(lr=0.05, momentum=0.9), seed)


def cnn(seed: int = 0) -> ModelSpec:
    """The convolutional net, trained by Adam."""
    return _spec("digits-cnn", CNN, (1, 8, 8), Adam(lr=1e-3), seed)


def _spec(name: str, build: type[nn.Module], shape: tuple[int, ...], optimizer: SGD | Adam, seed: int) -> ModelSpec:
    generator = torch.Generator().manual_seed(seed)
    return ModelSpec(
        name=name,
        module=seeded(build, seed),
        loss=F.cross_entropy,
        inputs={"x": torch.randint(0, 17, (16, *shape), generator=generator).to(torch.float32)},
        targets={"y": torch.arange(16) % 10},
        optimizer=optimizer,
        labels=LABELS,
        description="Handwritten digits of 8 x 8 pixels from 0 to 16",
    )
