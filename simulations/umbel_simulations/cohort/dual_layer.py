"""A dense layer in dual form, of some clients: what their steps take, and what it comes to at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from umbel.manifest import Manifest
from umbel.runtime.onnx import failures_of
from umbel.weights import Weights
from umbel_simulations.cohort.binding import Array, Binding, session_of
from umbel_simulations.cohort.clients import Share
from umbel_simulations.cohort.dual import FEATURES, FIRST, GRAM, MOVED, PULL, DualStep

_MOST_KEPT: Final = 1 << 24
"""Of how many numbers what is kept may be in all: 64 MiB."""
_MOST_EXAMPLES: Final = 256
"""Of a client: what lies ready for steps grows with its square."""
_REWRITING: Final = 40
"""A step that moves the weight itself costs for each of its numbers as much as so many products."""
_BEGINNING: Final = 3_000_000
"""And what is done for each client beside products, as much as these."""


class Products:
    """X X' of clients that were seen: worked out once, as a client's examples stay what they are.

    Of as many clients as there is room for. Any thread may ask: whoever works out the same again comes to the same.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], tuple[Array, Array]] = {}
        self._left = _MOST_KEPT

    def of(self, examples: Array, work_out: Callable[[], Array]) -> Array:
        """The products of some examples, known by where they lie."""
        key = examples.__array_interface__["data"][0], examples.shape, examples.strides
        if key in self._kept:
            return self._kept[key][1]
        products = work_out()
        if self._left >= products.size:
            self._left -= products.size
            # With the examples, so that nothing else comes to lie there.
            self._kept[key] = examples, products
        return products


class DualLayer:
    """The layer of as many clients as train abreast.

    Args:
        step: what it is a part of.
        manifest: of the model.
        products: what is known of clients, by all workers.
    """

    def __init__(self, step: DualStep, manifest: Manifest, products: Products) -> None:
        self.weight, self._step, self._products = step.weight, step, products
        self._out, self._in = manifest.shared_shapes[step.weight]
        self._begin, self._gram, self._end = (session_of(model, {}) for model in (step.begin, step.gram, step.end))
        self._features = np.empty((0, self._in), np.float32)

    def pays(self, shares: Sequence[Share]) -> bool:
        """Whether it takes less work than moving the weight at each step, and not too much memory."""
        dual, direct, most = 0, 0, self.room(shares)
        if most > _MOST_EXAMPLES:
            return False
        for share in shares:
            count, seen, weight = share.examples.count, len(share.rows), self._in * self._out
            dual += _BEGINNING + 4 * count * weight + 2 * count * count * self._in + 2 * seen * most * self._out
            direct += 4 * seen * weight + _REWRITING * len(share.begins) * weight
        return dual < direct

    def room(self, shares: Sequence[Share]) -> int:
        """For how many examples a client needs room: up to half as many more, so that few sizes occur."""
        most = max(share.examples.count for share in shares)
        grain = 1 << max(0, most.bit_length() - 2)
        return -(-most // grain) * grain

    def shapes(self, room: int) -> dict[str, tuple[int, ...]]:
        """Of what a step moves, for each client."""
        return dict.fromkeys(self._step.pulls, (room, self._out))

    def read(self, examples: int, room: int) -> dict[str, Array]:
        """Arrays for what steps read, of so many examples in all."""
        return {name: np.zeros((examples, size), np.float32) for name, size in ((FIRST, self._out), (GRAM, room))}

    def begin(
        self, shares: Sequence[Share], examples: Mapping[str, Array], weights: Weights, read: Mapping[str, Array]
    ) -> None:
        """Work out what the steps of some clients read.

        Args:
            shares: who they are.
            examples: [all, ...] what they learn from, one client's after the other's, by name.
            weights: what they start from.
            read: is written into.
        """
        taken = examples[self._step.taken][: sum(share.examples.count for share in shares)]
        given, found = {self._step.taken: taken, self.weight: weights[self.weight]}, {FIRST: read[FIRST][: len(taken)]}
        if self._step.reads_input:
            self._features = taken
        else:
            if len(self._features) < len(taken):
                self._features = np.empty((len(taken), self._in), np.float32)
            found[FEATURES] = self._features[: len(taken)]
        _run(self._begin, given, found)
        at = 0
        for share in shares:
            count = share.examples.count
            work_out = partial(self._worked_out, self._features[at : at + count])
            products = self._products.of(share.examples.inputs[self._step.taken], work_out)
            read[GRAM][at : at + count, :count] = products
            read[GRAM][at : at + count, count:] = 0.0
            at += count

    def _worked_out(self, features: Array) -> Array:
        products = np.empty((len(features), len(features)), np.float32)
        _run(self._gram, {FEATURES: features}, {GRAM: products})
        return products

    def moved(self, shares: Sequence[Share], pulls: Array, weights: NDArray[np.float32]) -> Array:
        """[out, in] What all clients moved the weight, each times its own."""
        counts = [share.examples.count for share in shares]
        own = [pull[:count] * weight for pull, count, weight in zip(pulls, counts, weights, strict=True)]
        return self._ended(np.concatenate(own), self._features[: sum(counts)])

    def moved_by_each(self, shares: Sequence[Share], pulls: Array) -> list[Array]:
        """[out, in] What each of them moved it."""
        found, at = [], 0
        for share, pull in zip(shares, pulls, strict=True):
            count = share.examples.count
            found.append(self._ended(pull[:count], self._features[at : at + count]))
            at += count
        return found

    def _ended(self, pull: Array, features: Array) -> Array:
        moved = np.empty((self._out, self._in), np.float32)
        _run(self._end, {PULL: pull, FEATURES: features}, {MOVED: moved})
        return moved


def _run(session: ort.InferenceSession, given: dict[str, Array], found: dict[str, Array]) -> None:
    with failures_of("a layer in dual form"):
        binding = Binding(session)
        for name, array in given.items():
            binding.input(name, array)
        for name, array in found.items():
            binding.output(name, array)
        session.run_with_iobinding(binding.native)
