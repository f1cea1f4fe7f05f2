"""A bundle's training step, rewritten so that one call trains one client: `train` inside an ONNX `Scan`.

    next, loss = train(state, x, y)                      the bundle's graph: one step on one batch
    end, losses = Scan(state; rows of each batch)        as many steps as there are batches
    sum = so far + weight * (end - start)                what clients have moved together

The state (weights, buffers, optimiser slots) stays inside ONNX Runtime from step to step, and what comes of it is added
to a sum before it leaves the cache; Python is left alone for as long. How many examples and batches there are, and how
large each batch is, stays open. Two things can be asked for beside: that only some weights move (a personal head), and
that a fixed drift is taken off the weights after each step (SCAFFOLD's correction).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

import onnx
from onnx import (
    AttributeProto,
    GraphProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
)
from onnx.helper import make_node as _node

from umbel.bundle import Bundle
from umbel.errors import BadInput
from umbel.manifest import ACCUMULATE, ANCHOR_PREFIX, NEXT_PREFIX, Manifest
from umbel.runtime.onnx import NAME

FLOAT, DOUBLE, INT64 = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64

ROWS: Final = "@rows"
"""[rows] Of which examples batches consist, one batch after the other."""
BEGINS: Final = "@begins"
ENDS: Final = "@ends"
"""[steps, 1] Where in `ROWS` each batch begins and ends."""
WEIGHT: Final = "@weight"
"""With how much weight the client counts."""
EACH_ACCUMULATE: Final = "@accumulate"
"""[steps] Over how many batches each step gathers gradients, where the optimiser does."""
SO_FAR_PREFIX: Final = "@so_far_"
SUM_PREFIX: Final = "@sum_"
"""What all clients have moved, before this one and after it."""
LOSS: Final = "@loss"
"""[1] The sum over the examples seen, in double precision."""
DRIFT_PREFIX: Final = "drift_"
VELOCITY_PREFIX: Final = "s_velocity_"
DRAWS: Final = "s_draws"
"""The slot in which a graph with dropout counts its steps."""
_INSIDE: Final = "@step"
_PICKED, _BEGIN, _END = "@picked", "@begin", "@end"


@dataclass(frozen=True, slots=True)
class StepsGraph:
    """The rewritten graph, and what it takes beside inputs, targets and what is named above."""

    model: bytes
    state: tuple[str, ...]
    """What moves, by name: what each client starts from."""
    summed: tuple[str, ...]
    """The shared weights among it, which are added up."""
    constants: tuple[str, ...]
    """Anchors, hyper-parameters and, as `drift_…`, what is taken off weights after each step."""
    gathers: bool
    """Whether it takes `EACH_ACCUMULATE`."""


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
    model = onnx.load(str(bundle.graph_path(NAME, "train")), load_external_data=False)
    given = {value.name: value for value in model.graph.input}
    gathers = given.pop(ACCUMULATE, None) is not None
    batched = [spec.name for spec in (*manifest.inputs, *manifest.targets)]
    summed = [name for name in state if name in manifest.shared_shapes]
    drift = [name for name in state if with_drift and name.startswith("p_")]
    step = _step(model.graph, state, batched, drift)
    taken = {ROWS: INT64, BEGINS: INT64, ENDS: INT64, WEIGHT: FLOAT} | ({EACH_ACCUMULATE: FLOAT} if gathers else {})
    graph = helper.make_graph(
        _whole(step, state, summed, gathers),
        "steps",
        [_value(value, name, "examples" if name in batched else "") for name, value in given.items()]
        + [_value(given[name], DRIFT_PREFIX + name) for name in drift]
        + [_value(given[name], SO_FAR_PREFIX + name) for name in summed]
        + [_info(name, kind, [] if name == WEIGHT else None) for name, kind in taken.items()],
        [*(_value(given[name], SUM_PREFIX + name) for name in summed), _info(LOSS, DOUBLE, [1])],
        list(model.graph.initializer),
    )
    wrapped = helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)
    constants = [name for name in given if name not in {*state, *batched}]
    constants += [DRIFT_PREFIX + name for name in drift]
    return StepsGraph(wrapped.SerializeToString(), state, tuple(summed), tuple(constants), gathers)


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
        owners = {slot: owner_of(slot, trainable) for slot in slots}
        trainable = [name for name in trainable if name in moving]
        slots = [slot for slot in slots if owners[slot] in (None, *trainable)]
    return (*trainable, *(spec.name for spec in manifest.buffers), *slots)


def owner_of(slot: str, trainable: Sequence[str]) -> str | None:
    """The weight that a slot is kept for; None where it is one for all. The longest, of names that end alike."""
    return max((name for name in trainable if slot.endswith(name.removeprefix("p"))), key=len, default=None)


def require_no_memory(manifest: Manifest) -> None:
    """Raise `BadInput` where the optimiser has a memory that a drift would bypass."""
    known = (ANCHOR_PREFIX, DRAWS, VELOCITY_PREFIX)
    memory = [spec.name for spec in manifest.slots if not spec.name.startswith(known)]
    if memory:
        raise BadInput(
            f"{manifest.model!r} is trained by an optimiser with a memory ({memory[0]}, …), past which a correction "
            "of the gradient can't be put; compile it with plain SGD"
        )


def _whole(step: GraphProto, state: Sequence[str], summed: Sequence[str], gathers: bool) -> list[NodeProto]:
    """All steps of a client, and what it adds to the sums."""
    ends, each = ["@end_" + name for name in state], [BEGINS, ENDS] + ([EACH_ACCUMULATE] if gathers else [])
    nodes = [_node("Scan", [*state, *each], [*ends, "@losses"], body=step, num_scan_inputs=len(each))]
    for name in summed:
        nodes += [
            _node("Sub", ["@end_" + name, name], ["@moved_" + name]),
            _node("Mul", ["@moved_" + name, WEIGHT], ["@weighed_" + name]),
            _node("Add", [SO_FAR_PREFIX + name, "@weighed_" + name], [SUM_PREFIX + name]),
        ]
    return [
        *nodes,
        _node("Sub", [ENDS, BEGINS], ["@sizes"]),
        _node("Cast", ["@sizes"], ["@exact_sizes"], to=DOUBLE),
        _node("Cast", ["@losses"], ["@exact_losses"], to=DOUBLE),
        _node("MatMul", ["@exact_losses", "@exact_sizes"], [LOSS]),
    ]


def _step(train: GraphProto, state: Sequence[str], batched: Sequence[str], drift: Collection[str]) -> GraphProto:
    """One step: `train` on the next batch. What is neither state nor batch is captured from outside."""
    given = {value.name: value for value in train.input}
    made = {value.name: value for value in train.output}
    nodes = [_node("Slice", [ROWS, _BEGIN, _END], [_PICKED])]
    nodes += [_node("Gather", [name, _PICKED], [name + _INSIDE]) for name in batched]
    nodes += [_renamed(one, {*state, *batched}) for one in train.node]
    ends = []
    for name in state:
        end = made[NEXT_PREFIX + name]
        if name in drift:
            moved = f"{NEXT_PREFIX}{name}{_INSIDE}"
            nodes.append(_node("Sub", [end.name, DRIFT_PREFIX + name], [moved]))
            end = _value(end, moved)
        ends.append(end)
    inputs = [_value(given[name], name + _INSIDE) for name in state]
    inputs += [_info(_BEGIN, INT64, [1]), _info(_END, INT64, [1])]
    inputs += [given[ACCUMULATE]] if ACCUMULATE in given else []
    nodes = needed(nodes, [*(end.name for end in ends), "loss"])
    return helper.make_graph(nodes, "step", inputs, [*ends, made["loss"]])


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


def needs(node: NodeProto) -> list[str]:
    """What a node takes, and what the graphs within it capture."""
    captured = [
        name
        for graph in _within(node)
        for name in dict.fromkeys(need for one in graph.node for need in needs(one))
        if name not in _made_in(graph)
    ]
    return [*node.input, *captured]


def _value(like: ValueInfoProto, name: str, count: str = "") -> ValueInfoProto:
    """The same tensor under another name, and where that is given, with another name for its first size."""
    value = ValueInfoProto()
    value.CopyFrom(like)
    value.name = name
    if count:
        value.type.tensor_type.shape.dim[0].dim_param = count
    return value


def _info(name: str, kind: int, shape: Sequence[int] | None = None) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def needed(nodes: list[NodeProto], ends: list[str]) -> list[NodeProto]:
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
            stack.extend((need, False) for need in reversed(needs(node)) if need not in done)
    return ordered
