"""Weights into a LiteRT graph as constants, once per version, so that it answers as fast as it can.

The `infer` graph comes with its weights as inputs. Here they become buffers of the file image, and what hangs on
constants alone (kernels in another order, scales of frozen norms) is worked out right away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

Array = NDArray[Any]

_DTYPES: Final[dict[int, np.dtype[Any]]] = {
    schema.TensorType.FLOAT32: np.dtype(np.float32),
    schema.TensorType.INT32: np.dtype(np.int32),
    schema.TensorType.INT64: np.dtype(np.int64),
    schema.TensorType.BOOL: np.dtype(np.bool_),
}
_CODES: Final = schema.BuiltinOperator
_FOLDS: Final[dict[int, Callable[..., Array]]] = {
    _CODES.ADD: lambda x, y: x + y,
    _CODES.DIV: lambda x, y: x / y,
    _CODES.MUL: lambda x, y: x * y,
    _CODES.RESHAPE: lambda x, shape: x.reshape(shape),
    _CODES.RSQRT: lambda x: (1 / np.sqrt(x)).astype(x.dtype),
    _CODES.SUB: lambda x, y: x - y,
    _CODES.TRANSPOSE: lambda x, order: x.transpose(order),
}
"""Operators without settings that matter, as numpy has them."""


def bind_constants(graph: bytes, weights: Mapping[str, Array]) -> bytes:
    """The same graph with these inputs as constants. `graph` has one subgraph with one signature."""
    model = schema.ModelT.InitFromPackedBuf(graph, 0)
    (subgraph,), (signature,) = model.subgraphs, model.signatureDefs
    bound = {entry.tensorIndex: weights[entry.name.decode()] for entry in signature.inputs if _bound(entry, weights)}
    constants = {number: _value(model, tensor) for number, tensor in enumerate(subgraph.tensors)} | bound
    operators = []
    for operator in subgraph.operators:
        found = _fold(model.operatorCodes[operator.opcodeIndex].builtinCode, operator, constants)
        if found is None or operator.outputs[0] in subgraph.outputs:
            operators.append(operator)
        else:
            constants[operator.outputs[0]] = bound[operator.outputs[0]] = found
    subgraph.operators = operators
    _write(model, subgraph, bound)
    signature.inputs = [entry for entry in signature.inputs if not _bound(entry, weights)]
    subgraph.inputs = np.array([entry.tensorIndex for entry in signature.inputs], np.int32)
    builder = flatbuffers.Builder(sum(array.nbytes for array in bound.values()) + (1 << 16))
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def _bound(entry: Any, weights: Mapping[str, Array]) -> bool:
    return entry.name.decode() in weights


def _value(model: Any, tensor: Any) -> Array | None:
    """A constant's value; None for tensors that are computed, and those of other types."""
    data = model.buffers[tensor.buffer].data
    if not tensor.buffer or data is None or tensor.type not in _DTYPES:
        return None
    shape = () if tensor.shape is None else tuple(tensor.shape)
    found: Array = np.asarray(data, np.uint8).view(_DTYPES[tensor.type]).reshape(shape)
    return found


def _fold(code: int, operator: Any, constants: Mapping[int, Array | None]) -> Array | None:
    operands = [constants[number] for number in operator.inputs if number >= 0]
    if code not in _FOLDS or any(operand is None for operand in operands):
        return None
    return np.asarray(_FOLDS[code](*operands), order="C")


def _write(model: Any, subgraph: Any, bound: Mapping[int, Array]) -> None:
    """Give bound tensors their data, where an operator still reads them."""
    read = {int(number) for operator in subgraph.operators for number in operator.inputs}
    for number, array in bound.items():
        if number in read or number in subgraph.outputs:
            subgraph.tensors[number].buffer = len(model.buffers)
            model.buffers.append(schema.BufferT(data=np.frombuffer(array.tobytes(), np.uint8)))
