"""Collected tensors and operators as a LiteRT flatbuffer, by the schema that ships with the interpreter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from umbel_models.litert.graph import OperatorEntry, TensorEntry, Writer
from umbel_models.onnx.graph import is_open

SCHEMA_VERSION: Final = 3
_OPTIONS: Final = {
    "ARG_MAX": "ArgMax",
    "AVERAGE_POOL_2D": "Pool2D",
    "BATCH_MATMUL": "BatchMatMul",
    "CONCATENATION": "Concatenation",
    "CONV_2D": "Conv2D",
    "CUMSUM": "Cumsum",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2D",
    "FULLY_CONNECTED": "FullyConnected",
    "GATHER": "Gather",
    "GELU": "Gelu",
    "LEAKY_RELU": "LeakyRelu",
    "MAX_POOL_2D": "Pool2D",
    "MEAN": "Reducer",
    "REDUCE_MAX": "Reducer",
    "REDUCE_MIN": "Reducer",
    "REDUCE_PROD": "Reducer",
    "SHAPE": "Shape",
    "SOFTMAX": "Softmax",
    "SPLIT": "Split",
    "STRIDED_SLICE": "StridedSlice",
    "SUM": "Reducer",
    "WHILE": "While",
}
"""Operators with settings, and what the schema calls those."""
_PLAIN: Final = {"ADD": "Add", "CAST": "Cast", "DIV": "Div", "MUL": "Mul", "SUB": "Sub", "PAD": "Pad", "PADV2": "PadV2"}
"""Operators whose settings stay as they are, but whose readers want them written."""
_VERSIONS: Final = {"BROADCAST_TO": 2}
"""Operators whose first version is gone."""
_ENUMS: Final = {"padding": schema.Padding, "outType": schema.TensorType, "outputType": schema.TensorType}


@dataclass(frozen=True, slots=True)
class Part:
    """A graph of a file: what was collected, and its inputs and outputs by name."""

    name: str
    writer: Writer
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]


def pack(signature: Part, *others: Part) -> bytes:
    """A file with one signature, and behind it the graphs that it calls; only what outputs need is written."""
    parts = (signature, *others)
    used = [part.writer.used(list(part.outputs.values())) for part in parts]
    kinds = sorted({operator.kind for operators in used for operator in operators})
    model = schema.ModelT()
    model.version, model.description = SCHEMA_VERSION, "umbel"
    model.buffers = [schema.BufferT()]
    model.operatorCodes = [_code(kind) for kind in kinds]
    model.subgraphs = [_graph(model, part, operators, kinds) for part, operators in zip(parts, used, strict=True)]
    first = model.subgraphs[0]
    definition = schema.SignatureDefT(signatureKey=signature.name, subgraphIndex=0)
    definition.inputs = _entries(signature.inputs, first.inputs)
    definition.outputs = _entries(signature.outputs, first.outputs)
    model.signatureDefs = [definition]
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def _entries(names: Iterable[str], places: NDArray[np.int32]) -> list[Any]:
    return [schema.TensorMapT(name=name, tensorIndex=int(n)) for name, n in zip(names, places, strict=True)]


def _graph(model: Any, part: Part, operators: Sequence[OperatorEntry], kinds: Sequence[str]) -> Any:
    touched = {n for operator in operators for n in (*operator.inputs, *operator.outputs) if n >= 0}
    kept = sorted(touched | set(part.inputs.values()) | set(part.outputs.values()))
    places = {number: place for place, number in enumerate(kept)} | {-1: -1}
    names = {number: name for name, number in (*part.inputs.items(), *part.outputs.items())}
    graph = schema.SubGraphT()
    graph.name = part.name
    graph.tensors = [_tensor(model, part.writer.tensors[n], names.get(n, f"t{places[n]}")) for n in kept]
    graph.inputs = np.array([places[n] for n in part.inputs.values()], np.int32)
    graph.outputs = np.array([places[n] for n in part.outputs.values()], np.int32)
    graph.operators = [_operator(operator, places, kinds) for operator in operators]
    return graph


def _code(kind: str) -> Any:
    number = getattr(schema.BuiltinOperator, kind)
    return schema.OperatorCodeT(
        deprecatedBuiltinCode=min(number, 127), builtinCode=number, version=_VERSIONS.get(kind, 1)
    )


def _tensor(model: Any, entry: TensorEntry, name: str) -> Any:
    shape = [_with_one_example(size) for size in entry.shape]
    made = schema.TensorT(name=name, shape=np.array(shape, np.int32), hasRank=True)
    made.type = getattr(schema.TensorType, entry.dtype.name.upper())
    if any(is_open(size) for size in entry.shape):
        made.shapeSignature = np.array([-1 if is_open(size) else size for size in entry.shape], np.int32)
    if entry.data is not None:
        made.buffer = len(model.buffers)
        model.buffers.append(schema.BufferT(data=np.frombuffer(entry.data, np.uint8)))
    return made


def _with_one_example(size: Any) -> int:
    """A size as it is when the batch holds one example."""
    if not is_open(size):
        return int(size)
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def _operator(entry: OperatorEntry, places: Mapping[int, int], kinds: Sequence[str]) -> Any:
    made = schema.OperatorT(opcodeIndex=kinds.index(entry.kind))
    made.inputs = np.array([places[n] for n in entry.inputs], np.int32)
    made.outputs = np.array([places[n] for n in entry.outputs], np.int32)
    family = _OPTIONS.get(entry.kind) or _PLAIN.get(entry.kind)
    if family is not None:
        made.builtinOptionsType = getattr(schema.BuiltinOptions, f"{family}Options")
        made.builtinOptions = getattr(schema, f"{family}OptionsT")()
        for name, value in entry.options.items():
            setattr(made.builtinOptions, name, getattr(_ENUMS[name], value) if name in _ENUMS else value)
    return made
