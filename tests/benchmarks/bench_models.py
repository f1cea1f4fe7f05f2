"""The models of the simulation's benchmark, as the compiler and a bare torch loop both take them."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import nn

from umbel_models.optimizers import SGD
from umbel_models.spec import ModelSpec
from umbel_models.trainable import Head, every_weight
from umbel_models.zoo import shakespeare as zoo_shakespeare


class LeNet(nn.Module):
    """LeNet-5 with ReLU and max-pooling, for images of 28 x 28."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.dense1 = nn.Linear(400, 120)
        self.dense2 = nn.Linear(120, 84)
        self.head = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        scores: torch.Tensor = self.head(F.relu(self.dense2(F.relu(self.dense1(x.flatten(1))))))
        return scores


def mlp() -> ModelSpec:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    return _images("bench-mlp", dense, (784,))


def lenet() -> ModelSpec:
    torch.manual_seed(0)
    return _images("bench-lenet", LeNet(), (1, 28, 28))


def wide(*, head_only: bool = False) -> ModelSpec:
    """12.6 million weights, most of them in two dense layers."""
    torch.manual_seed(0)
    layers = nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 2048), nn.ReLU(), nn.Linear(2048, 10)
    trained = Head() if head_only else every_weight
    inputs, targets = {"x": torch.randn(16, 1024)}, {"y": torch.arange(16) % 10}
    optimizer = SGD(lr=0.01, momentum=0.9)
    return ModelSpec(
        "bench-wide", nn.Sequential(*layers), F.cross_entropy, inputs, targets, optimizer=optimizer, trainable=trained
    )


def shakespeare() -> ModelSpec:
    """The zoo's Transformer, under plain gradient descent like the others."""
    return replace(zoo_shakespeare.spec(), optimizer=SGD(lr=0.05))


def _images(name: str, module: nn.Module, shape: tuple[int, ...]) -> ModelSpec:
    inputs, targets = {"x": torch.rand(16, *shape)}, {"y": torch.arange(16) % 10}
    return ModelSpec(name, module, F.cross_entropy, inputs, targets, optimizer=SGD(lr=0.05))
