"""The flatbuffer being written: tensors, constants, operators, and how an ATen value becomes a LiteRT tensor.

A tensor of three or four dimensions may have a twin with its channels last, which is how LiteRT convolves. What works
on twins gives a twin; the order of torch is made when somebody asks for it, and dropped when nobody does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from umbel.errors import OperatorNotSupported
from umbel_models.onnx.graph import is_open, numpy_dtype
from umbel_models.translation import Handler, registering

HANDLERS: Final[dict[Any, Handler]] = {}
"""ATen operator -> what translates it; each module of a family fills in its own, by `translates`."""
translates: Final = registering(HANDLERS)

Shape = Sequence[Any]
"""Sizes as numbers, or torch's symbols where they hang on the batch."""


def shape_of(node: fx.Node) -> Shape:
    """The sizes of a node's tensor."""
    return tuple(node.meta["val"].shape)


def dtype_of(node: fx.Node) -> np.dtype[Any]:
    """The dtype of a node's tensor."""
    return numpy_dtype(node.meta["val"].dtype)


def size_of(value: Any) -> Any:
    """A size in a node's arguments, as a number or a symbol."""
    return value.meta["val"] if isinstance(value, fx.Node) else value


@dataclass(slots=True)
class TensorEntry:
    """One tensor to be: constants have data."""

    shape: Shape
    dtype: np.dtype[Any]
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class OperatorEntry:
    """One operator to be."""

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


class Writer:
    """Collects the tensors and operators of one graph.

    Args:
        has_constant_weights: the runtime binds all weights as constants before it loads the graph.
    """

    def __init__(self, has_constant_weights: bool = False) -> None:
        self.has_constant_weights = has_constant_weights
        self.tensors: list[TensorEntry] = []
        self.operators: list[OperatorEntry] = []
        self.values: dict[fx.Node, Any] = {}
        """What each ATen node became."""
        self._turned: dict[int, tuple[int, Sequence[int]]] = {}
        """Of each transposed tensor, from which it was made, and the order."""
        self._twins: dict[int, int] = {}
        self._known: dict[object, int] = {}
        self._made: dict[object, tuple[int, ...]] = {}

    def tensor(self, shape: Shape, dtype: Any, data: bytes | None = None) -> int:
        """A new tensor's number."""
        self.tensors.append(TensorEntry(tuple(shape), np.dtype(dtype), data))
        return len(self.tensors) - 1

    def constant(self, value: Any, dtype: Any = None) -> int:
        """The number of a constant; equal ones share it."""
        array: NDArray[Any] = np.asarray(value, dtype, order="C")
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            self._known[key] = self.tensor(array.shape, array.dtype, array.tobytes())
        return self._known[key]

    def ints(self, *values: int) -> int:
        """A constant vector of int32, as LiteRT wants shapes and axes."""
        return self.constant(values, np.int32)

    def op(self, kind: str, inputs: Sequence[Any], shape: Shape, dtype: Any, **options: Any) -> int:
        """Add an operator and give the number of its output; equal operators are made once."""
        return self.several(kind, inputs, [(shape, dtype)], **options)[0]

    def several(
        self, kind: str, inputs: Sequence[Any], outputs: Sequence[tuple[Shape, Any]], **options: Any
    ) -> tuple[int, ...]:
        """Add an operator with any number of outputs, each a shape and a dtype."""
        numbers = tuple(self.number(value) for value in inputs)
        key = (kind, numbers, repr(sorted(options.items())), tuple(str(np.dtype(dtype)) for _, dtype in outputs))
        if key not in self._made:
            made = tuple(self.tensor(shape, dtype) for shape, dtype in outputs)
            self.operators.append(OperatorEntry(kind, numbers, made, options))
            self._made[key] = made
        return self._made[key]

    def number(self, value: Any) -> int:
        """The number of an ATen node's tensor, of a constant, or of nothing (-1)."""
        if value is None:
            return -1
        if isinstance(value, int):
            return value
        if isinstance(value, fx.Node):
            found = self.values[value]
            return int(found[0] if isinstance(found, (list, tuple)) else found)
        return self.constant(value)

    def shape(self, number: int) -> Shape:
        """The sizes of a tensor by its number."""
        return self.tensors[number].shape

    def cast(self, value: Any, dtype: Any) -> int:
        """A tensor, or a number, as a tensor of this dtype."""
        wanted = np.dtype(dtype)
        if not isinstance(value, fx.Node):
            return self.constant(value, wanted)
        number = self.number(value)
        if not isinstance(value.meta["val"], torch.Tensor):
            # Sizes are kept as vectors of one; as numbers they have no dimension.
            number = self.op("RESHAPE", [number, self.ints()], (), self.tensors[number].dtype)
        return self.cast_number(number, wanted)

    def cast_number(self, number: int, dtype: Any) -> int:
        """A tensor by its number, as one of this dtype."""
        if self.tensors[number].dtype == np.dtype(dtype):
            return number
        made = self.op("CAST", [number], self.shape(number), dtype)
        if number in self._twins:
            twin = self._twins[number]
            self._twins[made] = self.op("CAST", [twin], self.shape(twin), dtype)
        return made

    def reshape(self, value: Any, sizes: Shape) -> int:
        """A value in another shape, at most one of whose sizes hangs on the batch."""
        number = self.number(value)
        wanted = [size_of(size) for size in sizes]
        unknown = [is_open(size) or size == -1 for size in wanted]
        if sum(unknown) > 1:
            raise OperatorNotSupported("a shape with several sizes that hang on the batch; keep the batch first")
        target = self.ints(*(-1 if open_ else size for size, open_ in zip(wanted, unknown, strict=True)))
        return self.op("RESHAPE", [number, target], wanted, self.tensors[number].dtype)

    def transpose(self, value: Any, order: Sequence[int]) -> int:
        """A value with its dimensions in another order, in one go from how they were at first."""
        number = self.number(value)
        if number in self._turned:
            number, before = self._turned[number]
            order = [before[dim] for dim in order]
        if list(order) == sorted(order):
            return number
        shape = self.shape(number)
        made = self.op("TRANSPOSE", [number, self.ints(*order)], [shape[i] for i in order], self.tensors[number].dtype)
        self._turned[made] = number, order
        return made

    # Channels last.

    def has_twin(self, number: int) -> bool:
        """Whether the tensor stands ready with its channels last."""
        return number in self._twins

    def channels_last(self, value: Any) -> int:
        """The tensor [N, C, ...] as [N, ..., C]."""
        number = self.number(value)
        if number not in self._twins:
            rank = len(self.shape(number))
            self._twins[number] = self.transpose(number, [0, *range(2, rank), 1])
        return self._twins[number]

    def from_channels_last(self, twin: int) -> int:
        """The tensor [N, ..., C] as [N, C, ...], with itself as twin."""
        rank = len(self.shape(twin))
        number = self.transpose(twin, [0, rank - 1, *range(1, rank - 1)])
        self._twins[number] = twin
        return number

    def used(self, outputs: Sequence[int]) -> list[OperatorEntry]:
        """The operators that these outputs need, in order."""
        needed, kept = set(outputs), []
        for operator in reversed(self.operators):
            if needed & set(operator.outputs):
                needed |= set(operator.inputs)
                kept.append(operator)
        return kept[::-1]
