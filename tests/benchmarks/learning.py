"""What federation costs in accuracy, on real people: twenty wearers of a smartwatch, seven exercises.

Pooled training (all windows on one machine) is what federated training is measured against; a device's own model, the
global one fine-tuned there, against training alone. All of them train through the bundle's own ONNX training graph with
the device's trainer, and federated rounds through the coordinator's aggregate and Flower step; only the network is left
out. Accuracy is over everybody's held-back windows (the last fifth of each recording), mean and worst over wearers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import mean

import numpy as np

from tests.benchmarks.harness import Table, seconds
from umbel.bundle import Bundle
from umbel.clock import SystemClock
from umbel.plan import Plan
from umbel.runtime.onnx import OnnxRuntime
from umbel.update import Aggregate, Update
from umbel.weights import Weights
from umbel_client.examples import Examples, Split
from umbel_client.trainer import Job, evaluate, train
from umbel_models.zoo import bundle_path
from umbel_server.aggregation import Presummed
from umbel_server.flower import StrategySpec, apply, device_hyperparameters
from umbel_simulations.smartwatch import Windows, load_wearers

RUNTIME = OnnxRuntime()
BUNDLE = Bundle.open(bundle_path("smartwatch"))
START = BUNDLE.shared_weights()
CLOCK = SystemClock()
GAP = "points from pooled to the best global model"


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to federate."""

    title: str
    strategy: StrategySpec
    rounds: int
    epochs: int


RECIPES = (
    Recipe("FedAvg, 15 rounds x 3 epochs", StrategySpec("FedAvg"), 15, 3),
    Recipe("FedProx mu=0.1, 15 rounds x 3 epochs", StrategySpec("FedProx", {"proximal_mu": 0.1}), 15, 3),
    Recipe("FedAvgM 0.9, 45 rounds x 1 epoch", StrategySpec("FedAvgM", {"server_momentum": 0.9}), 45, 1),
)


@cache
def wearers() -> dict[str, Split]:
    return {one.name: Split(_examples(one.training), _examples(one.held_back)) for one in load_wearers()}


def run() -> Table:
    rows: list[tuple[str | float, ...]] = []

    def row(title: str, models: dict[str, Weights] | Weights, spent: float) -> float:
        found = accuracies(models)
        rows.append((title, found.overall, found.mean, found.worst, spent))
        return found.overall

    made: list[Weights] = []
    spent = seconds(lambda: made.append(pooled(epochs=20)))
    best_pooled = row("pooled, 20 epochs", made[-1], spent)
    scores = {}
    for recipe in RECIPES:
        spent = seconds(lambda recipe=recipe: made.append(federated(recipe)))  # type: ignore[misc]
        scores[recipe.title] = (row(recipe.title, made[-1], spent), made[-1])
    best_title = max(scores, key=lambda title: scores[title][0])
    best, weights = scores[best_title]
    kept: list[dict[str, Weights]] = []
    spent = seconds(lambda: kept.append(alone(weights, epochs=5)))
    personal = row("personal: the best of these, 5 epochs more", kept[-1], spent)
    local = {}
    for epochs in (5, 20):
        spent = seconds(lambda epochs=epochs: kept.append(alone(START, epochs=epochs)))  # type: ignore[misc]
        local[epochs] = row(f"local only, {epochs} epochs from scratch", kept[-1], spent)
    ratios = {GAP: 100 * (best_pooled - best)}
    ratios |= {f"points from local, {epochs} epochs, to personal": 100 * (personal - local[epochs]) for epochs in local}
    ratios["personal accuracy"] = personal
    columns = ("way", "accuracy", "mean wearer", "worst wearer", "seconds")
    aims = {GAP: ("<=", 5.0), "personal accuracy": (">=", 0.96)}
    return Table("Learning: 20 wearers of a smartwatch", columns, rows, ratios, aims)


def pooled(epochs: int) -> Weights:
    parts = [split.training for split in wearers().values()]
    x = np.concatenate([part.inputs["x"] for part in parts])
    y = np.concatenate([part.targets["y"] for part in parts])
    plan = Plan(epochs=epochs, batch_size=32, hyperparameters={"lr": 0.05})
    return train(
        Job(plan, "pooled", 1, "all"), BUNDLE, START, Examples({"x": x}, {"y": y}, len(y)), RUNTIME, CLOCK
    ).weights


def federated(recipe: Recipe) -> Weights:
    hyperparameters = {"lr": 0.1} | device_hyperparameters(recipe.strategy)
    plan = Plan(epochs=recipe.epochs, batch_size=16, hyperparameters=hyperparameters)
    current, state = START, b""
    for number in range(1, recipe.rounds + 1):
        total = Aggregate.zero(START.shapes)
        for name, split in wearers().items():
            done = train(Job(plan, recipe.title, number, name), BUNDLE, current, split.training, RUNTIME, CLOCK)
            total.accumulate(Update(done.weights - current, float(split.training.count), {}))
        current, state = apply(recipe.strategy, state, current, Presummed(total), number)
    return current


def alone(start: Weights, epochs: int) -> dict[str, Weights]:
    plan = Plan(epochs=epochs, batch_size=16, hyperparameters={"lr": 0.1 if start is START else 0.05})
    return {
        name: train(Job(plan, "alone", 1, name), BUNDLE, start, split.training, RUNTIME, CLOCK).weights
        for name, split in wearers().items()
    }


@dataclass(frozen=True, slots=True)
class Accuracies:
    """Shares of right answers on held-back windows."""

    overall: float
    mean: float
    worst: float


def accuracies(models: dict[str, Weights] | Weights) -> Accuracies:
    found = {}
    for name, split in wearers().items():
        weights = models if isinstance(models, Weights) else models[name]
        found[name] = evaluate(BUNDLE, weights, split.held_back, RUNTIME)
    shares = [one["correct"] / one["examples"] for one in found.values()]
    overall = sum(one["correct"] for one in found.values()) / sum(one["examples"] for one in found.values())
    return Accuracies(overall, mean(shares), min(shares))


def _examples(windows: Windows) -> Examples:
    return Examples({"x": windows.x}, {"y": windows.y}, len(windows))
