"""What a runtime answers to golden examples: made here for a version, checked on any machine before trust."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from umbel.errors import BundleInvalid, GoldenMismatch
from umbel.golden import GoldenExamples

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from umbel.bundle import Bundle
    from umbel.runtime import InferSession, Runtime


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
    """Run the bundle's golden examples here and return the largest difference of any output, relative to that output's
    largest number, or to 1 where that is less.

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
    # An answer in dollars is rounded more coarsely than one between 0 and 1.
    size = max(1.0, float(np.max(np.abs(expected), initial=0.0)))
    difference = float(np.max(np.abs(found.astype(np.float64) - expected.astype(np.float64)), initial=0.0)) / size
    if not difference <= tolerance:
        raise GoldenMismatch(
            f"output {name!r} differs by {difference:.3g} on golden examples, {tolerance:.3g} is allowed; "
            "don't use this version on this machine"
        )
    return difference


def _require_finite(name: str, array: NDArray[Any]) -> None:
    if not np.isfinite(array).all():
        raise GoldenMismatch(f"output {name!r} holds NaN or infinity on golden examples")
