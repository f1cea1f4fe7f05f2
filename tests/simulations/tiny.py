"""A dense model of 8 features and 3 classes, and users for it: small enough for many short runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import nn

from umbel.bundle import Bundle
from umbel_client.examples import Examples
from umbel_models.compile import compile_model
from umbel_models.optimizers import SGD, Optimizer
from umbel_models.spec import ModelSpec
from umbel_simulations.data import ClientData, Federation, join
from umbel_simulations.setting import Setting

FEATURES, CLASSES = 8, 3


class Dense(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(FEATURES, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.dropout(F.relu(self.hidden(x))))
        return out


def spec(optimizer: Optimizer, dropout: float = 0.0) -> ModelSpec:
    torch.manual_seed(0)
    inputs, targets = {"x": torch.randn(8, FEATURES)}, {"y": torch.arange(8) % CLASSES}
    return ModelSpec("tiny", Dense(dropout), F.cross_entropy, inputs, targets, optimizer=optimizer)


def compiled(folder: Path, optimizer: Optimizer | None = None, dropout: float = 0.0) -> Bundle:
    compile_model(spec(optimizer or SGD(lr=0.1), dropout), folder)
    return Bundle.open(folder)


def examples(count: int, seed: int) -> Examples:
    """Points of three classes that can be told apart."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, count)
    x = rng.normal(size=(count, FEATURES)) + 2 * np.eye(CLASSES, FEATURES)[y]
    return Examples({"x": x.astype(np.float32)}, {"y": y}, count)


def setting(bundle: Bundle, users: int = 12) -> Setting:
    """Users with 5, 6, 7, … examples."""
    clients = tuple(
        ClientData(f"user{index:02}", examples(5 + index, index), examples(4, 100 + index)) for index in range(users)
    )
    return Setting(bundle, Federation("tiny", clients, join([client.held_back for client in clients])))
