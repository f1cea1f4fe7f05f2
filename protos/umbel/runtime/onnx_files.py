"""Which files an ONNX graph would read: none, but for the weights that it is handed.

A tensor of a graph may stand in a file of any name ("external data"), and ONNX Runtime reads it with the graph:
older versions any file of the machine, newer ones those beside it. A graph that trains on what it read would carry
it away in a report. So graphs are looked through first, by their encoding (protocol buffers, onnx.proto): only
initialisers of the main graph may stand outside, and only those whose values are bound from memory.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Final

from umbel.errors import RuntimeFailure

_MODEL, _GRAPH, _FUNCTION, _NODE, _ATTRIBUTE, _TENSOR, _SPARSE = range(7)
_INSIDE: Final[dict[int, dict[int, int]]] = {
    _MODEL: {7: _GRAPH, 25: _FUNCTION},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
    _TENSOR: {},
}
"""What can hold a tensor: message -> number of a field -> message in it."""
_NAME: Final = 8
_DATA_LOCATION: Final = 14
_KEY: Final = b"location"
"""What a tensor outside must say of itself; where it isn't said, nothing needs to be looked through."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def require_no_files(graph: bytes, bound: Container[str]) -> None:
    """Raise `RuntimeFailure` if a graph would read a file: all but `bound` must stand in the graph itself.

    Raises:
        RuntimeFailure: it would, or it can't be looked through.
    """
    try:
        for name in _outside(graph, 0, len(graph), _MODEL, 0, bound):
            raise RuntimeFailure(f"the graph would read tensor {name!r:.80} from a file; graphs read none")
    except (IndexError, ValueError, RecursionError) as error:
        raise RuntimeFailure(f"not an ONNX graph: {error}") from error


def _outside(data: bytes, start: int, end: int, kind: int, depth: int, bound: Container[str]) -> Iterator[str]:
    """The names of tensors that stand in files."""
    if data.find(_KEY, start, end) < 0:
        return
    if kind == _TENSOR:
        name = _name_if_outside(data, start, end)
        if name is not None and not (depth == 2 and name in bound):
            yield name
        return
    for number, wire, first, last in _fields(data, start, end):
        inside = _INSIDE[kind].get(number)
        if inside is not None and wire == _BYTES:
            yield from _outside(data, first, last, inside, depth + 1, bound)


def _name_if_outside(data: bytes, start: int, end: int) -> str | None:
    name, outside = "", False
    for number, wire, first, last in _fields(data, start, end):
        if number == _NAME and wire == _BYTES:
            name = data[first:last].decode()
        elif number == _DATA_LOCATION and wire == _VARINT:
            outside = outside or first != 0
    return name if outside else None


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type, and where the content begins and ends; of a varint, its value stands for the beginning."""
    at = start
    while at < end:
        tag, at = _varint(data, at)
        wire, value = tag & 7, 0
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, wire, value, at
            continue
        size = {_FIXED64: 8, _FIXED32: 4}.get(wire, -1)
        if wire == _BYTES:
            size, at = _varint(data, at)
        if size < 0 or at + size > end:
            raise ValueError("a field that ends beyond its message, or of a kind that ONNX has none of")
        yield tag >> 3, wire, at, at + size
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if shift > 63:
            raise ValueError("a number that is too long")
    return value | data[at] << shift, at + 1
