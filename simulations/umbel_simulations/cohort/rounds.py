"""One round of a cohort: who is in it, what each client reports, and what they come to together."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import numpy as np

from umbel.errors import NotFinite
from umbel.plan import Plan
from umbel.randomness import generator
from umbel.update import Aggregate, Metrics, add_metrics
from umbel.weights import Weights
from umbel_client.examples import Examples
from umbel_client.trainer import TRAIN_EXAMPLES, TRAIN_LOSS, Job, newest
from umbel_server.aggregation import Collected, Presummed, Singles
from umbel_simulations.cohort.clients import Backend, Count, Share, Start, Trained, Vector, Worker, clipped
from umbel_simulations.cohort.pool import Pool
from umbel_simulations.data import ClientData

T = TypeVar("T")

_PIECE = 256
"""Examples that are judged at a time."""
_TOGETHER = 16
"""Clients that are added up by themselves, at most."""
_PARTS = 12
"""How many parts there would be at least, were all as long as the first."""
_CORES = os.cpu_count() or 1
"""As many parts there are at least where clients train abreast, unless they would be fewer than these in each."""
_FEW = 4


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

    def share(self, client: ClientData) -> Share:
        """The client's share of the round, which counts as much as a device's would."""
        return Share.of(self.job(client), self.examples(client))


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """One client's contribution."""

    delta: Vector
    """New minus old, clipped as the plan says; shared weights in the order of `Weights.to_vector`."""
    weight: float
    count: Count


@dataclass(slots=True, eq=False)
class Cohort:
    """What clients have contributed so far: a sum for strategies that are content with one, else every update."""

    start: Start
    wants_singles: bool = False
    moved: Vector | None = None
    """The sum of all deltas, each times its weight; None for nothing yet."""
    singles: list[Report] = field(default_factory=list)
    weight: float = 0.0
    count: int = 0
    loss: float = 0.0
    examples: int = 0
    silent: int = 0
    """Clients whose training went to NaN or infinity, and who therefore report nothing."""

    def take(self, report: Report | None) -> None:
        """Add one client's report, the next in an order that hangs on the cohort alone; None if it has none."""
        if report is None:
            self.silent += 1
            return
        if self.wants_singles:
            self.singles.append(report)
        else:
            self._add(report.delta * np.float32(report.weight))
        self._count(report.weight, report.count)

    def take_sum(self, moved: Vector, counts: Sequence[Count], shares: Sequence[Share]) -> None:
        """Add the weighed sum of the next few clients, an array of its own."""
        self._add(moved)
        for share, count in zip(shares, counts, strict=True):
            self._count(share.weight, count)

    def take_part(self, others: Cohort) -> None:
        """Add what the next few clients came to."""
        self.singles += others.singles
        if others.moved is not None:
            self._add(others.moved)
        self.weight += others.weight
        self.count += others.count
        self.loss += others.loss
        self.examples += others.examples
        self.silent += others.silent

    def _add(self, moved: Vector) -> None:
        # What overflows is refused with the candidate.
        self.moved = moved if self.moved is None else np.add(self.moved, moved, out=self.moved)

    def _count(self, weight: float, count: Count) -> None:
        self.weight += weight
        self.count += 1
        self.loss += count.loss
        self.examples += count.examples

    @property
    def total(self) -> Vector:
        """`moved`, in zeros if need be."""
        return np.zeros_like(self.start.vector) if self.moved is None else self.moved

    @property
    def train_loss(self) -> float | None:
        """Mean over the examples that were trained on."""
        return self.loss / self.examples if self.examples else None

    def collected(self) -> Collected:
        """What a strategy is given."""
        shapes = self.start.weights.shapes
        if self.wants_singles and self.singles:
            deltas = np.stack([report.delta for report in self.singles])
            metrics = tuple(_metrics(report.count.loss, report.count.examples) for report in self.singles)
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
    # All at once: between two runs, when the code that draws orders has fallen out of the processor's caches, each
    # takes three times as long; and no worker waits for another one that draws.
    parts = [[call.share(client) for client in part] for part in parts_of(cohort, call, pool.together)]
    pool.each(
        parts,
        lambda worker, part: part_of(worker, part, start, wants_singles=wants_singles),
        lambda _shares, part: collected.take_part(part),
    )
    return collected


