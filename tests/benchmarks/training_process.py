"""A process that only trains, to see how much memory that takes: on a runtime of ours, or with torch."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

from tests.benchmarks.harness import peak_mb

STEPS = 30


def on_runtime(name: str, folder: Path, batch: int) -> None:
    import numpy as np

    from umbel.bundle import Bundle
    from umbel.runtime.named import runtime_named

    bundle = Bundle.open(folder)
    session = runtime_named(name).train(bundle, bundle.weights())
    inputs = {key: array[np.arange(batch) % len(array)] for key, array in bundle.golden().inputs.items()}
    sizes = {one.name: [size or batch for size in one.shape] for one in bundle.manifest.targets}
    targets = {one.name: np.ones(sizes[one.name], one.dtype) for one in bundle.manifest.targets}
    for _ in range(STEPS):
        session.step(inputs, targets)


def on_torch(name: str, batch: int) -> None:
    import torch

    torch.set_num_threads(1)
    module, _, attribute = name.partition(":")
    spec = getattr(import_module(f"umbel_models.zoo.{module}"), attribute)()
    inputs, targets = spec.batch(batch)
    optimizer = torch.optim.SGD(spec.module.parameters(), lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        spec.loss(spec.module(*inputs.values()), *targets.values()).backward()
        optimizer.step()


if __name__ == "__main__":
    way, what, size = sys.argv[1:]
    if way == "torch":
        on_torch(what, int(size))
    else:
        on_runtime(way, Path(what), int(size))
    print(json.dumps({"peak_mb": peak_mb()}))
