"""Torch itself as a runtime, for models that can't be lowered: the functions that the compiler would trace, run as
they stand.

No device runs this; simulations do, to try a model before there is a graph of it. Numbers are those of a compiled
bundle within float tolerance: the same optimisers, the same masks of dropout, the same metrics.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from umbel.bundle import Bundle, file_refs, write_bundle
from umbel.errors import RuntimeFailure, UmbelError
from umbel.manifest import GOLDEN_FILE, NEXT_PREFIX, WEIGHTS_FILE, Manifest
from umbel.runtime import Arrays
from umbel.runtime.signature import (
    BatchCheck,
    bind_weights,
    check_batch,
    require_finite_loss,
    resolve_hyperparameters,
    starting_slots,
)
from umbel.update import Metrics
from umbel.weights import Weights
from umbel_models.adapters import resolved
from umbel_models.compile import golden_of, manifest_of
from umbel_models.dropout import drawing_in_torch
from umbel_models.normalisation import batch_norm, batch_norm_untracked
from umbel_models.parity import to_numpy
from umbel_models.signatures import SUM_PREFIX, Named, Signature, State, signatures
from umbel_models.spec import ModelSpec
from umbel_models.vetting import copied, own_copy, require_sound, without_fast_path

NAME: Final = "torch"
_BATCH_NORM: Final = signature(F.batch_norm)


def write_uncompiled(spec: ModelSpec, directory: Path) -> Bundle:
    """Write what `uncompiled` gives into a folder."""
    return write_bundle(directory, *uncompiled(spec))


def uncompiled(spec: ModelSpec) -> tuple[Manifest, dict[str, bytes]]:
    """A bundle of a model without any graphs, and its files: what it takes and gives, its weights, its golden examples.

    Raises:
        CannotCompile: the spec contradicts itself.
    """
    with without_fast_path():
        spec = own_copy(spec)
        require_sound(spec)
        spec = resolved(spec)
        state, golden = State(spec), golden_of(spec)
    weights = Weights({name: tensor.numpy() for name, tensor in state.weights.items()})
    files = {WEIGHTS_FILE: weights.to_bytes(), GOLDEN_FILE: golden.to_bytes()}
    return manifest_of(spec, state, golden, file_refs(files), ()), files


class EagerRuntime:
    """Runs one model in torch; belongs to one thread at a time, with a module of its own.

    Args:
        spec: the model.
        moving: the trainable weights that a training step moves, by their names in the manifest; all unless given.

    Raises:
        CannotCompile: the spec contradicts itself.
    """

    def __init__(self, spec: ModelSpec, moving: Collection[str] | None = None) -> None:
        spec = resolved(spec)
        self._spec = replace(spec, module=copied(spec.module))
        self._state = State(self._spec)
        self._signatures = {one.name: one for one in signatures(self._spec, self._state, 2)}
        self._still = {name for name in self._state.trainable if moving is not None and name not in moving}
        self.drift: Mapping[str, NDArray[np.float32]] = {}
        """What is taken off some weights after each training step."""

    @property
    def name(self) -> str:
        """The name that no manifest has graphs for."""
        return NAME

    def infer(self, bundle: Bundle, weights: Weights) -> EagerInfer:
        """See `umbel.runtime.Runtime`."""
        return EagerInfer(self, bundle, weights)

    def evaluate(self, bundle: Bundle, weights: Weights) -> EagerEvaluate:
        """See `umbel.runtime.Runtime`."""
        return EagerEvaluate(self, bundle, weights)

    def train(
        self,
        bundle: Bundle,
        weights: Weights,
        hyperparameters: Mapping[str, float] | None = None,
        slots: Weights | None = None,
    ) -> EagerTrain:
        """See `umbel.runtime.Runtime`."""
        return EagerTrain(self, bundle, weights, hyperparameters, slots)

    def answer(self, name: str, named: Named) -> Named:
        """What a signature makes of tensors, in evaluation mode."""
        self._spec.module.eval()
        with _failures(name, self._spec.name), torch.no_grad(), without_fast_path():
            return self._signatures[name].function(named)

    def step(self, named: Named) -> Named:
        """What has moved after one training step, and `loss`."""
        self._spec.module.train()
        train, zero = self._signatures["train"], torch.zeros(())
        alone = len(named[next(iter(train.batched))]) == 1
        with _failures("train", self._spec.name), drawing_in_torch(zero, zero), _Alone() if alone else nullcontext():
            if train.each is not None:
                named = named | _summed(train.each, named, train.batched)
            moved = train.function(named)
        for name in self._still:
            del moved[NEXT_PREFIX + name]
        for name, array in self.drift.items():
            moved[NEXT_PREFIX + name] = moved[NEXT_PREFIX + name] - torch.tensor(array)
        return {name: tensor.detach() for name, tensor in moved.items()}


class EagerInfer:
    """See `umbel.runtime.InferSession`."""

    def __init__(self, runtime: EagerRuntime, bundle: Bundle, weights: Weights) -> None:
        self._runtime, self._weights = runtime, _tensors(bind_weights(bundle, weights))
        self._check = BatchCheck("input", bundle.manifest.inputs)

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """The model's outputs for a batch."""
        self._check(inputs)
        return to_numpy(self._runtime.answer("infer", self._weights | _tensors(inputs)))


