"""Questions and answers of the Open Inference Protocol as JSON, with tensors in it or in bytes behind it.

https://github.com/kserve/open-inference-protocol, `inference_rest.md`; the bytes are Triton's extension
`binary_tensor_data`. JSON has no NaN and no infinity: both are written as the texts "NaN", "Infinity" and "-Infinity",
which numpy, and so Triton's client, reads as what they are, and read as these texts or as Python's bare words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from umbel.errors import InputMismatch, MalformedMessage
from umbel_server.serving.inference import Answer
from umbel_server.serving.tensors import array_of_bytes, array_of_numbers, bytes_of_array, datatype_of, dtype_of

T = TypeVar("T")

_WORDS: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_KINDS: Final[dict[str, set[type]]] = {"f": {int, float}, "i": {int}, "u": {int}, "b": {bool}}
"""numpy's kind of a type -> what Python reads as numbers of it; nothing is rounded or taken for something else."""
AT_ONCE: Final = 8_192
"""Numbers that are written in one go; between two, other threads get their turn."""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What stands in a question."""

    id: str
    inputs: tuple[Sent, ...]
    outputs: Mapping[str, bool | None]
    """Those that are wanted, and whether in bytes, if it is said; none for all."""
    binary: bool
    """Whether outputs go in bytes where nothing else is said."""

    @property
    def examples(self) -> int:
        """How many it says that it holds; 0 if it says nothing."""
        return next((sent.shape[0] for sent in self.inputs if sent.shape), 0)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The inputs; raises `InputMismatch`."""
        found: dict[str, NDArray[Any]] = {}
        for sent in self.inputs:
            if sent.name in found:
                raise InputMismatch(f"input {sent.name[:80]!r} stands there twice")
            found[sent.name] = sent.array()
        return found

    def wants_bytes(self, output: str) -> bool:
        """Whether an output goes in bytes."""
        said = self.outputs.get(output)
        return self.binary if said is None else said


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """One input."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: memoryview | list[Any]
    """Its bytes, or its numbers, flat or nested as its shape."""

    def array(self) -> NDArray[Any]:
        """What was sent; raises `InputMismatch`."""
        if isinstance(self.data, memoryview):
            return array_of_bytes(self, bytes(self.data))
        if self.datatype == "FP16":
            raise InputMismatch(f"input {self.name[:80]!r} is FP16, which travels as binary data only")
        return array_of_numbers(self, self._flat(self.data))

    def _flat(self, data: list[Any]) -> list[Any]:
        wanted = _KINDS[dtype_of(self).kind]
        flat, sizes = _unnested(data, len(self.shape))
        if len(sizes) > 1 and tuple(sizes) != self.shape:
            told = f"input {self.name[:80]!r} has lists of {sizes} for the shape {list(self.shape)}"
            raise InputMismatch(f"{told}; nest them as the shape says, or not at all")
        if float in wanted and str in set(map(type, flat)):
            flat = [_WORDS.get(one, one) if type(one) is str else one for one in flat]
        if wrong := set(map(type, flat)) - wanted:
            found = ", ".join(sorted(kind.__name__ for kind in wrong))
            raise InputMismatch(f"input {self.name[:80]!r} holds what is no {self.datatype}: {found}")
        return flat


def read(text: bytes, rest: memoryview) -> Asked:
    """A question.

    Args:
        text: its JSON.
        rest: the bytes behind it.

    Raises:
        MalformedMessage: not JSON, one key twice, or fields that aren't the protocol's.
        InputMismatch: tensors that have no data, or more than one kind, or other sizes than they say.
    """
    told = read_json(text)
    parameters = _field(told, "parameters", dict, {})
    inputs, place = [], 0
    for one in _field(told, "inputs", list):
        sent, place = _sent(one, rest, place)
        inputs.append(sent)
    if place != len(rest):
        raise InputMismatch(f"inputs say that they have {place} bytes of binary data; there are {len(rest)}")
    outputs = {}
    for one in _field(told, "outputs", list, []):
        outputs[_field(one, "name", str)] = _field(_field(one, "parameters", dict, {}), "binary_data", bool, None)
    binary = _field(parameters, "binary_data_output", bool, False)
    return Asked(_field(told, "id", str, ""), tuple(inputs), outputs, binary)


def read_json(text: bytes) -> dict[str, Any]:
    """An object; raises `MalformedMessage`."""
    try:
        told = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(f"the body isn't JSON: {str(error)[:200]}") from error
    if not isinstance(told, dict):
        raise MalformedMessage("the body isn't a JSON object")
    return told


def _sent(one: object, rest: memoryview, place: int) -> tuple[Sent, int]:
    name, datatype = _field(one, "name", str), _field(one, "datatype", str)
    shape = _field(one, "shape", list)
    if not all(type(size) is int and size < 1 << 63 for size in shape):
        raise MalformedMessage(f"the shape of {name[:80]!r} isn't a list of sizes")
    size = _field(_field(one, "parameters", dict, {}), "binary_data_size", int, None)
    data = _field(one, "data", list, None)
    if (size is None) is (data is None):
        raise InputMismatch(f"input {name[:80]!r} must have either data or a binary_data_size")
    if size is None:
        return Sent(name, datatype, tuple(shape), data), place
    if not 0 <= size <= len(rest) - place:
        raise InputMismatch(f"input {name[:80]!r} says {size} bytes of binary data; there are {len(rest) - place}")
    return Sent(name, datatype, tuple(shape), rest[place : place + size]), place + size


def written(answer: Answer, asked: Asked, model: str) -> tuple[bytes, list[bytes]]:
    """An answer: its JSON, and the bytes behind it; raises `InputMismatch` for what JSON can't hold."""
    told = {"model_name": model, "model_version": str(answer.version)} | ({"id": asked.id} if asked.id else {})
    binary: list[bytes] = []
    outputs = (_output(name, array, asked, binary) for name, array in answer.outputs.items())
    text = _opened(told) + b',"outputs":[' + b",".join(outputs) + b"]}"
    return text, binary


