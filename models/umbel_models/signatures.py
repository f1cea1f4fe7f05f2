"""The three signatures of a model as flat, pure functions of named tensors, ready to be traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from umbel.errors import CannotCompile
from umbel.manifest import NEXT_PREFIX
from umbel.randomness import SEED
from umbel_models.accumulation import COUNT
from umbel_models.dropout import DRAWS, drawing, drawing_in_torch
from umbel_models.histograms import bins_of
from umbel_models.spec import ModelSpec
from umbel_models.vetting import failures_of

Named = dict[str, Tensor]

EXAMPLE_CLIP: Final = "example_clip"
"""The scalar input of a training graph that clips the gradient of each example: its largest norm."""
SUM_PREFIX: Final = "sum_"


@dataclass(frozen=True, slots=True)
class Signature:
    """One graph to be: a function from named tensors to named tensors."""

    name: str
    function: Callable[[Named], Named]
    inputs: Mapping[str, Tensor]
    """An example of each input, in order."""
    batched: frozenset[str]
    """The inputs whose first dimension is the batch."""
    weights: frozenset[str]
    """The inputs that become constants bound by the runtime: all weights in `infer`, elsewhere the frozen ones."""
    each: Signature | None = None
    """What is done before for each example by itself, a batch of one; the sums of its outputs, `sum_…`, are inputs."""


class State:
    """The tensors of a module by role, under their names in the graph."""

    def __init__(self, spec: ModelSpec) -> None:
        parameters = {name: p.detach().clone() for name, p in spec.module.named_parameters()}
        self.trainable = {f"p_{name}": p for name, p in parameters.items() if spec.trains(name)}
        self.frozen = {f"f_{name}": p for name, p in parameters.items() if not spec.trains(name)}
        buffers = {name: b.detach().clone() for name, b in spec.module.named_buffers()}
        moving, self.random = _first_pass(spec, buffers)
        self.buffers = {f"b_{name}": buffers[name] for name in moving}
        self.constants = {name: b for name, b in buffers.items() if name not in moving}
        self._places = _places(spec.module)
        self.slots = _slots(spec, self.trainable) | ({f"s_{DRAWS}": torch.zeros(())} if self.random else {})
        self.hyperparameters = dict(spec.optimizer.hyperparameters) | ({SEED: 0.0} if self.random else {})
        self.hyperparameters |= {} if spec.clip_examples is None else {EXAMPLE_CLIP: spec.clip_examples}
        if not self.trainable:
            raise CannotCompile(f"{spec.name!r}: no weight is trainable; look at ModelSpec.trainable")
        for name, tensor in (self.trainable | self.frozen).items():
            if not tensor.numel():
                raise CannotCompile(
                    f"{spec.name!r}: weight {name} of shape {list(tensor.shape)} is empty; leave it out"
                )
            if tensor.dtype != torch.float32:
                can_move = tensor.dtype.is_floating_point
                instead = "convert the module to float32" if can_move else "keep what doesn't move in a buffer"
                raise CannotCompile(f"{spec.name!r}: weight {name} is {tensor.dtype}; {instead}")

    @property
    def weights(self) -> Named:
        """All that stands in the weights file, in sorted order."""
        return dict(sorted((self.trainable | self.buffers | self.frozen).items()))

    def module_tensors(self, named: Mapping[str, Tensor]) -> Named:
        """Parameters and buffers for `called`, under the module's own names."""
        # Batch norm writes its buffers in place, so each call gets its own copy.
        buffers = {name[2:]: named[name].clone() for name in self.buffers}
        constants = {name: tensor.clone() for name, tensor in self.constants.items()}
        own = {name[2:]: named[name] for name in (*self.trainable, *self.frozen)} | buffers | constants
        return {place: own[name] for place, name in self._places.items()}


def _places(module: nn.Module) -> dict[str, str]:
    """Each place of a module that holds a tensor, and the first name of that tensor; both names where weights are tied.

    A part that stands in a module twice is one place. Torch would look for the second name of it by itself, and leave
    the tensors of a trace behind in the part (2.13).
    """
    first: dict[int, str] = {}
    places = {}
    for path, part in module.named_modules():
        own = (*part.named_parameters("", False, False), *part.named_buffers("", False, False))
        for name, tensor in own:
            place = f"{path}.{name}" if path else name
            places[place] = first.setdefault(id(tensor), place)
    return places


def called(module: nn.Module, tensors: Named, inputs: tuple[Tensor, ...]) -> Any:
    """What a module returns with other tensors in its places; `tensors` then holds what it wrote."""
    return functional_call(module, tensors, inputs, tie_weights=False)


