"""The graph being written: names, constants, nodes, and how an ATen value becomes the name of an ONNX one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import fx

from umbel.errors import OperatorNotSupported
from umbel_models.onnx.folding import Shape, folded, views_last
from umbel_models.translation import Handler, registering

HANDLERS: Final[dict[Any, Handler]] = {}
"""ATen operator -> what translates it; each module of a family fills in its own, by `translates`."""
translates: Final = registering(HANDLERS)

_NUMPY: Final[dict[torch.dtype, type[np.generic]]] = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.float16: np.float16,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}

_COMPARISONS: Final = {"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Or", "Where"}
_MEETING: Final = {"Add", "BitwiseAnd", "Div", "Max", "Min", "Mul", "Pow", "Sub"} | _COMPARISONS
"""Operators whose inputs may differ in rank."""


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """The numpy dtype that corresponds; `OperatorNotSupported` for those that graphs don't use."""
    if dtype not in _NUMPY:
        raise OperatorNotSupported(f"tensors of {dtype} have no place in a graph; convert them to float32")
    return np.dtype(_NUMPY[dtype])


def onnx_dtype(dtype: torch.dtype) -> int:
    """The number by which ONNX knows a dtype."""
    return int(helper.np_dtype_to_tensor_dtype(numpy_dtype(dtype)))


def is_open(size: Any) -> bool:
    """Whether a size or number is only known when the graph runs."""
    return isinstance(size, (torch.SymInt, torch.SymFloat, fx.Node))


def dtype_of(node: fx.Node) -> torch.dtype:
    """The dtype of a node's tensor."""
    return node.meta["val"].dtype  # type: ignore[no-any-return]


def rank_of(node: fx.Node) -> int:
    """The number of dimensions of a node's tensor."""
    return int(node.meta["val"].dim())


def shape_of(node: fx.Node) -> Sequence[Any]:
    """The sizes of a node's tensor; open ones are symbols."""
    return node.meta["val"].shape  # type: ignore[no-any-return]


class Writer:
    """Collects the nodes and constants of one graph."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        """Keeps the names that are made here apart from those that are given, and a loop's from those around it."""
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.values: dict[fx.Node, Any] = {}
        """What each ATen node became."""
        self.shapes: dict[str, Shape] = {}
        """Of values by name; open sizes are symbols."""
        self.flat_indices: dict[fx.Node, str] = {}
        """Of each max-pooling, where its maxima lie in the whole tensor, as MaxUnpool wants it."""
        self._known: dict[object, str] = {}
        self._made: dict[object, Any] = {}

    def constant(self, value: Any, dtype: Any = None) -> str:
        """The name of a constant; equal ones share it."""
        array: NDArray[Any] = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            name = f"{self.prefix}c{len(self._known)}"
            self._known[key] = name
            # ascontiguousarray would turn a scalar into a vector.
            self.constants[name] = numpy_helper.from_array(array.copy(order="C"), name)
        return self._known[key]

    def ints(self, *values: int) -> str:
        """A constant vector of int64, as shapes and axes are given."""
        return self.constant(values, np.int64)

    def node(self, kind: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        """Add an ONNX node and name its value (a list of names for several); equal nodes are made once."""
        names = [self.name(value) for value in inputs]
        if kind in _MEETING:
            names = self._of_one_rank(names)
        attributes = {key: value for key, value in sorted(attributes.items()) if value is not None}
        key = (kind, tuple(names), outputs, repr(attributes))
        if key not in self._made:
            base = f"{self.prefix}t{len(self._made)}"
            made = [f"{base}_{i}" if outputs > 1 else base for i in range(outputs)]
            self.nodes.append(
                helper.make_node(kind, names, made, name=f"{self.prefix}n{len(self._made)}", **attributes)
            )
            self._made[key] = made[0] if outputs == 1 else made
        return self._made[key]

    def _of_one_rank(self, names: Sequence[str]) -> list[str]:
        """Constants of one number in the rank of the [..., 1] that they meet.

        To ONNX Runtime such a pair is otherwise one row after another, each of one number: seven times as slow.
        """
        shapes = [self.shapes.get(name, ()) for name in names]
        rank = max((len(shape) for shape in shapes if shape and shape[-1] == "1"), default=0)
        return [self._lifted(self.constants[name], rank) if name in self.constants else name for name in names]

    def _lifted(self, constant: TensorProto, rank: int) -> str:
        if len(constant.dims) >= rank or any(size != 1 for size in constant.dims):
            return constant.name
        return self.constant(numpy_helper.to_array(constant).reshape([1] * rank))

    def name(self, value: Any) -> str:
        """The name of an ATen node's value, of a constant, or of nothing."""
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        if isinstance(value, fx.Node):
            found = self.values[value]
            return found if isinstance(found, str) else str(found[0])
        return self.constant(value)

    def cast(self, value: Any, dtype: torch.dtype) -> str:
        """A tensor, or a number, as a tensor of this dtype."""
        if not isinstance(value, fx.Node):
            return self.constant(value, numpy_dtype(dtype))
        example = value.meta["val"]
        if not isinstance(example, torch.Tensor):
            # Sizes are kept as vectors of one; as numbers they have no dimension.
            scalar = self.node("Squeeze", value)
            return str(self.node("Cast", scalar, to=onnx_dtype(dtype)))
        if example.dtype == dtype:
            return self.name(value)
        return str(self.node("Cast", value, to=onnx_dtype(dtype)))

    def vector(self, sizes: Sequence[Any]) -> str:
        """A shape as a vector of int64, whose open sizes are computed when the graph runs."""
        if not any(is_open(size) for size in sizes):
            return self.ints(*sizes)
        parts: list[str] = []
        run: list[int] = []
        for size in sizes:
            if not is_open(size):
                run.append(size)
                continue
            if run:
                parts.append(self.ints(*run))
                run = []
            parts.append(self.name(size))
        if run:
            parts.append(self.ints(*run))
        return parts[0] if len(parts) == 1 else str(self.node("Concat", *parts, axis=0))

    def reshape(self, value: Any, sizes: Sequence[Any]) -> str:
        """A value in another shape; one open size is inferred by the runtime."""
        unknown = [is_open(size) or size == -1 for size in sizes]
        if sum(unknown) == 1:
            target = self.ints(*(-1 if open_ else size for size, open_ in zip(sizes, unknown, strict=True)))
        else:
            target = self.vector(sizes)
        return str(self.node("Reshape", value, target))

    def fold(self, outputs: Collection[str]) -> None:
        """Let fewer nodes do the same; see `umbel_models.onnx.folding`."""
        for change in (views_last, folded):
            self.nodes = change(self.used(outputs)[0], self.shapes)

    def used(self, outputs: Collection[str]) -> tuple[list[NodeProto], list[TensorProto]]:
        """The nodes and constants that these outputs need, in order."""
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if needed & set(node.output):
                needed |= set(node.input)
                if node.op_type == "MaxPool" and not needed & set(node.output[1:]):
                    # Telling where the maxima lie takes ten times as long as finding them.
                    del node.output[1:]
                kept.append(node)
        return kept[::-1], [tensor for name, tensor in self.constants.items() if name in needed]


def attribute_ints(values: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Settings as lists of plain numbers, as ONNX attributes want them."""
    return {name: [int(value) for value in given] for name, given in values.items()}
