"""A small model, devices that really train it, and their sealed reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from umbel.digests import Digest
from umbel.identity import DeviceId
from umbel.messages import update_to_bytes
from umbel.plan import Kind, Plan
from umbel.randomness import generator
from umbel.sealing import Binding, Sealing, seal
from umbel.update import Update
from umbel.weights import Shapes, Weights
from umbel_server.aggregation import Aggregator, LeaderKey, SealedReport
from umbel_server.cohort import CohortOrder
from umbel_server.validation import ReportRules

FEATURES = 8
TRUE = np.arange(FEATURES, dtype=np.float32)
SHAPES = {"p_bias": (), "p_slope": (FEATURES,)}
METRICS = frozenset({"loss", "examples", "error[0]", "error[1]", "train_loss", "train_examples"})
RULES = ReportRules(SHAPES, METRICS, max_weight=1000.0, max_norm=100.0)
ZERO = Weights.zeros(SHAPES)


@dataclass(frozen=True, slots=True)
class Learner:
    """A device with its own examples of one line, y = x . TRUE + 1, that descends the gradient."""

    name: str
    examples: int = 60

    def train(self, base: Weights, plan: Plan, round_number: int = 1) -> Update:
        chance = generator(plan.seed, "learner", round_number, self.name)
        x = chance.normal(size=(self.examples, FEATURES)).astype(np.float32)
        y = x @ TRUE + np.float32(1)
        slope, bias = base["p_slope"].copy(), base["p_bias"].copy()
        loss = float(np.sum((x @ slope + bias - y) ** 2))
        far = float(np.sum(np.abs(x @ slope + bias - y) > 1))
        counts = {"error[0]": self.examples - far, "error[1]": far}
        metrics = {"loss": loss, "examples": float(self.examples)} | counts
        if plan.kind is Kind.EVALUATE:
            return Update(Weights({}), float(self.examples), metrics)
        rate = np.float32(plan.hyperparameters.get("lr", 0.05))
        for _ in range(plan.epochs * 10):
            error = x @ slope + bias - y
            slope = slope - rate * (2 * x.T @ error / len(x))
            bias = bias - rate * 2 * error.mean()
        metrics |= {"train_loss": loss, "train_examples": float(self.examples)}
        trained = Weights({"p_slope": slope, "p_bias": np.asarray(bias)})
        return Update(trained - base, float(self.examples), metrics)


def learners(count: int) -> list[Learner]:
    return [Learner(f"device-{index}", examples=40 + 5 * index) for index in range(count)]


class InProcessPort:
    """A cohort port whose devices train in this process; `spoil` changes what some of them report."""

    def __init__(self, devices: Sequence[Learner], spoil: Mapping[str, Update] | None = None) -> None:
        self._devices = {DeviceId(device.name): device for device in devices}
        self._spoil = dict(spoil or {})
        self.orders: list[CohortOrder] = []

    def shapes(self) -> Shapes:
        return SHAPES

    def rules(self, order: CohortOrder) -> ReportRules:
        shapes = SHAPES if order.plan.kind is Kind.TRAIN else {}
        return ReportRules(shapes, METRICS, RULES.max_weight, RULES.max_norm)

    def device_ids(self) -> Sequence[DeviceId]:
        return list(self._devices)

    def run(self, order: CohortOrder, timeout: float | None) -> Sequence[tuple[DeviceId, Update]]:
        self.orders.append(order)
        found = []
        for device in order.devices:
            update = self._devices[device].train(order.weights, order.plan, order.round_number)
            if order.plan.kind is Kind.TRAIN:
                update = self._spoil.get(device, update)
            found.append((device, update))
        return found


def binding_of(sequence: int, round_number: int = 1) -> Binding:
    return Binding("task", round_number, f"session-{sequence}", f"{sequence:032x}", Digest("0" * 64))


def sealed(update: Update | bytes, key: LeaderKey, sequence: int, sealing: Sealing | None = None) -> SealedReport:
    body = update if isinstance(update, bytes) else update_to_bytes(update)
    binding = binding_of(sequence)
    return SealedReport(binding, seal(body, sealing or key.sealing, binding), sequence)


def report_all(updates: Sequence[Update], key: LeaderKey, aggregator: Aggregator) -> None:
    for sequence, update in enumerate(updates):
        aggregator.accept(sealed(update, key, sequence))


def cohort(count: int, base: Weights = ZERO, round_number: int = 1) -> list[Update]:
    return [device.train(base, Plan(), round_number) for device in learners(count)]
