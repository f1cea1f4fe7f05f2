"""A bare torch loop over clients, one thread, written lean: no optimiser object, gradients applied in place.

The second argument says which model: mlp, or a ModelSpec as module:function of the zoo.
"""

from __future__ import annotations

import sys
from importlib import import_module

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import nn
from turns import BATCH, RATE, Turns, cohort, load, order

torch.set_num_threads(1)
torch.manual_seed(0)
x, y, held_x, held_y = map(torch.from_numpy, load())
loss = F.cross_entropy
if sys.argv[2] == "mlp":
    model: nn.Module = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
else:
    module, _, name = sys.argv[2].partition(":")
    spec = getattr(import_module(module), name)()
    model, loss = spec.module.train(), spec.loss
weights = list(model.parameters())


def accuracy() -> float:
    with torch.no_grad():
        return float((model(held_x).argmax(-1) == held_y).float().mean())


turns, number = Turns(), 0
turns.ready()
while True:
    number += 1
    base = [weight.detach().clone() for weight in weights]
    total = [torch.zeros_like(weight) for weight in weights]
    members = cohort(number, len(x))
    for user in members:
        with torch.no_grad():
            for weight, old in zip(weights, base, strict=True):
                weight.copy_(old)
        rows = torch.from_numpy(order(number, user, len(x[user])))
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            for weight in weights:
                weight.grad = None
            loss(model(x[user][batch]), y[user][batch]).backward()
            with torch.no_grad():
                for weight in weights:
                    if weight.grad is not None:
                        weight.sub_(weight.grad, alpha=RATE)
        with torch.no_grad():
            for summed, weight, old in zip(total, weights, base, strict=True):
                summed += weight - old
    with torch.no_grad():
        for summed, weight, old in zip(total, weights, base, strict=True):
            weight.copy_(old + summed / len(members))
    turns.round_done(accuracy)
