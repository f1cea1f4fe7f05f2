"""What a bundle takes, gives and is made of, as plain data; needs no torch."""

from __future__ import annotations

import math
from typing import Any

from umbel.bundle import Bundle
from umbel.histograms import Histogram, without_bins
from umbel.manifest import TensorSpec


def describe(bundle: Bundle) -> dict[str, Any]:
    """What a bundle takes, gives and is made of, as plain data."""
    manifest = bundle.manifest
    return {
        "model": manifest.model,
        "description": manifest.description,
        "inputs": [_tensor(spec) for spec in manifest.inputs],
        "targets": [_tensor(spec) for spec in manifest.targets],
        "outputs": [_tensor(spec) for spec in manifest.outputs],
        "labels": list(manifest.labels),
        "weights": {role: _size(getattr(manifest, role)) for role in ("trainable", "buffers", "frozen")},
        "hyperparameters": dict(manifest.hyperparameters),
        "metrics": list(without_bins(dict.fromkeys(manifest.metrics, 0.0))),
        "histograms": {one.name: _bins(one) for one in manifest.histograms},
        "runtimes": sorted(manifest.graphs),
        "precision": {name: f"{one.kind}: {one.reason}" for name, one in manifest.precision.items()}
        or "float32: fewer bits were not asked for (build --quantise int8)",
        "files": {name: ref.size for name, ref in sorted(manifest.files.items())},
        "graph_bytes": {
            name: sum(manifest.files[file].size for file in files.values()) for name, files in manifest.graphs.items()
        },
    }


def _tensor(spec: TensorSpec) -> str:
    sizes = ", ".join("batch" if size is None else str(size) for size in spec.shape)
    return f"{spec.name}: {spec.dtype} [{sizes}]"


def _bins(histogram: Histogram) -> str:
    return f"{len(histogram.bins)} bins about {histogram.edges[0]:.4g} to {histogram.edges[-1]:.4g}"


def _size(specs: tuple[TensorSpec, ...]) -> int:
    return sum(math.prod(spec.fixed_shape) for spec in specs)
