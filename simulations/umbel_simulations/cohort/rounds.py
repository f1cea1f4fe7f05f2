"""One round of a cohort: who is in it, what each client reports, and what they come to together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from umbel.errors import NotFinite
from umbel.plan import Plan
from umbel.randomness import generator
from umbel.update import Aggregate, Metrics, add_metrics
from umbel.weights import Weights
from umbel_client.examples import Examples
from umbel_client.trainer import Job, newest
from umbel_server.aggregation import Collected, Presummed, Singles
from umbel_server.flower.spec import StrategySpec, needs_singles
from umbel_simulations.cohort.clients import Backend, Start, Worker
from umbel_simulations.cohort.pool import Pool
from umbel_simulations.data import ClientData


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """One client's contribution, as one array."""

    delta: NDArray[np.float32]
    """New minus old, shared weights in the order of `Weights.to_vector`."""
    weight: float
    steps: int
    loss: float
    """Sum over the examples seen."""
    examples: int


@dataclass(slots=True, eq=False)
class Cohort:
    """What a round has collected so far: a sum for strategies that are content with one, else every update."""

    start: Start
    singles: bool
    total: NDArray[np.float32] = field(init=False)
    kept: list[Report] = field(default_factory=list)
    weight: float = 0.0
    count: int = 0
    loss: float = 0.0
    examples: int = 0
    silent: int = 0
    """Clients whose training went to NaN or infinity, and who therefore report nothing."""

    def __post_init__(self) -> None:
        self.total = np.zeros_like(self.start.vector)

    def take(self, _client: ClientData, report: Report | None) -> None:
        """Add a report, the next in the cohort's order."""
        if report is None:
            self.silent += 1
            return
        if self.singles:
            self.kept.append(report)
        else:
            # The same two roundings as in `Aggregate.accumulate`.
            np.multiply(report.delta, np.float32(report.weight), out=report.delta)
            np.add(self.total, report.delta, out=self.total)
        self.weight += report.weight
        self.count += 1
        self.loss += report.loss
        self.examples += report.examples

    @property
    def train_loss(self) -> float | None:
        """Mean over the examples that were trained on."""
        return self.loss / self.examples if self.examples else None

    def collected(self) -> Collected:
        """What a strategy is given."""
        shapes = self.start.weights.shapes
        if self.singles:
            deltas = np.stack([report.delta for report in self.kept])
            metrics = tuple(_metrics(report.loss, report.examples) for report in self.kept)
            return Singles(deltas, shapes, tuple(report.weight for report in self.kept), metrics)
        sums = _metrics(self.loss, self.examples)
        return Presummed(Aggregate(shapes, self.total, self.weight, self.count, sums))


def _metrics(loss: float, examples: int) -> Metrics:
    return {TRAIN_LOSS: loss, TRAIN_EXAMPLES: float(examples)}
