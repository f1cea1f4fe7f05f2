"""Training many clients abreast: each call is one step of all clients whose batches are of one size.

A step of a small model is mostly the starting of its operators, which here is paid once for many clients. Clients with
more examples stand first, so that those with a full batch left are neighbours; a smaller last batch is a call for all
who have one of that size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from umbel.bundle import Bundle
from umbel.errors import NotFinite, RuntimeFailure
from umbel.manifest import ACCUMULATE, NEXT_PREFIX
from umbel.plan import Plan
from umbel.randomness import SEED
from umbel.runtime.onnx import failures_of
from umbel.runtime.signature import BatchCheck, check_batch, resolve_hyperparameters, starting_slots
from umbel_client.examples import Examples
from umbel_simulations.cohort.binding import Array, Binding, session_of
from umbel_simulations.cohort.clients import Count, Share, Start, Trained, Vector, Worker
from umbel_simulations.cohort.dual import PICKED
from umbel_simulations.cohort.dual_layer import DualLayer, Products
from umbel_simulations.cohort.states import States
from umbel_simulations.cohort.step_graph import ALL_PREFIX, LOSS, ROWS, StepGraph, shapes_of

TOGETHER: Final = 32
"""Clients that train abreast, at most: with more, their states leave the processor's cache."""
_SEEN: Final = 512
"""How many ways to bind are kept."""


@dataclass(frozen=True, slots=True)
class Wave:
    """One call: a step of some clients that have a batch of the same size before them."""

    who: Sequence[int]
    """Which of the clients."""
    steps: Sequence[int]
    """Which of its steps it is for each of them."""
    size: int