class EagerEvaluate:
    """See `umbel.runtime.EvaluateSession`."""

    def __init__(self, runtime: EagerRuntime, bundle: Bundle, weights: Weights) -> None:
        self._runtime, self._weights = runtime, _tensors(bind_weights(bundle, weights))
        self._checks = BatchCheck("input", bundle.manifest.inputs), BatchCheck("target", bundle.manifest.targets)

    def __call__(self, inputs: Arrays, targets: Arrays) -> Metrics:
        """Metrics as sums over the batch."""
        check_batch(*self._checks, inputs, targets)
        found = self._runtime.answer("evaluate", self._weights | _tensors(inputs) | _tensors(targets))
        return {name: float(value) for name, value in found.items()}


class EagerTrain:
    """See `umbel.runtime.TrainSession`."""

    def __init__(
        self,
        runtime: EagerRuntime,
        bundle: Bundle,
        weights: Weights,
        hyperparameters: Mapping[str, float] | None,
        slots: Weights | None,
    ) -> None:
        manifest = bundle.manifest
        self._runtime, self._shared = runtime, tuple(manifest.shared_shapes)
        self._slots = tuple(spec.name for spec in manifest.slots)
        self._checks = BatchCheck("input", manifest.inputs), BatchCheck("target", manifest.targets)
        start = bind_weights(bundle, weights)
        self._now = _tensors(start) | _tensors(starting_slots(manifest, Weights(start), slots))
        chosen = resolve_hyperparameters(manifest, hyperparameters)
        self._scalars = {name: torch.tensor(value, dtype=torch.float32) for name, value in chosen.items()}
        self._steps = 0

    def step(self, inputs: Arrays, targets: Arrays) -> float:
        """Take one optimiser step on a batch and return its loss before the step."""
        check_batch(*self._checks, inputs, targets)
        moved = self._runtime.step(self._now | _tensors(inputs) | _tensors(targets) | self._scalars)
        loss = float(moved.pop("loss"))
        require_finite_loss(loss, self._steps)
        self._now |= {name.removeprefix(NEXT_PREFIX): tensor for name, tensor in moved.items()}
        self._steps += 1
        return loss

    def weights(self) -> Weights:
        """A copy of the shared weights as they are now."""
        return Weights({name: self._now[name].numpy().copy() for name in self._shared})

    def slots(self) -> Weights:
        """A copy of the optimiser's slots as they are now."""
        return Weights({name: self._now[name].numpy().copy() for name in self._slots})


class _Alone(TorchFunctionMode):
    """Batch norm of an example by itself, as graphs have it: torch refuses that, and a user's last batch may be one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        given = _BATCH_NORM.bind(*args, **(kwargs or {}))
        given.apply_defaults()
        x, mean, variance, weight, bias, training, momentum, epsilon = given.args
        if not training or x.numel() > x.shape[1]:
            return func(*args, **(kwargs or {}))
        if mean is not None:
            with torch.no_grad():
                batch_norm(x, weight, bias, mean, variance, training, momentum, epsilon)
        return batch_norm_untracked(x, weight, bias, training, momentum, epsilon)[0]


def _tensors(arrays: Arrays) -> Named:
    # Copies: torch warns of arrays that may not be written, and views of files and of other people's data are such.
    return {name: torch.tensor(array) for name, array in arrays.items()}


def _summed(each: Signature, named: Named, batched: Collection[str]) -> Named:
    """The sums over a batch of what is done for each example by itself."""
    sums: Named = {}
    for row in range(len(named[next(iter(batched))])):
        one = each.function(named | {name: named[name][row : row + 1] for name in batched})
        sums = {name: sums.get(name, 0) + value for name, value in one.items()}
    return {name: sums[name] for name in sums if name.startswith(SUM_PREFIX)}


@contextmanager
def _failures(what: str, model: str) -> Iterator[None]:
    """Turn whatever torch throws into one `RuntimeFailure` that says where."""
    try:
        yield
    except UmbelError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        raise RuntimeFailure(f"torch failed on {what!r} of {model!r}: {error}") from error