def _first_pass(spec: ModelSpec, buffers: Named) -> tuple[list[str], bool]:
    """Which buffers a forward pass in training mode writes, and whether it draws masks for dropout.

    Counters of integers have no use on a device and are left out.
    """
    floating = {name: tensor for name, tensor in buffers.items() if tensor.is_floating_point()}
    moved, draws = _written(spec, buffers)
    # What is written may be what was there, as the mean of a layer that begins with zeros; it isn't that twice.
    with suppress(CannotCompile):
        moved |= _written(spec, buffers | {name: tensor + 1.0 for name, tensor in floating.items()})[0]
    return [name for name in floating if name in moved], draws > 0


def _written(spec: ModelSpec, buffers: Named) -> tuple[set[str], int]:
    """Which of these buffers a forward pass in training mode leaves otherwise, and how many masks it draws."""
    own = {name: tensor.clone() for name, tensor in buffers.items()}
    own |= {name: p.detach() for name, p in spec.module.named_parameters()}
    tensors = {place: own[name] for place, name in _places(spec.module).items()}
    zero = torch.zeros(())
    with failures_of(spec, "module, in training,"), torch.no_grad(), drawing_in_torch(zero, zero) as draws:
        called(spec.module.train(), tensors, tuple(spec.inputs.values()))
    return {name for name in buffers if not torch.equal(tensors[name], buffers[name])}, draws.layers


def _slots(spec: ModelSpec, trainable: Named) -> Named:
    slots = {}
    for slot in spec.optimizer.slots:
        for name, tensor in trainable.items():
            # Copies, never one tensor twice: tracing takes equal objects for one input.
            slots[f"s_{slot}_{name[2:]}"] = tensor.clone() if slot == "anchor" else torch.zeros_like(tensor)
    return slots | {f"s_{scalar}": torch.zeros(()) for scalar in spec.optimizer.scalars}


def signatures(spec: ModelSpec, state: State, batch_size: int) -> tuple[Signature, ...]:
    """`infer`, `evaluate` and `train` of a model, with example inputs of this batch size."""
    inputs, targets = spec.batch(batch_size)
    weights = state.weights
    batched = frozenset((*inputs, *targets))
    scalars = {name: torch.tensor(value) for name, value in state.hyperparameters.items()}
    taken = [*weights, *state.slots, *inputs, *targets, *scalars]
    if len(set(taken)) != len(taken):
        raise CannotCompile(f"{spec.name!r}: names of inputs, targets and hyper-parameters must differ: {taken}")
    moving = state.trainable | state.buffers | state.frozen | state.slots
    still = frozenset(state.frozen)
    if spec.clip_examples is None:
        train = Signature("train", _train(spec, state), moving | inputs | targets | scalars, batched, still)
    else:
        train = _train_clipped(spec, state, moving, inputs | targets, scalars)
    return (
        Signature("infer", _infer(spec, state), weights | inputs, frozenset(inputs), frozenset(weights)),
        Signature("evaluate", _evaluate(spec, state), weights | inputs | targets, batched, still),
        train,
    )


def _forward(spec: ModelSpec, state: State, named: Named) -> tuple[Any, Named]:
    """What the module returns, and its tensors after the call."""
    tensors = state.module_tensors(named)
    output = called(spec.module, tensors, tuple(named[name] for name in spec.inputs))
    return output, tensors


def _count(spec: ModelSpec, output: Any, named: Named) -> Tensor:
    """What the batch counts for, a scalar."""
    if spec.count is None:
        return torch.ones(named[next(iter(spec.inputs))].shape[0]).sum()
    return spec.count(output, *(named[name] for name in spec.targets))


def _infer(spec: ModelSpec, state: State) -> Callable[[Named], Named]:
    def infer(named: Named) -> Named:
        return dict(zip(spec.outputs, spec.answers(_forward(spec, state, named)[0]), strict=True))

    return infer


def _evaluate(spec: ModelSpec, state: State) -> Callable[[Named], Named]:
    def evaluate(named: Named) -> Named:
        output, _ = _forward(spec, state, named)
        targets = [named[name] for name in spec.targets]
        examples = _count(spec, output, named)
        sums = {name: metric(output, *targets) for name, metric in spec.metrics.items()}
        sums |= counted(spec, output, named)
        return {"loss": spec.loss(output, *targets) * examples, **sums, "examples": examples}

    return evaluate


def counted(spec: ModelSpec, output: Any, named: Named) -> Named:
    """The bins of the histograms, by the names of the metrics; `named` holds inputs and targets."""
    if not spec.histograms:
        return {}
    inputs, targets = ({name: named[name] for name in names} for names in (spec.inputs, spec.targets))
    return bins_of(spec.histograms, inputs, dict(zip(spec.outputs, spec.answers(output), strict=True)), targets)


