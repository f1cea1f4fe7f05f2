"""Named arrays of a model, as one value: they add, scale, have a norm, and turn into bytes and back.

Names are those of the graph's tensors (`p_…` trainable, `b_…` buffers, `f_…` frozen), kept in sorted order, so
that a flat vector means the same on every machine. All arrays are little-endian float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import safetensors
import safetensors.numpy

from umbel.errors import MalformedMessage, NotFinite, WeightsMismatch

if TYPE_CHECKING:
    from numpy.typing import NDArray


Shapes = Mapping[str, tuple[int, ...]]
"""Name -> shape: what two sets of weights must share to be added."""

_BLOCK: Final = 8192
"""Numbers taken at a time: small enough for the cache, and below the size from which BLAS wakes its threads."""
_MAPPED: Final = 1 << 20
"""Bytes of a file that is worth its mapping, which takes three times as long as reading a small one."""


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Read-only float32 arrays by name, in sorted order."""

    arrays: Mapping[str, NDArray[np.float32]]

    def __post_init__(self) -> None:
        ordered = {}
        for name in sorted(self.arrays):
            # Not ascontiguousarray, which gives a scalar a dimension.
            array = np.asarray(self.arrays[name], dtype="<f4", order="C").view()
            array.flags.writeable = False
            ordered[name] = array
        object.__setattr__(self, "arrays", ordered)

    # A mapping, for reading.

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Weights):
            return NotImplemented
        return self.shapes == other.shapes and all(np.array_equal(self[n], other[n]) for n in self)

    def __repr__(self) -> str:
        return f"Weights({len(self)} arrays, {self.size} numbers)"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in sorted order."""
        return {name: array.shape for name, array in self.arrays.items()}

    @property
    def size(self) -> int:
        """How many numbers there are in all."""
        return sum(array.size for array in self.arrays.values())

    # Arithmetic. Updates are "new minus old".

    def __add__(self, other: Weights) -> Weights:
        require_shapes(other.shapes, self.shapes)
        return Weights({name: self[name] + other[name] for name in self})

    def __sub__(self, other: Weights) -> Weights:
        require_shapes(other.shapes, self.shapes)
        return Weights({name: self[name] - other[name] for name in self})

    def scaled(self, factor: float) -> Weights:
        """Each array times `factor`."""
        return Weights({name: array * np.float32(factor) for name, array in self.arrays.items()})

    def norm(self) -> float:
        """The Euclidean norm over all arrays together, summed in float64."""
        block = np.empty(_BLOCK, np.float64)
        total = 0.0
        for array in self.arrays.values():
            flat = array.ravel()
            for start in range(0, flat.size, _BLOCK):
                part = flat[start : start + _BLOCK]
                wide = block[: part.size]
                wide[:] = part
                total += float(np.dot(wide, wide))
        return math.sqrt(total)

    def clipped(self, bound: float) -> Weights:
        """Scaled down, where needed, so that the norm is at most `bound`."""
        norm = self.norm()
        return self if norm <= bound else self.scaled(bound / norm)

    def is_finite(self) -> bool:
        """Whether no array holds NaN or infinity."""
        return all(bool(np.isfinite(array).all()) for array in self.arrays.values())

    def subset(self, names: Iterator[str] | list[str] | tuple[str, ...]) -> Weights:
        """Only the arrays of these names."""
        return Weights({name: self.arrays[name] for name in names})

    # Bytes.

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        return safetensors.numpy.save(dict(self.arrays))

    @classmethod
    def from_bytes(cls, data: bytes) -> Weights:
        """Read a safetensors file of float32 arrays.

        Raises:
            MalformedMessage: not a safetensors file, or one with other dtypes.
        """
        try:
            arrays = safetensors.numpy.load(data)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise MalformedMessage(f"not a safetensors file: {error}") from error
        for name, array in arrays.items():
            if array.dtype != np.float32:
                raise MalformedMessage(f"array {name!r} is {array.dtype}; weights are float32")
        return cls(arrays)

    @classmethod
    def of_file(cls, path: Path) -> Weights:
        """Read a safetensors file of float32 arrays, or map it into memory where it is large.

        Of a file that is mapped only what is looked at is read, and the system may forget it again: a model that is
        held costs no memory of its own. The file must stay as it is; another may take its place.

        Raises:
            MalformedMessage: not a safetensors file, or one with other dtypes.
            OSError: it can't be read.
        """
        if path.stat().st_size < _MAPPED:
            return cls.from_bytes(path.read_bytes())
        try:
            with safetensors.safe_open(path, "np") as file:  # makes sure that arrays fill the file, one after the other
                found = {name: file.get_slice(name) for name in file.offset_keys()}
                kinds = {name: one.get_dtype() for name, one in found.items()}
                shapes = {name: tuple(one.get_shape()) for name, one in found.items()}
        except safetensors.SafetensorError as error:
            raise MalformedMessage(f"not a safetensors file: {error}") from error
        for name, kind in kinds.items():
            if kind != "F32":
                raise MalformedMessage(f"array {name!r} is {kind}; weights are float32")
        sizes = [math.prod(shape) for shape in shapes.values()]
        if not any(sizes):
            return cls.zeros(shapes)
        begin = path.stat().st_size - 4 * sum(sizes)
        numbers = np.asarray(np.memmap(path, "<f4", "r", begin))
        ends = np.cumsum(sizes)
        return cls(
            {
                name: numbers[end - size : end].reshape(shapes[name])
                for name, size, end in zip(shapes, sizes, ends, strict=True)
            }
        )

    def to_vector(self) -> NDArray[np.float32]:
        """All numbers in one flat array, names in sorted order, each array in C order."""
        if not self.arrays:
            return np.zeros(0, np.float32)
        return np.concatenate([array.ravel() for array in self.arrays.values()])

    @classmethod
    def from_vector(cls, vector: NDArray[np.float32], shapes: Shapes) -> Weights:
        """Undo `to_vector`.

        Raises:
            WeightsMismatch: the vector's length isn't what the shapes ask for.
        """
        wanted = sum(int(np.prod(shape)) for shape in shapes.values())
        if vector.size != wanted:
            raise WeightsMismatch(f"expected {wanted} numbers, got {vector.size}")
        arrays, start = {}, 0
        for name in sorted(shapes):
            size = int(np.prod(shapes[name]))
            arrays[name] = vector[start : start + size].reshape(shapes[name])
            start += size
        return cls(arrays)

    @classmethod
    def zeros(cls, shapes: Shapes) -> Weights:
        """The zero of addition, for these shapes."""
        return cls({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})


def require_shapes(found: Shapes, wanted: Shapes) -> None:
    """Raise `WeightsMismatch`, naming the first difference, unless both have the same names and shapes."""
    for name in sorted(set(found) | set(wanted)):
        if name not in found:
            raise WeightsMismatch(f"array {name!r} is missing")
        if name not in wanted:
            raise WeightsMismatch(f"array {name!r} is not part of this model")
        if tuple(found[name]) != tuple(wanted[name]):
            raise WeightsMismatch(f"array {name!r} has shape {found[name]}, expected {wanted[name]}")


def require_finite(weights: Weights) -> None:
    """Raise `NotFinite`, naming the first array that holds NaN or infinity."""
    for name, array in weights.arrays.items():
        if not np.isfinite(array).all():
            raise NotFinite(f"array {name!r} holds NaN or infinity")
