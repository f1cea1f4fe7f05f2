"""A bundle's training step, rewritten so that one call runs many steps: `train` inside an ONNX `Scan`.

    next, loss = train(state, x, y)                       the bundle's graph: one step
    last, losses = over_steps(state, [x1, x2, …], [y1, …])   this graph: as many steps as there are batches

The state (weights, buffers, optimiser slots) stays inside ONNX Runtime from step to step, and Python is left alone
for as long. Number and size of the batches stay open. Two things can be asked for beside: that only some weights move
(a personal head), and that a fixed drift is taken off the weights after each step (SCAFFOLD's correction).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import onnx
from onnx import (
    AttributeProto,
    GraphProto,
    NodeProto,
    TensorShapeProto,
    ValueInfoProto,
    helper,
)

from umbel.bundle import Bundle
from umbel.errors import BadInput
from umbel.manifest import ANCHOR_PREFIX, NEXT_PREFIX, Manifest
from umbel.runtime.onnx import NAME

LAST_PREFIX: Final = "last_"
LOSSES: Final = "losses"
DRIFT_PREFIX: Final = "drift_"
VELOCITY_PREFIX: Final = "s_velocity_"
DRAWS: Final = "s_draws"
"""The slot in which a graph with dropout counts its steps."""
_INSIDE: Final = "@step"


@dataclass(frozen=True, slots=True)
class StepsGraph:
    """The rewritten graph, and what it takes and gives beside inputs and targets."""

    model: bytes
    state: tuple[str, ...]
    """What moves, by name; given back as `last_…`."""
    constants: tuple[str, ...]
    """Anchors and hyper-parameters."""
    drift: tuple[str, ...]
    """Weights for which a `drift_…` has to be given."""


def over_steps(bundle: Bundle, *, moving: Collection[str] | None = None, with_drift: bool = False) -> StepsGraph:
    """Rewrite a bundle's training graph.

    Args:
        bundle: has a `train` graph for ONNX Runtime.
        moving: the trainable weights that may move, by name; all of them unless given.
        with_drift: take `drift_<weight>`, which is subtracted from the weight after each step. With plain gradient
            descent, a drift of `lr * c` is the same as adding `c` to each gradient.

    Raises:
        BundleInvalid: the bundle has no such graph.
        BadInput: `moving` names no weight of the model, or the optimiser has a memory that a drift would bypass; a
            velocity passes, as a plan may set momentum to 0.
    """
    manifest = bundle.manifest
    state = state_of(manifest, moving)
    if with_drift:
        require_no_memory(manifest)
    drift = tuple(name for name in state if with_drift and name.startswith("p_"))
    model = onnx.load(str(bundle.graph_path(NAME, "train")), load_external_data=False)
    batched = [spec.name for spec in (*manifest.inputs, *manifest.targets)]
    graph = _scan(model.graph, state, batched, drift)
    wrapped = helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)
    constants = tuple(value.name for value in model.graph.input if value.name not in {*state, *batched})
    return StepsGraph(wrapped.SerializeToString(), state, constants, drift)


def state_of(manifest: Manifest, moving: Collection[str] | None) -> tuple[str, ...]:
    """All that a training step moves, if only these weights may move.

    Raises:
        BadInput: `moving` names no weight of the model.
    """
    trainable = [spec.name for spec in manifest.trainable]
    slots = [spec.name for spec in manifest.slots if not spec.name.startswith(ANCHOR_PREFIX)]
    if moving is not None:
        unknown = sorted(set(moving) - set(trainable))
        if unknown or not moving:
            raise BadInput(f"{manifest.model!r} has no trainable weights {unknown}; choose some of {trainable}")
        still = {name.removeprefix("p_") for name in trainable if name not in moving}
        trainable = [name for name in trainable if name in moving]
        slots = [name for name in slots if not any(name.endswith("_" + other) for other in still)]
    return (*trainable, *(spec.name for spec in manifest.buffers), *slots)


def require_no_memory(manifest: Manifest) -> None:
    """Raise `BadInput` where the optimiser has a memory that a drift would bypass."""
    known = (ANCHOR_PREFIX, DRAWS, VELOCITY_PREFIX)
    memory = [spec.name for spec in manifest.slots if not spec.name.startswith(known)]
    if memory:
        raise BadInput(
            f"{manifest.model!r} is trained by an optimiser with a memory ({memory[0]}, …), past which a correction "
            "of the gradient can't be put; compile it with plain SGD"
        )


def _scan(graph: GraphProto, state: tuple[str, ...], batched: list[str], drift: tuple[str, ...]) -> GraphProto:
    """`graph` as the body of a `Scan`; what isn't state or batch is captured from outside."""
    given = {value.name: value for value in graph.input}
    made = {value.name: value for value in graph.output}
    nodes = [_renamed(node, {*state, *batched}) for node in graph.node]
    ends = []
    for name in state:
        end = made[NEXT_PREFIX + name]
        if name in drift:
            moved = f"{NEXT_PREFIX}{name}{_INSIDE}"
            nodes.append(helper.make_node("Sub", [end.name, DRIFT_PREFIX + name], [moved]))
            end = _value(end, moved)
        ends.append(end)
    body = helper.make_graph(
        _needed(nodes, [end.name for end in ends] + ["loss"]),
        "step",
        [_value(given[name], name + _INSIDE) for name in (*state, *batched)],
        [*ends, made["loss"]],
    )
    lasts = [LAST_PREFIX + name for name in state]
    scan = helper.make_node("Scan", [*state, *batched], [*lasts, LOSSES], body=body, num_scan_inputs=len(batched))
    inputs = [_value(value, value.name, "steps" if value.name in batched else "") for value in graph.input]
    inputs += [_value(given[name], DRIFT_PREFIX + name) for name in drift]
    outputs = [_value(given[name], last) for name, last in zip(state, lasts, strict=True)]
    return helper.make_graph(
        [scan], "steps", inputs, [*outputs, _value(made["loss"], LOSSES, "steps")], list(graph.initializer)
    )