def train_each(pool: Pool, cohort: Sequence[ClientData], call: Call, start: Start) -> dict[str, Report | None]:
    """What each client of a cohort reports, by name; None for one whose training went to NaN or infinity.

    Raises:
        OutOfBounds, InputMismatch, RuntimeFailure: as `train`.
    """
    found: dict[str, Report | None] = {}
    pool.each(
        [[call.share(client) for client in part] for part in parts_of(cohort, call, pool.together)],
        lambda worker, part: [*map(_report, part, worker.train_each(part, start))],
        lambda part, reports: found.update(zip((share.job.device for share in part), reports, strict=True)),
    )
    return found


def added_up(reports: Sequence[Report | None], start: Start, *, wants_singles: bool = False) -> Cohort:
    """A cohort of clients that somebody else has trained: the same sum as `train` comes to, up to rounding.

    To the bit, where `train` doesn't train clients abreast.
    """
    collected = Cohort(start, wants_singles)
    for some in in_parts(reports):
        part = Cohort(start, wants_singles)
        for report in some:
            part.take(report)
        collected.take_part(part)
    return collected


def parts_of(cohort: Sequence[ClientData], call: Call, together: int) -> list[Sequence[ClientData]]:
    """A cohort in the parts in which it is trained and added up, by whomever."""
    if together > 1:
        # Those with batches of the same size left over are in one part, and take these together.
        cohort = sorted(cohort, key=lambda client: call.examples(client).count % call.plan.batch_size)
    return in_parts(cohort, together)


def in_parts(clients: Sequence[T], together: int = 1) -> list[Sequence[T]]:
    """A cohort cut into runs that are added up by themselves: longer ones first, so that workers end together.

    How many workers there are has no say, so sums come out the same for any number of them. Where workers train clients
    abreast, runs are alike and no more than this machine has processors, if they aren't too long then: one of many
    clients takes little longer than one of few.
    """
    if together > 1:
        parts = max(math.ceil(len(clients) / together), min(_CORES, len(clients) // _FEW), 1)
        bounds = [len(clients) * part // parts for part in range(parts + 1)]
        return [clients[at:until] for at, until in pairwise(bounds) if at < until]
    runs, at = [], 0
    while at < len(clients):
        until = at + min(_TOGETHER, math.ceil((len(clients) - at) / _PARTS))
        runs.append(clients[at:until])
        at = until
    return runs


def part_of(worker: Worker, shares: Sequence[Share], start: Start, *, wants_singles: bool = False) -> Cohort:
    """What some clients come to; told apart if one has to be clipped or kept by itself, or went to NaN."""
    part = Cohort(start, wants_singles)
    if not wants_singles and not shares[0].job.plan.clip_norm:
        with suppress(NotFinite):
            part.take_sum(*worker.train(shares, start), shares)
            return part
    for share, trained in zip(shares, worker.train_each(shares, start), strict=True):
        part.take(_report(share, trained))
    return part


def report_of(worker: Worker, share: Share, start: Start) -> Report | None:
    """What one client reports; None if its training went to NaN or infinity."""
    (trained,) = worker.train_each([share], start)
    return _report(share, trained)


def _report(share: Share, trained: Trained | None) -> Report | None:
    if trained is None:
        return None
    norm = share.job.plan.clip_norm
    return Report(clipped(trained.delta, norm) if norm else trained.delta, share.weight, trained.count)


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


def evaluate_each(pool: Pool, backend: Backend, weights: Weights, clients: Sequence[ClientData]) -> list[Metrics]:
    """The metric sums of each client that has held examples back, over these."""
    found: list[Metrics] = []
    pool.each(
        [client for client in clients if client.held_back.count],
        lambda _worker, client: backend.evaluate(weights, client.held_back),
        lambda _client, metrics: found.append(metrics),
    )
    return found
