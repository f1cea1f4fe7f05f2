"""The packaged smartwatch bundle, copies of it to spoil, and made-up motion to feed it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from umbel.bundle import Bundle
from umbel.randomness import generator
from umbel_models.zoo import bundle_path

WATCH = Bundle.open(bundle_path("smartwatch"))
FILES = tuple(sorted(WATCH.manifest.files))


def copy_to(folder: Path) -> Path:
    """A copy of the bundle, under `folder`."""
    return Path(shutil.copytree(bundle_path("smartwatch"), folder / "watch"))


def batch(size: int, seed: int = 0) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.int64]]]:
    """Inputs and targets of `size` examples."""
    chance = generator("watch", seed)
    x = chance.normal(size=(size, 6, 100)).astype(np.float32)
    return {"x": x}, {"y": chance.integers(0, 7, size)}
