"""One inference on the device: the session is already open, the weights are bound. No network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from umbel.bundle import Bundle
from umbel.errors import BundleInvalid, InputMismatch, UmbelError
from umbel.manifest import Manifest
from umbel.runtime import Runtime
from umbel.runtime.precision import fastest
from umbel.runtime.signature import BatchCheck
from umbel.self_check import verify_golden
from umbel.weights import Weights
from umbel_client.examples import Arrays
from umbel_client.shelf import Shelf
from umbel_client.slots import Slots

Outputs = dict[str, NDArray[Any]]


class Predictor:
    """A model that is ready to answer.

    Args:
        bundle: graphs and signature.
        weights: the released ones, or this device's own.
        runtime: runs the graph.
        source: which weights these are, for whoever asks: "release 7" or "personal, from release 7".
    """

    __slots__ = ("_input", "_session", "labels", "manifest", "precision", "source")

    def __init__(self, bundle: Bundle, weights: Weights, runtime: Runtime, source: str) -> None:
        self.manifest: Final = bundle.manifest
        self.labels: Final = bundle.manifest.labels
        self.source: Final = source
        self._session, self.precision = fastest(runtime, bundle, weights)
        self._input = bundle.manifest.inputs[0].name if len(bundle.manifest.inputs) == 1 else None

    def __call__(self, x: Arrays | NDArray[Any]) -> Outputs:
        """The model's outputs by name, for a batch: an array for a model with one input, or arrays by name.

        Raises:
            InputMismatch: not what the model's manifest says.
        """
        if isinstance(x, np.ndarray):
            if self._input is None:
                names = [spec.name for spec in self.manifest.inputs]
                raise InputMismatch(f"this model has several inputs; give a mapping with {names}")
            x = {self._input: x}
        return self._session(x)

    def probabilities(self, x: Arrays | NDArray[Any]) -> list[Mapping[str, float]]:
        """For a classifier: label -> probability, most probable first, for each example of a batch.

        Raises:
            BundleInvalid: the model has no labels.
        """
        if not self.labels:
            raise BundleInvalid(f"model {self.manifest.model!r} has no labels; use its outputs as they are")
        scores = self(x)[self.manifest.outputs[0].name]
        return [_ranked(row, self.labels) for row in softmax(np.asarray(scores, np.float64))]

    def require_examples(self, inputs: Arrays, targets: Arrays) -> None:
        """Raise `InputMismatch` unless these could be examples of this model."""
        require_examples(self.manifest, inputs, targets)


def require_examples(manifest: Manifest, inputs: Arrays, targets: Arrays) -> None:
    """Raise `InputMismatch` unless these could be examples of a model: names, types, shapes, and labels that it has."""
    BatchCheck("input", manifest.inputs)(inputs)
    BatchCheck("target", manifest.targets)(targets)
    require_labels(manifest, targets)


def require_labels(manifest: Manifest, targets: Arrays) -> None:
    """Raise `InputMismatch` where a classifier's target, one label for each example, holds one that it doesn't have."""
    # What has more places than one may mark some of them as nothing to learn from.
    if not manifest.labels or len(manifest.targets) != 1 or len(manifest.targets[0].shape) != 1:
        return
    name, last = manifest.targets[0].name, len(manifest.labels) - 1
    values = targets.get(name)
    if values is None or values.dtype.kind not in "iu" or not values.size:
        return
    for found in (values.min(), values.max()):
        if not 0 <= found <= last:
            raise InputMismatch(f"target {name!r} holds {found}; this model has labels 0 to {last}")


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores [n, classes] to probabilities of the same shape."""
    grown = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(grown / grown.sum(axis=-1, keepdims=True))


def _ranked(row: NDArray[np.float64], labels: tuple[str, ...]) -> Mapping[str, float]:
    order = np.argsort(-row, kind="stable")
    return {labels[index]: float(row[index]) for index in order}


def open_active(shelf: Shelf, slots: Slots, runtime: Runtime) -> Predictor | None:
    """The predictor for what the slots hold: personal weights if there are any, or the active release; None if empty.

    Raises:
        UmbelError: it doesn't load, or doesn't pass its golden examples on this machine.
    """
    if slots.active is None:
        return None
    bundle = shelf.bundle(slots.active.bundle, runtime.name)
    verify_golden(runtime, bundle)
    own = slots.personal
    if own is None or own.bundle != slots.active.bundle:
        return Predictor(bundle, bundle.weights(), runtime, f"release {slots.active.number}")
    source = f"personal, from release {slots.active.number}"
    return Predictor(bundle, shelf.personal_weights(own.weights), runtime, source)


class Answering:
    """What answers now, kept in step with the shelf's slots; a bundle that fails to load falls back to the one before.

    Args:
        shelf: whose slots to follow.
        runtime: runs the graphs.
    """

    def __init__(self, shelf: Shelf, runtime: Runtime) -> None:
        self._shelf = shelf
        self._runtime = runtime
        self._serving: tuple[object, object] | None = None
        self._proved = self._failed = False
        self.current: Predictor | None = None
        self.well = True
        """False when what the slots hold didn't load, and something else (or nothing) answers instead."""
        self.follow()

    def follow(self) -> None:
        """Let the slots' content answer, if it has changed since the last look; else the best of what is left.

        A release on trial pays one of its tries first, on disk; one that doesn't load is given up at once, unless this
        device runs another runtime by now: a visit fetches its graphs.
        """
        slots = self._shelf.slots
        if slots.serving == self._serving and self.well:
            return
        is_tried = slots.trial is not None and not self._lacks_graphs(slots)
        if is_tried:
            try:
                slots = self._shelf.change(Slots.loading)
            except OSError:
                # A try that a full disk doesn't count isn't made: until it does, what answered before answers.
                self._load(slots.revert())
                self.well = False
                return
        if not self._load(slots) and is_tried:
            slots = self._shelf.change(
                lambda now: now.give_up("it doesn't load, or answers otherwise than its maker saw")
            )
            self._load(slots)
        self._serving = slots.serving

    def _lacks_graphs(self, slots: Slots) -> bool:
        """Whether the active release has graphs for this runtime that aren't here."""
        try:
            graphs = self._shelf.manifest(slots.active.bundle).files_for(self._runtime.name) if slots.active else {}
        except UmbelError:
            return False
        return not all(self._shelf.holds(ref.digest) for ref in graphs.values())

    def healthy(self) -> None:
        """What answers now has proved that it can: a release on trial gets its tries back, once a process."""
        self._failed = False
        if not self._proved and self.well and self.current is not None:
            if self._shelf.slots.trial is not None:
                self._shelf.change(Slots.healthy)
            self._proved = True

    def failed(self) -> None:
        """An answer failed: until there is another one, a rest shows nothing."""
        self._failed = True

    def rests(self) -> None:
        """Nothing is asked of it for now: what was loaded hasn't taken the process down, unless it fails to answer."""
        if not self._failed:
            self.healthy()

    def _load(self, slots: Slots) -> bool:
        """Whether what the slots hold answers now; if not, the best of what is left does."""
        self.well, self._proved, self._failed = True, False, False
        for fall_back in (_as_they_are, _without_personal, Slots.revert):
            try:
                self.current = open_active(self._shelf, fall_back(slots), self._runtime)
            except UmbelError:
                self.well = False
            else:
                return self.well
        self.current = None
        return False


def _as_they_are(slots: Slots) -> Slots:
    return slots


def _without_personal(slots: Slots) -> Slots:
    return replace(slots, personal=None)
