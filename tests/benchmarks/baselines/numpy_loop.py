"""A bare loop in numpy: 784-64-10, client after client, as one would write it without any framework."""

from __future__ import annotations

from typing import Any

import numpy as np
from turns import BATCH, RATE, Turns, cohort, load, order

x, y, held_x, held_y = load()
rng = np.random.default_rng(0)
weights = [
    rng.uniform(-1, 1, (784, 64)).astype(np.float32) / 28,
    np.zeros(64, np.float32),
    rng.uniform(-1, 1, (64, 10)).astype(np.float32) / 8,
    np.zeros(10, np.float32),
]
rate = np.float32(RATE)


def step(w: list[Any], bx: Any, by: Any) -> None:
    hidden = np.maximum(bx @ w[0] + w[1], 0)
    scores = hidden @ w[2] + w[3]
    scores -= scores.max(1, keepdims=True)
    shares = np.exp(scores)
    shares /= shares.sum(1, keepdims=True)
    shares[np.arange(len(by)), by] -= 1
    shares /= np.float32(len(by))
    back = (shares @ w[2].T) * (hidden > 0)
    w[2] -= rate * (hidden.T @ shares)
    w[3] -= rate * shares.sum(0)
    w[0] -= rate * (bx.T @ back)
    w[1] -= rate * back.sum(0)


def accuracy() -> float:
    hidden = np.maximum(held_x @ weights[0] + weights[1], 0)
    return float(((hidden @ weights[2] + weights[3]).argmax(1) == held_y).mean())


turns, number = Turns(), 0
turns.ready()
while True:
    number += 1
    total = [np.zeros_like(array) for array in weights]
    for user in cohort(number, len(x)):
        local, rows = [array.copy() for array in weights], order(number, user, len(x[user]))
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            step(local, x[user][batch], y[user][batch])
        for summed, new, old in zip(total, local, weights, strict=True):
            summed += new - old
    weights = [old + summed / np.float32(min(50, len(x))) for old, summed in zip(weights, total, strict=True)]
    turns.round_done(accuracy)
