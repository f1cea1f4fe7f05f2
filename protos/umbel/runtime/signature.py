"""What goes in is what the manifest says: checks that every runtime makes, cheap enough for each call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from umbel.errors import InputMismatch, NotFinite, OutOfBounds
from umbel.manifest import ANCHOR_PREFIX, Manifest, TensorSpec
from umbel.runtime import Arrays
from umbel.weights import Weights, require_shapes

if TYPE_CHECKING:
    from umbel.bundle import Bundle


_LARGEST: Final = float(np.finfo(np.float32).max)


class BatchCheck:
    """Checks named arrays against specs: names, dtypes, shapes, one batch size for all."""

    __slots__ = ("_specs", "_what")

    def __init__(self, what: str, specs: Sequence[TensorSpec]) -> None:
        self._what = what
        self._specs = tuple((spec.name, np.dtype(spec.dtype), spec.shape[1:], spec) for spec in specs)

    def __call__(self, arrays: Mapping[str, NDArray[Any]]) -> int:
        """The batch size; -1 when there are no specs at all.

        Raises:
            InputMismatch: naming the first array that is missing, unknown or of another dtype or shape.
        """
        batch = -1
        for name, dtype, tail, spec in self._specs:
            array = arrays.get(name)
            if not isinstance(array, np.ndarray) or array.dtype != dtype or not array.ndim or array.shape[1:] != tail:
                self._refuse(spec, array)
            if type(array) is not np.ndarray and np.ma.is_masked(array):
                self._refuse(spec, array)
            if array.shape[0] != batch:
                if batch >= 0 or not array.shape[0]:
                    self._refuse_batch(name, array.shape[0], batch)
                batch = array.shape[0]
        if len(arrays) != len(self._specs):
            known = [name for name, *_ in self._specs]
            raise InputMismatch(f"{sorted(set(arrays) - set(known))} are no {self._what}s of this model: {known}")
        return batch

    def _refuse(self, spec: TensorSpec, array: object) -> NoReturn:
        wanted = f"{spec.dtype} [{', '.join('batch' if size is None else str(size) for size in spec.shape)}]"
        if array is None:
            raise InputMismatch(f"{self._what} {spec.name!r} is missing; give {wanted}")
        if not isinstance(array, np.ndarray):
            raise InputMismatch(f"{self._what} {spec.name!r} is a {type(array).__name__}; give a numpy array, {wanted}")
        if np.ma.is_masked(array):
            raise InputMismatch(
                f"{self._what} {spec.name!r} is masked in parts, which no graph sees; fill them, and give {wanted}"
            )
        raise InputMismatch(f"{self._what} {spec.name!r} is {array.dtype} {list(array.shape)}; give {wanted}")

    def _refuse_batch(self, name: str, size: int, batch: int) -> NoReturn:
        if size:
            raise InputMismatch(f"{self._what} {name!r} has {size} examples where others have {batch}")
        raise InputMismatch(f"{self._what} {name!r} holds no example; give at least one")


def check_batch(check_inputs: BatchCheck, check_targets: BatchCheck, inputs: Arrays, targets: Arrays) -> None:
    """Check a batch of examples with their targets.

    Raises:
        InputMismatch: one of the two isn't what the manifest says, or they are of different sizes.
    """
    examples, answers = check_inputs(inputs), check_targets(targets)
    if examples != answers and answers >= 0:
        raise InputMismatch(f"{examples} examples with targets for {answers}; give one target for each example")


def bind_weights(bundle: Bundle, weights: Weights) -> dict[str, NDArray[np.float32]]:
    """Shared weights as given, and frozen ones from the bundle, by name.

    Raises:
        WeightsMismatch: `weights` are not of this model.
    """
    return shared_weights(bundle, weights) | frozen_weights(bundle)


def shared_weights(bundle: Bundle, weights: Weights) -> dict[str, NDArray[np.float32]]:
    """Shared weights as given, by name.

    Raises:
        WeightsMismatch: `weights` are not of this model.
    """
    shared = {name: array for name, array in weights.arrays.items() if not name.startswith("f_")}
    require_shapes({name: array.shape for name, array in shared.items()}, bundle.manifest.shared_shapes)
    return shared


def frozen_weights(bundle: Bundle) -> dict[str, NDArray[np.float32]]:
    """Frozen weights of the bundle, by name; none are read where there are none."""
    if not bundle.manifest.frozen:
        return {}
    own = bundle.weights()
    return {spec.name: own[spec.name] for spec in bundle.manifest.frozen}


def starting_slots(manifest: Manifest, weights: Weights, slots: Weights | None) -> dict[str, NDArray[np.float32]]:
    """Slots to start with: those handed over, or zeros, and for anchors the weights themselves.

    Raises:
        WeightsMismatch: `slots` are not of this model.
    """
    shapes = {spec.name: spec.fixed_shape for spec in manifest.slots}
    if slots is not None:
        require_shapes(slots.shapes, shapes)
        return dict(slots.arrays)
    return {name: _fresh_slot(name, shape, weights) for name, shape in shapes.items()}


def _fresh_slot(name: str, shape: tuple[int, ...], weights: Weights) -> NDArray[np.float32]:
    if name.startswith(ANCHOR_PREFIX):
        return weights["p_" + name.removeprefix(ANCHOR_PREFIX)]
    return np.zeros(shape, np.float32)


def resolve_hyperparameters(manifest: Manifest, chosen: Mapping[str, float] | None) -> dict[str, float]:
    """The manifest's values, overridden by the chosen ones.

    Raises:
        OutOfBounds: a name that the model's training graph doesn't take, or a value that no plan may give.
    """
    unknown = sorted(set(chosen or {}) - set(manifest.hyperparameters))
    if unknown:
        known = sorted(manifest.hyperparameters)
        raise OutOfBounds(f"{manifest.model!r} has no hyper-parameters {unknown}; it has {known}")
    for name, value in (chosen or {}).items():
        if not 0 <= value <= _LARGEST:
            raise OutOfBounds(
                f"{name} is {value}; it must be a number that isn't negative, and that float32 has room for"
            )
    return {**manifest.hyperparameters, **(chosen or {})}


def require_finite_loss(loss: float, step: int) -> None:
    """Raise `NotFinite` for a loss that is NaN or infinite."""
    if not np.isfinite(loss):
        raise NotFinite(f"the loss is {loss} at step {step}; lower the learning rate, or look for odd examples")
