"""Tensors of the Open Inference Protocol <-> arrays.

Numbers travel raw (little-endian, row-major, without gaps), all inputs or none of them, or as lists in the field of
their type. What a model takes is checked later, against its manifest; here it is only made sure that what was sent is
what it says it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from umbel.errors import InputMismatch
from umbel.oip import open_inference_pb2 as pb

DATATYPES: Final = MappingProxyType(
    {"FP32": "float32", "FP16": "float16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8", "BOOL": "bool"}
)
"""The protocol's names of the types that a manifest may name."""
_NAMES: Final = {np.dtype(dtype): name for name, dtype in DATATYPES.items()}
_FIELDS: Final = {
    "FP32": "fp32_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "BOOL": "bool_contents",
}
"""Where numbers stand that aren't raw; there is no field for FP16."""
_RANK: Final = 64
"""Sizes of a shape, as numpy has it: to multiply a million of them takes minutes."""


class _Tensor(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def datatype(self) -> str: ...
    @property
    def shape(self) -> Iterable[int]: ...


def datatype_of(dtype: str | np.dtype[Any]) -> str:
    """The protocol's name of a type that a manifest may name."""
    return _NAMES[np.dtype(dtype)]


def examples_in(message: pb.ModelInferRequest) -> int:
    """How many examples a question says that it holds; 0 if it says nothing."""
    return next((tensor.shape[0] for tensor in message.inputs if tensor.shape), 0)


def inputs_of(message: pb.ModelInferRequest) -> dict[str, NDArray[Any]]:
    """The inputs of a question, by name.

    Raises:
        InputMismatch: a type that no model takes, numbers that don't fill the shape, or one name twice.
    """
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise InputMismatch(f"{len(message.inputs)} inputs with raw contents for {len(raw)}; give all of them or none")
    found: dict[str, NDArray[Any]] = {}
    for place, tensor in enumerate(message.inputs):
        if tensor.name in found:
            raise InputMismatch(f"input {tensor.name[:80]!r} stands there twice")
        if not raw:
            found[tensor.name] = _listed(tensor)
        elif tensor.HasField("contents"):
            raise InputMismatch(f"input {tensor.name[:80]!r} has contents both raw and listed; give one of them")
        else:
            found[tensor.name] = array_of_bytes(tensor, raw[place])
    return found


def add_outputs(message: pb.ModelInferResponse, outputs: Mapping[str, NDArray[Any]], *, raw: bool) -> None:
    """Put outputs into an answer, raw if the question's inputs were, or if there is no field for their type."""
    raw = raw or any(datatype_of(array.dtype) not in _FIELDS for array in outputs.values())
    for name, array in outputs.items():
        datatype = datatype_of(array.dtype)
        tensor = message.outputs.add(name=name, datatype=datatype, shape=array.shape)
        if raw:
            message.raw_output_contents.append(bytes_of_array(array))
        else:
            getattr(tensor.contents, _FIELDS[datatype]).extend(array.ravel().tolist())


def array_of_bytes(tensor: _Tensor, data: bytes) -> NDArray[Any]:
    """An array from its raw bytes.

    Raises:
        InputMismatch: a type that no model takes, or more or fewer bytes than the shape wants.
    """
    dtype, shape = dtype_of(tensor), _shape(tensor)
    wanted = math.prod(shape) * dtype.itemsize
    if len(data) != wanted:
        told = f"input {tensor.name[:80]!r} is {tensor.datatype} {list(shape)}, which takes {wanted} bytes"
        raise InputMismatch(f"{told}; there are {len(data)}")
    if tensor.datatype == "BOOL":
        return np.asarray(np.frombuffer(data, np.uint8) != 0).reshape(shape)
    return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(shape)


def bytes_of_array(array: NDArray[Any]) -> bytes:
    """Undo `array_of_bytes`."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def array_of_numbers(tensor: _Tensor, numbers: Any) -> NDArray[Any]:
    """An array from a flat list of numbers.

    Raises:
        InputMismatch: a type that no model takes, more or fewer numbers than the shape wants, or numbers that the type
            has no room for.
    """
    dtype, shape = dtype_of(tensor), _shape(tensor)
    if len(numbers) != math.prod(shape):
        told = f"input {tensor.name[:80]!r} of shape {list(shape)} takes {math.prod(shape)} numbers"
        raise InputMismatch(f"{told}; there are {len(numbers)}")
    try:
        with np.errstate(over="raise"):
            return np.array(numbers, dtype).reshape(shape)
    except (ArithmeticError, ValueError, TypeError) as error:
        raise InputMismatch(f"input {tensor.name[:80]!r} holds what is no {tensor.datatype}: {error}") from error


def _listed(tensor: pb.ModelInferRequest.InferInputTensor) -> NDArray[Any]:
    dtype_of(tensor)
    field = _FIELDS.get(tensor.datatype)
    if field is None:
        raise InputMismatch(f"input {tensor.name[:80]!r} is {tensor.datatype}, which travels raw only")
    return array_of_numbers(tensor, getattr(tensor.contents, field))


def dtype_of(tensor: _Tensor) -> np.dtype[Any]:
    """The type of a tensor's numbers; raises `InputMismatch` for one that no model takes."""
    dtype = DATATYPES.get(tensor.datatype)
    if dtype is None:
        known = ", ".join(DATATYPES)
        raise InputMismatch(f"input {tensor.name[:80]!r} is {tensor.datatype[:80]!r}; models here take {known}")
    return np.dtype(dtype)


def _shape(tensor: _Tensor) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    if len(shape) > _RANK:
        raise InputMismatch(f"input {tensor.name[:80]!r} has a shape of {len(shape)} sizes; {_RANK} are the most")
    if any(size < 1 for size in shape):
        raise InputMismatch(f"input {tensor.name[:80]!r} has the shape {list(shape)}; each size must be 1 or more")
    return shape
