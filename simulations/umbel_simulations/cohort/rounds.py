"""One round of a cohort: who is in it, what each client reports, and what they come to together."""

from __future__ import annotations

from collections import deque
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
from umbel_client.trainer import TRAIN_EXAMPLES, TRAIN_LOSS, Job, newest
from umbel_server.aggregation import Collected, Presummed, Singles
from umbel_simulations.cohort.clients import Backend, Orders, Start, Trained, Worker, orders_of
from umbel_simulations.cohort.pool import Pool
from umbel_simulations.data import ClientData

_PIECE = 256
"""Examples that are judged at a time."""
_MOST_ORDERED = 4_000_000
"""Rows whose order is worked out beforehand."""


@dataclass(frozen=True, slots=True)
class Call:
    """What the clients of a round are asked: the same plan, told apart by their names."""

    plan: Plan
    task: str
    round: int

    def job(self, client: ClientData) -> Job:
        """One client's share of it, with the same chances as a device of that name."""
        return Job(self.plan, self.task, self.round, client.name)

    def examples(self, client: ClientData) -> Examples:
        """What the client trains with."""
        return newest(client.training, self.plan.max_examples)


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """One client's contribution, in an array of its own."""

    delta: NDArray[np.float32]
    """New minus old, clipped as the plan says; shared weights in the order of `Weights.to_vector`."""
    weight: float
    trained: Trained
    """Only its counts outlive the worker's next client."""


@dataclass(slots=True, eq=False)
class Cohort:
    """What a round has collected so far: a sum for strategies that are content with one, else every update."""

    start: Start
    wants_singles: bool
    total: NDArray[np.float32] = field(init=False)
    singles: list[Report] = field(default_factory=list)
    weight: float = 0.0
    count: int = 0
    loss: float = 0.0
    examples: int = 0
    silent: int = 0
    """Clients whose training went to NaN or infinity, and who therefore report nothing."""
    spare: deque[NDArray[np.float32]] = field(default_factory=deque)
    """Arrays whose reports are summed up already: fresh ones would cost more in page faults than in arithmetic."""

    def __post_init__(self) -> None:
        self.total = np.zeros_like(self.start.vector)

    def weighed(self, report: Report | None) -> Report | None:
        """A report that is ready to be taken: times its weight, if all that is wanted is a sum."""
        if report is not None and not self.wants_singles:
            # The product here and the sum later: the same two roundings as in `Aggregate.accumulate`.
            np.multiply(report.delta, np.float32(report.weight), out=report.delta)
        return report

    def take(self, _client: ClientData, report: Report | None) -> None:
        """Add a weighed report, the next in the cohort's order."""
        if report is None:
            self.silent += 1
            return
        if self.wants_singles:
            self.singles.append(report)
        else:
            # What overflows is refused with the candidate.
            np.add(self.total, report.delta, out=self.total)
            self.spare.append(report.delta)
        self.weight += report.weight
        self.count += 1
        self.loss += report.trained.loss
        self.examples += report.trained.examples

    @property
    def train_loss(self) -> float | None:
        """Mean over the examples that were trained on."""
        return self.loss / self.examples if self.examples else None

    def collected(self) -> Collected:
        """What a strategy is given."""
        shapes = self.start.weights.shapes
        if self.wants_singles and self.singles:
            deltas = np.stack([report.delta for report in self.singles])
            metrics = tuple(_metrics(report.trained.loss, report.trained.examples) for report in self.singles)
            return Singles(deltas, shapes, tuple(report.weight for report in self.singles), metrics)
        sums = _metrics(self.loss, self.examples)
        return Presummed(Aggregate(shapes, self.total, self.weight, self.count, sums))


def _metrics(loss: float, examples: int) -> Metrics:
    return {TRAIN_LOSS: loss, TRAIN_EXAMPLES: float(examples)}


def chosen(clients: Sequence[ClientData], count: int, seed: int, task: str, round_number: int) -> list[ClientData]:
    """The cohort of a round, drawn without repetition; all clients, in a drawn order, if there are no more."""
    order = generator(seed, task, round_number, "cohort").permutation(len(clients))
    return [clients[index] for index in order[:count]]


def train(pool: Pool, cohort: Sequence[ClientData], call: Call, start: Start, *, wants_singles: bool = False) -> Cohort:
    """Train a cohort side by side; the same for any number of workers, to the bit.

    Raises:
        OutOfBounds: hyper-parameters that the model doesn't have.
        InputMismatch: examples that the model doesn't take.
        RuntimeFailure: the runtime gave up.
    """
    collected = Cohort(start, wants_singles)
    orders = _orders(cohort, call)

    def work(worker: Worker, client: ClientData) -> Report | None:
        found = report_of(worker, client, call, start, collected.spare, orders.get(client.name, ()))
        return collected.weighed(found)

    pool.each(cohort, work, collected.take)
    return collected


def _orders(cohort: Sequence[ClientData], call: Call) -> dict[str, Orders]:
    """The orders of a cohort's examples, all at once: between two runs of the graph, when the code that draws them
    has fallen out of the caches, each takes five times as long. None of very many, for the sake of memory."""
    counts = [call.examples(client).count for client in cohort]
    if sum(counts) * call.plan.epochs > _MOST_ORDERED:
        return {}
    return {client.name: orders_of(call.job(client), count) for client, count in zip(cohort, counts, strict=True)}


def report_of(
    worker: Worker,
    client: ClientData,
    call: Call,
    start: Start,
    spare: deque[NDArray[np.float32]] | None = None,
    orders: Orders = (),
) -> Report | None:
    """What one client reports; None if its training went to NaN or infinity. Takes its array from `spare`, if any."""
    examples = call.examples(client)
    try:
        out = spare.pop() if spare else None
    except IndexError:
        # Another worker was quicker.
        out = None
    try:
        trained = worker.train(call.job(client), start, examples, orders)
        delta = trained.delta(start, call.plan, out)
    except NotFinite:
        return None
    return Report(delta, trained.weight(call.plan, examples.count), trained)


def evaluate(pool: Pool, backend: Backend, weights: Weights, examples: Examples) -> Metrics:
    """Metric sums over many examples, judged in pieces side by side; nothing over none."""
    pieces = [examples.take(slice(at, at + _PIECE)) for at in range(0, examples.count, _PIECE)]
    sums: list[Metrics] = [{}]
    pool.each(
        pieces,
        lambda _worker, piece: backend.evaluate(weights, piece),
        lambda _piece, found: sums.append(add_metrics(sums.pop(), found)),
    )
    return sums[0]


def evaluate_each(
    pool: Pool, backend: Backend, models: Mapping[str, Weights] | Weights, clients: Sequence[ClientData]
) -> dict[str, Metrics]:
    """Each client's metric sums over its own held-back examples, of one model or of each one's own."""
    found: dict[str, Metrics] = {}

    def judge(_worker: Worker, client: ClientData) -> Metrics:
        weights = models if isinstance(models, Weights) else models[client.name]
        return backend.evaluate(weights, client.held_back)

    pool.each(
        [client for client in clients if client.held_back.count],
        judge,
        lambda client, metrics: found.__setitem__(client.name, metrics),
    )
    return found
