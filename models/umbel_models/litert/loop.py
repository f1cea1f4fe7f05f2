"""A lowered signature over the examples of a batch, one after the other, whose outputs are added up: LiteRT's WHILE.

What goes around is a counter, how many examples there are, the sums, and all that the body takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from torch import fx

from umbel_models.litert.flatbuffer import Part
from umbel_models.litert.graph import Shape, Writer, dtype_of, shape_of
from umbel_models.lowering import Lowered

Translate = Callable[[Lowered, Writer, fx.Node], None]
Kind = tuple[Shape, np.dtype[np.generic]]

_COUNTER: Final[Kind] = ((), np.dtype(np.int32))
_WHEN, _BODY = 1, 2
"""The places of the loop's parts in the file, after the graph around it."""


def add_loop(
    writer: Writer, inputs: Mapping[str, int], body: Lowered, batch: list[str], translate: Translate
) -> tuple[dict[str, int], tuple[Part, Part]]:
    """Run a lowered signature of one example for each example, and add up what it gives.

    Args:
        writer: the graph around the loop.
        inputs: its inputs by name; the body takes them by the same names.
        body: a signature whose inputs named in `batch` have a batch of one.
        batch: the inputs that are cut into examples.
        translate: puts one node of the body into a graph.

    Returns:
        The number of the sum of each output, by the output's name; and the parts that `pack` puts behind this graph.
    """
    placeholders = [node for node in body.graph.graph.nodes if node.op == "placeholder"]
    taken = {name: node for node, name in zip(placeholders, body.signature.inputs, strict=True) if node.users}
    (output,) = (node for node in body.graph.graph.nodes if node.op == "output")
    kinds: dict[str, Kind] = {name: (writer.shape(inputs[name]), dtype_of(node)) for name, node in taken.items()}
    sums: dict[str, Kind] = {
        name: (shape_of(node), dtype_of(node)) for name, node in zip(body.outputs, output.args[0], strict=True)
    }
    around = [_COUNTER, _COUNTER, *sums.values(), *kinds.values()]
    zeros = [writer.constant(np.zeros([int(size) for size in shape]), dtype) for shape, dtype in sums.values()]
    started = [
        writer.constant(0, np.int32),
        _count(writer, inputs[batch[0]]),
        *zeros,
        *(inputs[name] for name in taken),
    ]
    found = writer.several("WHILE", started, around, condSubgraphIndex=_WHEN, bodySubgraphIndex=_BODY)
    inner = Writer()
    at, until, *rest = numbers = [inner.tensor(*kind) for kind in around]
    given = dict(zip(taken, rest[len(sums) :], strict=True))
    for name, node in taken.items():
        inner.values[node] = _example(inner, given[name], at) if name in batch else given[name]
    for node in body.graph.graph.nodes:
        translate(body, inner, node)
    added = [
        inner.op("ADD", [total, value], *kind)
        for total, value, kind in zip(rest[: len(sums)], output.args[0], sums.values(), strict=True)
    ]
    onwards = [inner.op("ADD", [at, inner.constant(1, np.int32)], *_COUNTER), until, *added, *given.values()]
    again = Part("each", inner, _named(numbers), _named(onwards))
    return dict(zip(sums, found[2:], strict=False)), (_while_examples_are_left(around), again)


def _while_examples_are_left(around: list[Kind]) -> Part:
    writer = Writer()
    numbers = [writer.tensor(*kind) for kind in around]
    return Part("left", writer, _named(numbers), {"left": writer.op("LESS", numbers[:2], (), np.bool_)})


def _count(writer: Writer, batch: int) -> int:
    """How many examples a batch holds, a number without dimension."""
    shape = writer.op("SHAPE", [batch], (len(writer.shape(batch)),), np.int32, outType="INT32")
    return writer.op("GATHER", [shape, writer.constant(0, np.int32)], *_COUNTER, axis=0)


def _example(writer: Writer, batch: int, at: int) -> int:
    """One example, as a batch of one."""
    place = writer.op("RESHAPE", [at, writer.ints(1)], (1,), np.int32)
    return writer.op("GATHER", [batch, place], (1, *writer.shape(batch)[1:]), writer.tensors[batch].dtype, axis=0)


def _named(numbers: list[int]) -> dict[str, int]:
    return {f"v{place}": number for place, number in enumerate(numbers)}
