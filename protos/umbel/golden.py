"""Golden examples: a few inputs and the answers that the maker of a version got for them.

They travel in every bundle, so that a machine finds out whether its own runtime answers as the maker's did before
it trusts a version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import safetensors
import safetensors.numpy

from umbel.errors import BundleInvalid, GoldenMismatch, MalformedMessage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from umbel.bundle import Bundle
    from umbel.runtime import InferSession, Runtime

_INPUT: Final = "input."
_OUTPUT: Final = "output."


@dataclass(frozen=True, slots=True, eq=False)
class GoldenExamples:
    """Inputs by name and the outputs they gave by name; the first dimension of each is the batch."""

    inputs: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]

    def to_bytes(self) -> bytes:
        """As a safetensors file; equal examples have equal bytes."""
        tensors = {_INPUT + name: array for name, array in self.inputs.items()}
        tensors |= {_OUTPUT + name: array for name, array in self.outputs.items()}
        return safetensors.numpy.save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)})

    @classmethod
    def from_bytes(cls, data: bytes) -> GoldenExamples:
        """Undo `to_bytes`.

        Raises:
            MalformedMessage: not a safetensors file, or arrays that are neither inputs nor outputs.
        """
        try:
            tensors = safetensors.numpy.load(data)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise MalformedMessage(f"golden examples are not a safetensors file: {error}") from error
        inputs = {name.removeprefix(_INPUT): a for name, a in tensors.items() if name.startswith(_INPUT)}
        outputs = {name.removeprefix(_OUTPUT): a for name, a in tensors.items() if name.startswith(_OUTPUT)}
        if len(inputs) + len(outputs) != len(tensors) or not inputs or not outputs:
            raise MalformedMessage(f"golden examples need inputs and outputs, found {sorted(tensors)[:20]}")
        return cls(inputs, outputs)


def answer(session: InferSession, inputs: Mapping[str, NDArray[Any]]) -> GoldenExamples:
    """Golden examples made of `inputs` and what `session` answers to them.

    Raises:
        GoldenMismatch: an answer isn't finite, so nothing could ever agree with it.
    """
    outputs = session(inputs)
    for name, array in outputs.items():
        _require_finite(name, array)
    return GoldenExamples(dict(inputs), outputs)


def verify_golden(runtime: Runtime, bundle: Bundle) -> float:
    """Run the bundle's golden examples here and return the largest absolute difference of any output.

    Raises:
        GoldenMismatch: an output differs by more than the manifest's tolerance, or isn't finite.
        BundleInvalid: the examples don't answer every output of the manifest.
        RuntimeFailure: the graph doesn't load or run.
    """
    golden = bundle.golden()
    wanted = {spec.name for spec in bundle.manifest.outputs}
    if set(golden.outputs) != wanted:
        raise BundleInvalid(f"golden examples answer {sorted(golden.outputs)}, the model gives {sorted(wanted)}")
    found = runtime.infer(bundle, bundle.weights())(golden.inputs)
    tolerance = bundle.manifest.golden_tolerance
    return max(_difference(name, found[name], golden.outputs[name], tolerance) for name in sorted(wanted))


def _difference(name: str, found: NDArray[Any], expected: NDArray[Any], tolerance: float) -> float:
    if found.shape != expected.shape:
        raise GoldenMismatch(f"output {name!r} has shape {found.shape} here, golden is {expected.shape}")
    _require_finite(name, found)
    difference = float(np.max(np.abs(found.astype(np.float64) - expected.astype(np.float64)), initial=0.0))
    if not difference <= tolerance:
        raise GoldenMismatch(
            f"output {name!r} differs by {difference:.3g} on golden examples, {tolerance:.3g} is allowed; "
            "don't use this version on this machine"
        )
    return difference


def _require_finite(name: str, array: NDArray[Any]) -> None:
    if not np.isfinite(array).all():
        raise GoldenMismatch(f"output {name!r} holds NaN or infinity on golden examples")
