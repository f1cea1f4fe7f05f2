"""The nets of the matrix: a shape of one example, and what is built, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Tokens(nn.Module):
    """A small Transformer over eleven tokens, with causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        heads = [f(self.norm(x)).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.query, self.key, self.value)]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + mixed.transpose(1, 2).flatten(2)
        logits: Tensor = self.head(x.mean(1))
        return logits


class Recurrent(nn.Module):
    """The last step of a recurrent net over steps of twelve numbers."""

    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.recurrent = kind(12, 4, batch_first=True, **settings)
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.recurrent(x)[0][:, -1])
        return logits


class Cells(nn.Module):
    """A loop that its author wrote, over steps of twelve numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.head = nn.LSTMCell(12, 4), nn.GRUCell(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        long = short = x.new_zeros(x.shape[0], 4)
        top = x.new_zeros(x.shape[0], 3)
        for step in x.unbind(1):
            short, long = self.lstm(step, (short, long))
            top = self.gru(short, top)
        logits: Tensor = self.head(top)
        return logits


class Encoder(nn.Module):
    """Torch's own encoder layer, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.2, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(x).mean(1))
        return logits


class Attending(nn.Module):
    """Torch's own attention over four steps of twelve numbers, each of which sees none that comes later."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(12, 3, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        later = nn.Transformer.generate_square_subsequent_mask(4)
        mixed = self.attention(x, x, x, attn_mask=later, is_causal=True, need_weights=False)[0]
        logits: Tensor = self.head(mixed.mean(1))
        return logits


class Branches(nn.Module):
    """Two ways from one tensor, joined, and a way around both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.narrow, self.wide = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        joined = torch.cat([torch.relu(self.narrow(stem)), torch.sigmoid(self.wide(stem))], 1)
        return (joined + stem)[:, :3]


def residual() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    return images(Around(body), nn.ReLU())


class Beside(nn.Module):
    """Ways from the same numbers, side by side: one net for all takes a third of the time of a net for each."""

    def __init__(self, *ways: nn.Module) -> None:
        super().__init__()
        self.ways = nn.ModuleList(ways)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([way(x).flatten(1) for way in self.ways], 1)


