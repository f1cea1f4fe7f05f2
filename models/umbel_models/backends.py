"""The runtimes that a bundle may be made for: each with its decompositions, its translator and its gate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final

from umbel.errors import CannotCompile, NotFound
from umbel.runtime import Runtime
from umbel.runtime.named import runtime_named
from umbel.weights import Weights
from umbel_models.adapters import merge_adapters
from umbel_models.decompositions import KEPT, decomposition_table
from umbel_models.lowering import lower
from umbel_models.lstm import whole_layers
from umbel_models.signatures import Signature
from umbel_models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Backend:
    """A runtime as the compiler sees it."""

    name: str
    suffix: str
    """Of the graphs' file names."""
    translate: Callable[[ModelSpec, Signature, Weights], bytes]
    folds: bool
    """Whether the runtime works out what hangs on constants alone when it opens `infer`."""

    def runtime(self) -> Runtime:
        """The runtime itself, with one thread."""
        return runtime_named(self.name)

    def graph(self, spec: ModelSpec, signature: Signature, weights: Weights) -> bytes:
        """One signature as a file of this runtime."""
        spec.module.train(signature.name == "train")
        merge_adapters(spec.module, self.folds and signature.name == "infer")
        return self.translate(spec, signature, weights)


def _to_onnx(spec: ModelSpec, signature: Signature, weights: Weights) -> bytes:
    from umbel_models.onnx import export, external_weights

    # Without a gradient to take, ONNX Runtime's own operator for a recurrent layer is the fastest.
    with nullcontext() if signature.name == "train" else whole_layers():
        lowered = lower(signature, spec.module, decomposition_table(), KEPT)
    return export(lowered, external_weights(weights))


def _to_litert(spec: ModelSpec, signature: Signature, weights: Weights) -> bytes:
    from umbel_models import litert

    del weights  # the runtime binds them
    return litert.export(lower(signature, spec.module, litert.litert_table(), litert.KEPT))


BACKENDS: Final = {
    "onnx": Backend("onnx", "onnx", _to_onnx, folds=True),
    "litert": Backend("litert", "tflite", _to_litert, folds=False),
}


def backend(name: str) -> Backend:
    """A runtime by its name.

    Raises:
        CannotCompile: nothing goes by that name, or its package isn't installed.
    """
    if name not in BACKENDS:
        raise CannotCompile(f"no runtime goes by {name!r}; known are {', '.join(BACKENDS)}")
    found = BACKENDS[name]
    try:
        found.runtime()
    except NotFound as missing:
        raise CannotCompile(f"compiling for {name!r} ends with a check on it: {missing}") from missing
    return found