def waves(shares: Sequence[Share]) -> Iterator[Wave]:
    """All steps of some clients, of which those with more examples stand first; each client's in their order.

    In each epoch all take their full batches, as many as they have, and then what is left over: of those who have a
    batch of the same size left, all at once.
    """
    epochs, batch = shares[0].job.plan.epochs, shares[0].job.plan.batch_size
    full = [share.examples.count // batch for share in shares]
    left = [share.examples.count % batch for share in shares]
    each = [own + (some > 0) for own, some in zip(full, left, strict=True)]
    steps = [len(share.begins) for share in shares]  # a plan may stop some before their last epoch's end
    for epoch in range(epochs):
        for step in range(full[0]):
            who = [at for at, own in enumerate(full) if step < own and epoch * each[at] + step < steps[at]]
            if who:
                yield Wave(who, [epoch * each[at] + step for at in who], batch)
        for size in sorted({*left} - {0}):
            who = [at for at, own in enumerate(left) if own == size and (epoch + 1) * each[at] <= steps[at]]
            if who:
                yield Wave(who, [(epoch + 1) * each[at] - 1 for at in who], size)


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A step of so many clients in batches of one size, from one set of states to another: bound once."""

    binding: Binding
    rows: NDArray[np.int64]
    picked: NDArray[np.int64]
    loss: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class _Room:
    """What lies ready for clients with up to so many examples, and the calls that are bound to it."""

    states: States
    read: dict[str, Array]
    """What a layer in dual form has worked out for their steps."""
    calls: dict[tuple[int, int, int], _Call] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class _Moved:
    """What came of training some clients."""

    shares: Sequence[Share]
    losses: NDArray[np.float64]
    """[clients] Sums over the examples seen."""
    arrays: dict[str, Array]
    """[clients, ...] New minus old, but for a layer in dual form."""
    layer: DualLayer | None
    pulls: Array | None

    def total(self, weights: NDArray[np.float32]) -> dict[str, Array]:
        """The sum over all clients, each times its weight."""
        # Client after client, so that it is the same on any number of cores.
        sums = {name: np.einsum("c,c...->...", weights, array) for name, array in self.arrays.items()}
        if self.layer and self.pulls is not None:
            sums[self.layer.weight] = self.layer.moved(self.shares, self.pulls, weights)
        return sums

    def each(self) -> list[dict[str, Array]]:
        """How far each client moved."""
        found = [{name: array[at] for name, array in self.arrays.items()} for at in range(len(self.shares))]
        if self.layer and self.pulls is not None:
            for own, moved in zip(found, self.layer.moved_by_each(self.shares, self.pulls), strict=True):
                own[self.layer.weight] = moved
        return found


class AbreastWorker:
    """Trains up to `TOGETHER` clients abreast, on a session and in buffers of its own.

    Args:
        bundle: whose model it is.
        graph: its step.
        frozen: weights that sessions share.
        products: what layers in dual form have worked out before, for all workers.
        otherwise: trains a single client, clients whom this form doesn't serve, and those of whom one fails, so that
            it is told by name.
    """

    def __init__(
        self,
        bundle: Bundle,
        graph: StepGraph,
        frozen: Mapping[str, ort.OrtValue],
        products: Products,
        otherwise: Worker,
    ) -> None:
        self._manifest, self._graph, self._otherwise = bundle.manifest, graph, otherwise
        self._session = session_of(graph.model, frozen)
        self._layer = DualLayer(graph.dual, self._manifest, products) if graph.dual else None
        self._checks = BatchCheck("input", self._manifest.inputs), BatchCheck("target", self._manifest.targets)
        self._rooms: dict[int, _Room] = {}
        self._own = {name: np.empty(TOGETHER, np.float32) for name in graph.own}
        self._constants: dict[str, Array] = {}
        self._examples: dict[str, Array] = {}
        self._begun: tuple[Start, Plan, dict[str, Array]] | None = None

    def train(self, shares: Sequence[Share], start: Start, *, weighed: bool = True) -> tuple[Vector, list[Count]]:
        """Train some clients from `start`; see `Worker`."""
        order = _longest_first(shares)
        moved = self._trained([shares[at] for at in order], start)
        if moved is None:
            return self._otherwise.train(shares, start, weighed=weighed)
        weights = np.array([shares[at].weight if weighed else 1.0 for at in order], np.float32)
        total = _vector(moved.total(weights), start)
        if not (np.isfinite(total).all() and np.isfinite(moved.losses).all()):
            raise NotFinite("a loss or a weight went to NaN or infinity; lower the learning rate")
        return total, [_count(shares[at], moved.losses[place]) for at, place in _back(order)]

    def train_each(self, shares: Sequence[Share], start: Start) -> Iterable[Trained | None]:
        """Train each of some clients from `start`; see `Worker`."""
        order = _longest_first(shares)
        moved = self._trained([shares[at] for at in order], start)
        if moved is None:
            return self._otherwise.train_each(shares, start)
        found: list[Trained | None] = []
        each = moved.each()
        for at, place in _back(order):
            delta = _vector(each[place], start)
            finite = np.isfinite(delta).all() and np.isfinite(moved.losses[place])
            found.append(Trained(delta, _count(shares[at], moved.losses[place])) if finite else None)
        return found

    def _trained(self, shares: Sequence[Share], start: Start) -> _Moved | None:
        """Train clients of whom those with more examples come first; None if another has to."""
        if not 1 < len(shares) <= TOGETHER or (self._layer and not self._layer.pays(shares)):
            return None
        given, room = self._begin(start, shares[0].job.plan), self._room(shares)
        room.states.begin(len(shares), given)
        begins = self._lay(shares)
        try:
            with failures_of(f"the training graph of {self._manifest.model!r}"):
                if self._layer:
                    self._layer.begin(shares, self._examples, start.weights, room.read)
                losses = self._step_by_step(shares, begins, room)
        except RuntimeFailure:
            return None
        ends = room.states.ends()
        pulls = ends.pop(self._layer.weight) if self._layer else None
        moved = {name: array for name, array in ends.items() if name in start.weights.arrays}
        for name, array in moved.items():
            np.subtract(array, start.weights[name], out=array)  # in place, as this is the end of these states
        return _Moved(shares, losses, moved, self._layer, pulls)

    def _step_by_step(self, shares: Sequence[Share], begins: Sequence[int], room: _Room) -> NDArray[np.float64]:
        """Take all steps; the sum of each client's losses."""
        losses, own = np.zeros(len(shares)), self._own_numbers(shares)
        rows = np.zeros((len(shares), max(len(share.rows) for share in shares)), np.int64)
        for placed, share in zip(rows, shares, strict=True):
            placed[: len(share.rows)] = share.rows
        first, starts = np.array(begins)[:, None], [share.begins[:, 0].tolist() for share in shares]
        for wave in waves(shares):
            group = room.states.gather(wave.who)
            call = self._call(room, len(wave.who), wave.size, group)
            who = np.array(wave.who)
            start = np.array([starts[at][step] for at, step in zip(wave.who, wave.steps, strict=True)])
            call.picked[...] = rows[who[:, None], start[:, None] + np.arange(wave.size)]
            np.add(call.picked, first[who], out=call.rows)
            for name, numbers in own.items():
                some = [numbers[at][step] for at, step in zip(wave.who, wave.steps, strict=True)]
                self._own[name][: len(who)] = some
            self._session.run_with_iobinding(call.binding.native)
            room.states.stepped(wave.who, group)
            losses[who] += call.loss.astype(np.float64) * wave.size
        return losses

    def _begin(self, start: Start, plan: Plan) -> dict[str, Array]:
        """Lay out what is the same for all clients that start here; where their states begin, if not at zero."""
        if self._begun is None or self._begun[0] is not start or self._begun[1] is not plan:
            manifest, pulls = self._manifest, self._graph.dual.pulls if self._graph.dual else ()
            given: dict[str, Array] = {**start.weights.arrays, **starting_slots(manifest, start.weights, None)}
            hyperparameters = resolve_hyperparameters(manifest, plan.hyperparameters)
            given |= {name: np.array(value, np.float32) for name, value in hyperparameters.items()}
            for name in self._graph.constants:
                np.copyto(self._constants.setdefault(name, np.empty_like(given[name])), given[name])
            self._begun = start, plan, {name: array for name, array in given.items() if name not in pulls}
        return self._begun[2]

    def _room(self, shares: Sequence[Share]) -> _Room:
        """Where the states of these lie: in dual form they are as large as their examples are many."""
        most = self._layer.room(shares) if self._layer else 0
        if most not in self._rooms:
            shapes = shapes_of(self._manifest) | (self._layer.shapes(most) if self._layer else {})
            states = States(TOGETHER, {name: shapes[name] for name in self._graph.state})
            self._rooms[most] = _Room(states, self._layer.read(TOGETHER * most, most) if self._layer else {})
        return self._rooms[most]

    def _lay(self, shares: Sequence[Share]) -> list[int]:
        """Lay out the examples of all clients one after the other; where each client's begin."""
        for share in shares:
            check_batch(*self._checks, share.examples.inputs, share.examples.targets)
        counts = [share.examples.count for share in shares]
        self._make_room(sum(counts), shares[0].examples)
        begins = [0, *accumulate(counts)][:-1]
        for share, begin, count in zip(shares, begins, counts, strict=True):
            for name, array in (*share.examples.inputs.items(), *share.examples.targets.items()):
                if name in self._examples:
                    self._examples[name][begin : begin + count] = array
        return begins

    def _make_room(self, examples: int, like: Examples) -> None:
        """Have room for so many examples; what was bound to less is bound anew."""
        laid = {*self._graph.batched, *([self._graph.dual.taken] if self._graph.dual else [])}
        for name, array in (*like.inputs.items(), *like.targets.items()):
            if name in laid and len(self._examples.get(name, ())) < examples:
                self._examples[name] = np.empty((examples, *array.shape[1:]), array.dtype)
                for room in self._rooms.values():
                    room.calls.clear()

    def _own_numbers(self, shares: Sequence[Share]) -> dict[str, list[NDArray[np.float32]]]:
        """What the graph takes of each client, step by step."""
        own: dict[str, list[NDArray[np.float32]]] = {}
        if ACCUMULATE in self._own:
            own[ACCUMULATE] = [share.gathered(self._manifest) for share in shares]
        if SEED in self._own:
            seeds = [share.job.hyperparameters(self._manifest)[SEED] for share in shares]
            own[SEED] = [np.full(len(share.begins), seed) for share, seed in zip(shares, seeds, strict=True)]
        return own

    def _call(self, room: _Room, count: int, size: int, group: int) -> _Call:
        key = count, size, group
        if key not in room.calls:
            if len(room.calls) >= _SEEN:
                room.calls.clear()
            rows, picked = np.zeros((count, size), np.int64), np.zeros((count, size), np.int64)
            call = _Call(Binding(self._session), rows, picked, np.zeros(count, np.float32))
            binding = call.binding
            before, after = room.states.of(group)
            for name, array in (before | self._own).items():
                binding.input(name, array[:count])
            for name, array in after.items():
                binding.output(NEXT_PREFIX + name, array[:count])
            for name, array in self._constants.items():
                binding.input(name, array)
            for name in self._graph.batched:
                binding.input(ALL_PREFIX + name, room.read[name] if name in room.read else self._examples[name])
            binding.input(ROWS, rows)
            if self._layer:
                binding.input(PICKED, picked)
            binding.output(LOSS, call.loss)
            room.calls[key] = call
        return room.calls[key]


def _vector(moved: Mapping[str, Array], start: Start) -> Vector:
    """What moved in the order of `Weights.to_vector`, and zeros for what may not."""
    weights = sorted(start.weights.arrays.items())
    return np.concatenate(
        [moved[name].ravel() if name in moved else np.zeros(array.size, np.float32) for name, array in weights]
    )


def _longest_first(shares: Sequence[Share]) -> list[int]:
    return sorted(range(len(shares)), key=lambda at: -shares[at].examples.count)


def _back(order: Sequence[int]) -> list[tuple[int, int]]:
    """Each share and its place in `order`, in the order of the shares."""
    return sorted((at, place) for place, at in enumerate(order))


def _count(share: Share, loss: float) -> Count:
    return Count(len(share.begins), float(loss), len(share.rows))