def _output(name: str, array: NDArray[Any], asked: Asked, binary: list[bytes]) -> bytes:
    told = {"name": name, "datatype": datatype_of(array.dtype), "shape": list(array.shape)}
    if asked.wants_bytes(name):
        binary.append(bytes_of_array(array))
        return _packed(told | {"parameters": {"binary_data_size": len(binary[-1])}})
    if told["datatype"] == "FP16":
        raise InputMismatch(f"output {name!r} is FP16, which travels as binary data only; ask for it so")
    return _opened(told) + b',"data":[' + b",".join(_numbers(array.ravel())) + b"]}"


def _numbers(flat: NDArray[Any]) -> Iterator[bytes]:
    for start in range(0, len(flat), AT_ONCE):
        part = flat[start : start + AT_ONCE]
        numbers = part.tolist()
        if part.dtype.kind == "f" and not np.isfinite(part).all():
            numbers = [x if math.isfinite(x) else _word(x) for x in numbers]
        yield _packed(numbers)[1:-1]


def _word(number: float) -> str:
    return next(word for word, meant in _WORDS.items() if meant == number or math.isnan(number))


def _opened(told: Mapping[str, object]) -> bytes:
    """An object as JSON, for more to be written into it."""
    return _packed(told)[:-1]


def _packed(told: object) -> bytes:
    return json.dumps(told, separators=(",", ":")).encode()


def _unnested(data: list[Any], depth: int) -> tuple[list[Any], list[int]]:
    """The numbers of lists in lists, no deeper than this, and how long the lists of each depth are."""
    sizes = [len(data)]
    while data and type(data[0]) is list:
        lengths = {len(inner) if type(inner) is list else -1 for inner in data}
        if len(sizes) >= depth or len(lengths) > 1:
            raise InputMismatch("data isn't nested as the shape says; nest it so, or not at all")
        sizes.append(lengths.pop())
        data = list(chain.from_iterable(data))
    return data, sizes


def _field(told: object, name: str, kind: type[T], otherwise: Any = ...) -> Any:
    """A field of an object, of this type; where there is none, what stands in its place."""
    if not isinstance(told, dict):
        raise MalformedMessage(f"where {name!r} should stand is no JSON object")
    if name not in told:
        if otherwise is ...:
            raise MalformedMessage(f"there is no {name!r}")
        return otherwise
    found = told[name]
    if type(found) is not kind:
        raise MalformedMessage(f"{name!r} is no {kind.__name__}")
    return found


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("one name stands twice in an object")
    return found
