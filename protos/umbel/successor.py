"""The bundle of the next version of an architecture: new weights, new golden answers, the same graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from umbel.bundle import Bundle, file_refs
from umbel.manifest import GOLDEN_FILE, WEIGHTS_FILE, Manifest
from umbel.self_check import answer
from umbel.weights import Weights, require_finite, require_shapes

if TYPE_CHECKING:
    from umbel.runtime import Runtime


def successor(parent: Bundle, weights: Weights, runtime: Runtime) -> tuple[Manifest, dict[str, bytes]]:
    """The bundle of a new version of the same architecture, as its manifest and the files that are new.

    Args:
        parent: where graphs, frozen weights and golden inputs come from.
        weights: the new shared weights (trainable and buffers).
        runtime: answers the golden examples of the new version.

    Raises:
        WeightsMismatch: `weights` are not of this architecture.
        NotFinite: `weights` hold NaN or infinity.
        GoldenMismatch: an answer to a golden example isn't finite.
        RuntimeFailure: the runtime can't run these weights.
    """
    require_shapes(weights.shapes, parent.manifest.shared_shapes)
    require_finite(weights)
    frozen = [spec.name for spec in parent.manifest.frozen]
    full = weights
    if frozen:
        full = Weights({**weights.arrays, **parent.weights().subset(frozen).arrays})
    golden = answer(runtime.infer(parent, full), parent.golden().inputs)
    files = {WEIGHTS_FILE: full.to_bytes(), GOLDEN_FILE: golden.to_bytes()}
    manifest = replace(parent.manifest, files={**parent.manifest.files, **file_refs(files)})
    return manifest, files