class Around(nn.Module):
    """A module, and a way around it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        around: Tensor = x + self.body(x)
        return around


def images(*layers: nn.Module) -> nn.Module:
    """A net over [N, 4, 9, 9]."""
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


def series(*layers: nn.Module) -> nn.Module:
    """A net over [N, 4, 12]."""
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


def dense(*layers: nn.Module) -> nn.Module:
    """A net over [N, 6]."""
    return nn.Sequential(nn.Linear(6, 8), *layers, nn.LazyLinear(3))


NETS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "conv2d": (
        (4, 9, 9),
        lambda: images(
            nn.Conv2d(4, 4, 1),
            Beside(
                nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 3, 3)),
                nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU6()),
                nn.Conv2d(4, 3, 2, stride=2),  # leaves inputs unseen
            ),
        ),
    ),
    "conv2d strided, dilated, grouped": (
        (4, 9, 9),
        lambda: images(nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), nn.Tanh(), nn.Conv2d(6, 2, 1)),
    ),
    "conv2d transposed": (
        (4, 9, 9),
        lambda: images(
            nn.Conv2d(4, 4, 1),
            Beside(
                nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
                nn.ConvTranspose2d(4, 4, 2, groups=2, dilation=2),
            ),
        ),
    ),
    "conv1d same": ((4, 12), lambda: series(nn.Conv1d(4, 5, 5, padding="same"), nn.GELU(), nn.Conv1d(5, 3, 2))),
    "conv1d strided, transposed": (
        (4, 12),
        lambda: series(
            nn.Conv1d(4, 4, 1),
            Beside(
                nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
                nn.ConvTranspose1d(4, 3, 4, stride=2, padding=1),
            ),
        ),
    ),
    "pooling": (
        (4, 9, 9),
        lambda: images(
            nn.Conv2d(4, 3, 1),
            Beside(
                nn.MaxPool2d(2),
                nn.MaxPool2d(3, 2, padding=1),
                nn.AvgPool2d(3, 2, padding=1),
                nn.AdaptiveAvgPool2d(1),
            ),
        ),
    ),
    "pooling, adaptive": (
        (4, 9, 9),
        lambda: images(nn.Conv2d(4, 3, 1), Beside(nn.AdaptiveMaxPool2d(1), nn.AdaptiveAvgPool2d(3), nn.AvgPool2d(3))),
    ),
    "pooling 1d": (
        (4, 12),
        lambda: series(
            nn.Conv1d(4, 3, 1),
            Beside(nn.MaxPool1d(3), nn.MaxPool1d(3, 2, padding=1), nn.AvgPool1d(4), nn.AvgPool1d(3, 2)),
        ),
    ),
    "norms of channels": (
        (4, 9, 9),
        lambda: images(
            nn.Conv2d(4, 6, 3),
            Beside(
                nn.GroupNorm(3, 6),
                nn.BatchNorm2d(6),
                nn.InstanceNorm2d(6, affine=True),
                nn.Sequential(nn.Flatten(2), nn.InstanceNorm1d(6, affine=True, track_running_stats=True)),
            ),
            nn.ReLU(),
        ),
    ),
    "norms of numbers": (
        (6,),
        lambda: dense(
            Beside(
                nn.BatchNorm1d(8),
                nn.LayerNorm(8),
                nn.LayerNorm(8, bias=False),
                nn.LayerNorm(8, elementwise_affine=False),
                nn.RMSNorm(8),
            ),
            nn.ReLU(),
        ),
    ),
    "activations": (
        (6,),
        lambda: dense(
            Beside(
                nn.ELU(),
                nn.LeakyReLU(0.1),
                nn.Softplus(),
                nn.SiLU(),
                nn.Mish(),
                nn.GELU("tanh"),
                nn.Hardswish(),
                nn.Hardtanh(),
                nn.Hardsigmoid(),
                nn.SELU(),
                nn.CELU(0.5),
                nn.PReLU(),
                nn.Tanh(),
                nn.Sigmoid(),
                nn.Softsign(),
                nn.Tanhshrink(),
                nn.LogSigmoid(),
                nn.ReLU6(),
                nn.GLU(),
                nn.Softmax(-1),
                nn.LogSoftmax(-1),
            )
        ),
    ),
    "functions of a row": (
        (6,),
        lambda: dense(
            Beside(
                Apply(lambda x: x * (x > 1).any(1, True) + x * (x > -1).all(1, True) + (x > 0).any()),
                Apply(lambda x: x * F.one_hot(x.argmax(1), 8)),
                Apply(lambda x: torch.cat([x, x.amax(1, True), x.mean(1, True), (x - x.mean()) ** 2], 1)),
                Apply(lambda x: torch.cat([x, x.max(1, keepdim=True)[0], x.min(1, keepdim=True)[0]], 1)),
                Apply(lambda x: torch.stack([x[:, :4], x[:, 4:].flip(1), x[:, ::2]], 1)),
                Apply(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1) * x.split(4, 1)[0][:, :1]),
                Apply(lambda x: x / (x.norm(dim=1, keepdim=True) + 1)),
            )
        ),
    ),
    "dropout": (
        (6,),
        lambda: dense(nn.Dropout(0.5), nn.SELU(), nn.AlphaDropout(0.2), nn.Dropout(0.1)),
    ),
    "dropout of channels": ((4, 9, 9), lambda: images(nn.Conv2d(4, 3, 1), nn.Dropout2d(0.3))),
    "lstm": ((4, 12), lambda: Recurrent(nn.LSTM)),
    "lstm with layers, both ways, dropout": (
        (2, 12),
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True, dropout=0.3),
    ),
    "gru": ((3, 12), lambda: Recurrent(nn.GRU)),
    "gru with layers, dropout, no bias": ((2, 12), lambda: Recurrent(nn.GRU, num_layers=2, dropout=0.3, bias=False)),
    "recurrent relu": ((3, 12), lambda: Recurrent(nn.RNN, nonlinearity="relu")),
    "recurrent cells": ((3, 12), Cells),
    "transformer encoder with dropout": ((4, 12), Encoder),
    "multi-head attention, causal": ((4, 12), Attending),
    "residual": ((4, 9, 9), residual),
    "branches": ((6,), Branches),
    "enlarging": (
        (4, 9, 9),
        lambda: images(
            nn.Conv2d(4, 2, 3), nn.Upsample(scale_factor=2), nn.AvgPool2d(3), nn.Upsample((7, 6), mode="bilinear")
        ),
    ),
    "padding by what stands at the edges": (
        (4, 9, 9),
        lambda: images(
            nn.ReflectionPad2d(1), nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"), nn.ReplicationPad2d(1)
        ),
    ),
    "deviation, similarity, roll": (
        (6,),
        lambda: dense(
            Apply(lambda x: x.roll(1, 1) / (x.std(1, keepdim=True) + 1) + F.cosine_similarity(x, x * x)[:, None])
        ),
    ),
    "linear over positions": (
        (4, 12),
        lambda: nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)),
    ),
    "matrix products": (
        (4, 12),
        lambda: series(
            nn.Conv1d(4, 4, 1),
            Beside(
                Apply(lambda x: torch.einsum("nct,ndt->ncd", x, x) / 12),
                Apply(lambda x: x @ x.transpose(1, 2) / 12),
                Apply(lambda x: torch.eye(4) @ x + x[:, :, :4].mT @ x),
            ),
        ),
    ),
    "padding": ((4, 12), lambda: series(nn.ConstantPad1d((1, 2), 0.5), nn.Conv1d(4, 3, 3))),
}

SLOW = {
    "activations",
    "pooling",
    "norms of channels",
    "multi-head attention, causal",
    "functions of a row",
    "functions of a number",
    "places along a dimension",
    "conv2d transposed",
    "conv1d same",
    "padding",
    "enlarging",
    "conv2d",
    "conv1d strided, transposed",
    "pooling, adaptive",
    "pooling 1d",
    "norms of numbers",
    "dropout",
    "dropout of channels",
    "lstm",
    "lstm with layers, both ways, dropout",
    "gru",
    "gru with layers, dropout, no bias",
    "recurrent relu",
    "recurrent cells",
    "transformer encoder with dropout",
    "residual",
    "branches",
    "padding by what stands at the edges",
    "deviation, similarity, roll",
    "linear over positions",
    "matrix products",
    "functions called by keywords",
    "rarer functions of a number",
    "angles",
    "norms of any order",
    "sort, topk",
    "places along neighbouring dimensions",
    "diagonals",
    "distances",
    "local response norm",
    "pooling to a size",
    "pooling over three dimensions",
    "resizing",
    "windows as columns",
    "bilinear",
}
"""Nets of which another is alike in kind, or tested by itself, or that few models have: for `make test-all`."""