def training_pass(spec: ModelSpec, state: State, batch_size: int) -> Signature:
    """The forward pass of a training step alone: loss, count and moved buffers, with what dropout draws."""
    inputs, targets = spec.batch(batch_size)
    seeds = {SEED: torch.zeros(()), f"s_{DRAWS}": torch.zeros(())}
    given = state.trainable | state.buffers | state.frozen | inputs | targets | (seeds if state.random else {})

    def forward(named: Named) -> Named:
        loss, (tensors, count) = _loss(spec, state, named)
        return {"loss": loss, "count": count} | {name: tensors[name[2:]] for name in state.buffers}

    return Signature("forward", forward, given, frozenset((*inputs, *targets)), frozenset())


def _loss(spec: ModelSpec, state: State, named: Named) -> tuple[Tensor, tuple[Named, Tensor]]:
    """The loss of a batch; the module's tensors after the call, and what the batch counts for."""
    with drawing(named[SEED], named[f"s_{DRAWS}"]) if state.random else nullcontext():
        output, tensors = _forward(spec, state, named)
    loss = spec.loss(output, *(named[name] for name in spec.targets))
    return loss, (tensors, _count(spec, output, named))


def _train(spec: ModelSpec, state: State) -> Callable[[Named], Named]:
    def train(named: Named) -> Named:
        gradients, loss, count, tensors = _gradients(spec, state, named, spec.optimizer.factor(named))
        moved = _moved(spec, state, named | {COUNT: count}, gradients)
        moved |= {name: tensors[name[2:]] for name in state.buffers}
        return {NEXT_PREFIX + name: value for name, value in moved.items()} | {"loss": loss}

    return train


def _gradients(
    spec: ModelSpec, state: State, named: Named, factor: Tensor | None = None
) -> tuple[Named, Tensor, Tensor, Named]:
    """Of a batch: gradients times `factor`, mean loss, what it counts for, and the module's tensors after the call."""

    def loss_of(trainable: Named) -> tuple[Tensor, tuple[Named, Tensor]]:
        return _loss(spec, state, named | trainable)

    weights = {name: named[name] for name in state.trainable}
    result: Any = vjp(loss_of, weights, has_aux=True)
    loss, backwards, (tensors, count) = result
    (gradients,) = backwards(torch.ones_like(loss) if factor is None else factor.to(loss.dtype))
    return gradients, loss, count, tensors


def _moved(spec: ModelSpec, state: State, named: Named, gradients: Named) -> Named:
    """Weights and slots after one step of the optimiser."""
    optimizer = spec.optimizer
    scalars = optimizer.advance({name: named[f"s_{name}"] for name in optimizer.scalars}, named)
    new: Named = {}
    for name in state.trainable:
        slots = {slot: named[f"s_{slot}_{name[2:]}"] for slot in optimizer.slots}
        weight, changed = optimizer.update(named[name], gradients[name], slots, scalars, named)
        new |= {name: weight} | {f"s_{slot}_{name[2:]}": value for slot, value in changed.items()}
    new |= {f"s_{name}": scalars[name] for name in optimizer.scalars}
    return new | ({f"s_{DRAWS}": named[f"s_{DRAWS}"] + 1.0} if state.random else {})


def _train_clipped(spec: ModelSpec, state: State, moving: Named, batch: Named, scalars: Named) -> Signature:
    """A step on gradients that were clipped for each example by itself, as DP-SGD asks (Abadi et al., 2016)."""
    if state.buffers or state.random:
        what = "statistics of the batch" if state.buffers else "dropout, which would drop alike in all its examples"
        raise CannotCompile(f"{spec.name!r}: gradients are clipped by example, and the module has {what}; leave it out")

    def each(named: Named) -> Named:
        gradients, loss, *_ = _gradients(spec, state, named)
        norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
        limit = named[EXAMPLE_CLIP]
        factor = limit / torch.maximum(norm, limit.clamp(min=1e-12))
        summed = {name: gradient * factor for name, gradient in gradients.items()} | {"loss": loss, COUNT: loss * 0 + 1}
        return {SUM_PREFIX + name: value for name, value in summed.items()}

    def train(named: Named) -> Named:
        count = named[SUM_PREFIX + COUNT]
        factor = spec.optimizer.factor(named)
        share = (torch.ones([]) if factor is None else factor) / count
        gradients = {name: named[SUM_PREFIX + name] * share for name in state.trainable}
        moved = _moved(spec, state, named | {COUNT: count}, gradients)
        new = {NEXT_PREFIX + name: value for name, value in moved.items()}
        return new | {"loss": named[SUM_PREFIX + "loss"] / count}

    one = {name: tensor[:1] for name, tensor in batch.items()}
    sums = {SUM_PREFIX + name: torch.zeros_like(p) for name, p in state.trainable.items()}
    sums |= {SUM_PREFIX + name: torch.ones(()) for name in ("loss", COUNT)}
    still = frozenset(state.frozen)
    first = Signature("train", each, state.weights | one | scalars, frozenset(), still)
    return Signature("train", train, moving | batch | scalars | sums, frozenset(batch), still, first)
