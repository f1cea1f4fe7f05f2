"""Examples and inputs from a file: NumPy's (`.npy`, `.npz`), read without running anything that stands in it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from umbel.errors import InputMismatch, MalformedMessage, NotFound
from umbel.manifest import Manifest
from umbel_client.examples import INPUT, TARGET, Arrays, ExampleStore, require_batch
from umbel_client.predictor import require_examples


def import_npz(
    store: ExampleStore, path: Path, *, at: float, subject: str = "", manifest: Manifest | None = None
) -> int:
    """Add the examples of an archive; returns how many.

    Arrays `x` and `y` (or several, named `x/NAME` and `y/NAME` for a model with several inputs or targets), with the
    examples along the first dimension; optionally `held_back`, one boolean each. Rows are taken as oldest first. All
    are added, or none; with a manifest, only what its model can learn from.

    Raises:
        NotFound: there is no such file.
        MalformedMessage: not such an archive.
        InputMismatch: the arrays don't fit together, to the model, or to what the store holds.
        NotFinite: NaN or infinity in them.
    """
    arrays = _read(path)
    if isinstance(arrays, np.ndarray):
        raise MalformedMessage(f"{path} holds one array; it needs to be an archive with `x` and `y`")
    inputs, targets = _named(arrays, INPUT), _named(arrays, TARGET)
    if not inputs or not targets:
        raise MalformedMessage(f"{path} has arrays {sorted(arrays)}; it needs `x` and `y`, or `x/NAME` and `y/NAME`")
    require_batch(inputs, targets)
    if manifest is not None:
        require_examples(manifest, inputs, targets)
    held_back = arrays.get("held_back")
    try:
        return store.add(inputs, targets, at=at, subject=subject, held_back=held_back)
    except InputMismatch as error:
        raise InputMismatch(f"{path}: {error}") from error


def read_inputs(path: Path) -> Arrays | np.ndarray:
    """What a model is to answer for: an array, or arrays by name, in an archive named `x/NAME` or by their names alone.

    Raises:
        NotFound: there is no such file.
        MalformedMessage: neither `.npy` nor `.npz`.
    """
    arrays = _read(path)
    return arrays if isinstance(arrays, np.ndarray) else _below(INPUT, arrays) or arrays


def _read(path: Path) -> dict[str, np.ndarray] | np.ndarray:
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return loaded if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except FileNotFoundError:
        raise NotFound(f"no file at {path}") from None
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError, EOFError, KeyError) as error:
        raise MalformedMessage(f"{path} isn't a NumPy file of plain arrays: {error}") from error


def _named(arrays: Arrays, letter: str) -> dict[str, np.ndarray]:
    return {letter: arrays[letter]} if letter in arrays else _below(letter, arrays)


def _below(letter: str, arrays: Arrays) -> dict[str, np.ndarray]:
    prefix = letter + "/"
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