def _renamed(node: NodeProto, names: Collection[str]) -> NodeProto:
    """A node that takes what goes by these names inside the step, in the graphs within it too."""
    copied = NodeProto()
    copied.CopyFrom(node)
    copied.input[:] = [name + _INSIDE if name in names else name for name in node.input]
    for graph in _within(copied):
        captured = set(names) - _made_in(graph)
        nodes = [_renamed(one, captured) for one in graph.node]
        del graph.node[:]
        graph.node.extend(nodes)
    return copied


def _within(node: NodeProto) -> list[GraphProto]:
    """The graphs that a node holds: bodies of loops, branches."""
    return [attribute.g for attribute in node.attribute if attribute.type == AttributeProto.GRAPH]


def _made_in(graph: GraphProto) -> set[str]:
    """What a graph needn't capture from outside."""
    made = {name for node in graph.node for name in node.output}
    return made | {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}


def _needs(node: NodeProto) -> list[str]:
    """What a node takes, and what the graphs within it capture."""
    captured = [
        name
        for graph in _within(node)
        for name in dict.fromkeys(need for one in graph.node for need in _needs(one))
        if name not in _made_in(graph)
    ]
    return [*node.input, *captured]


def _value(like: ValueInfoProto, name: str, leading: str = "") -> ValueInfoProto:
    """The same tensor under another name, with one more dimension in front if that is named."""
    value = ValueInfoProto()
    value.CopyFrom(like)
    value.name = name
    if leading:
        shape = TensorShapeProto()
        shape.dim.add().dim_param = leading
        shape.dim.extend(like.type.tensor_type.shape.dim)
        value.type.tensor_type.shape.CopyFrom(shape)
    return value


def _needed(nodes: list[NodeProto], ends: list[str]) -> list[NodeProto]:
    """Only the nodes that the ends hang on, each after what it needs."""
    makers = {name: node for node in nodes for name in node.output}
    ordered: list[NodeProto] = []
    done: set[str] = set()
    # Depth first with a stack of its own: a chain of nodes may be longer than Python's.
    stack = [(name, False) for name in reversed(ends)]
    while stack:
        name, after = stack.pop()
        node = makers.get(name)
        if node is None or name in done:
            continue
        if after:
            ordered.append(node)
            done.update(node.output)
        else:
            stack.append((name, True))
            stack.extend((need, False) for need in reversed(_needs(node)) if need not in done)
    return ordered
