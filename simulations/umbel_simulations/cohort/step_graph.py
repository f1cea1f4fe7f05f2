"""A bundle's training step, rewritten for many clients abreast.

    next, loss = step(state [clients, ...], rows [clients, batch])      the bundle's step, by `vmap`

Its first dense layer is in dual form, where it has one; and once more as it stands, for clients with many examples.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from umbel.bundle import Bundle
from umbel.manifest import ACCUMULATE, NEXT_PREFIX, Manifest
from umbel.randomness import SEED
from umbel.runtime.onnx import NAME
from umbel_simulations.cohort.batching_rules import CannotBatch
from umbel_simulations.cohort.dual import FIRST, GRAM, PICKED, DualStep, HasNone, in_dual_form
from umbel_simulations.cohort.graphs import needed, state_of
from umbel_simulations.cohort.vmap import over_clients

ROWS: Final = "@rows"
"""[clients, batch] Which of all examples each client takes."""
ALL_PREFIX: Final = "@all_"
"""All examples of all clients, one after the other."""
LOSS: Final = "loss"
_MOST_NUMBERS: Final = 48_000
"""How large the state of a client may be: beyond, it leaves the processor's caches, and little is won."""


@dataclass(frozen=True, slots=True)
class StepGraph:
    """A training step over an axis of clients, and what it takes beside ROWS."""

    model: bytes
    state: tuple[str, ...]
    """[clients, ...] What moves, by name."""
    batched: tuple[str, ...]
    """Inputs, targets and others that it picks ROWS of, under `ALL_PREFIX`."""
    constants: tuple[str, ...]
    """Anchors, hyper-parameters, weights that stay: the same for all."""
    own: tuple[str, ...]
    """[clients] Numbers of each client: its seed, over how many batches it gathers."""
    dual: DualStep | None
    """If its first layer is in dual form: FIRST and GRAM are `batched`, and it takes PICKED, [clients, batch]."""


def steps_of(bundle: Bundle, moving: Collection[str] | None = None) -> list[StepGraph]:
    """The forms that a bundle's training step has for clients abreast; none for a large model, or a strange one.

    Raises:
        BundleInvalid: the bundle has no training graph for ONNX Runtime.
        BadInput: `moving` names no weight of the model.
    """
    manifest, state = bundle.manifest, state_of(bundle.manifest, moving)
    model = onnx.load(str(bundle.graph_path(NAME, "train")), load_external_data=False)
    ends = [*(NEXT_PREFIX + name for name in state), LOSS]
    nodes = needed(list(model.graph.node), ends)
    outputs = [value for value in model.graph.output if value.name in ends]
    for field, values in (("node", nodes), ("output", outputs)):
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(values)
    forms: list[DualStep | None] = [None]
    with suppress(HasNone):
        forms.insert(0, in_dual_form(model, manifest))
    found = []
    for dual in forms:
        if _numbers(manifest, state, dual) <= _MOST_NUMBERS:
            with suppress(CannotBatch):
                found.append(_abreast(dual.model if dual else model, manifest, state, dual))
    return found


def _numbers(manifest: Manifest, state: Sequence[str], dual: DualStep | None) -> int:
    """Of how many numbers a client's state is, beside what its examples take."""
    shapes = shapes_of(manifest)
    return sum(math.prod(shapes[name]) for name in state if dual is None or name not in dual.pulls)


def shapes_of(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """The shapes of all that a training step may move."""
    specs = (*manifest.trainable, *manifest.buffers, *manifest.slots)
    return {spec.name: spec.fixed_shape for spec in specs}


def _abreast(model: ModelProto, manifest: Manifest, state: tuple[str, ...], dual: DualStep | None) -> StepGraph:
    given = {value.name: value for value in model.graph.input}
    examples = [spec.name for spec in (*manifest.inputs, *manifest.targets)]
    batched = tuple(name for name in (*examples, FIRST, GRAM) if name in given)
    own = tuple(name for name in (SEED, ACCUMULATE) if name in given)
    of_each = [*state, *own, *((PICKED,) if dual else ())]
    constants = tuple(name for name in given if name not in {*of_each, *batched})
    ends = [*(NEXT_PREFIX + name for name in state), LOSS]
    done = over_clients(model, {*of_each, *batched}, ends, ROWS)
    inputs = [helper.make_tensor_value_info(ROWS, TensorProto.INT64, ["clients", "batch"])]
    inputs += [_info(given[name], name, ["clients", *_sizes(given[name])]) for name in of_each]
    inputs += [_info(given[name], ALL_PREFIX + name, ["all", *_sizes(given[name])[1:]]) for name in batched]
    inputs += [given[name] for name in constants]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ends]
    picked = [helper.make_node("Gather", [ALL_PREFIX + name, ROWS], [name], axis=0) for name in batched]
    known = [*model.graph.initializer, *done.constants.values()]
    graph = helper.make_graph([*picked, *done.nodes], "abreast", inputs, outputs, known)
    made = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return StepGraph(made.SerializeToString(), state, batched, constants, own, dual)


def _sizes(value: ValueInfoProto) -> list[int | str]:
    return [size.dim_value or size.dim_param or "batch" for size in value.type.tensor_type.shape.dim]


def _info(like: ValueInfoProto, name: str, shape: list[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, like.type.tensor_type.elem_type, shape)
