"""A spec tried out in torch before anything is traced: module, loss and metrics have to be what `ModelSpec` says.

What autograd lets pass without a word would train and judge wrongly on every device: a loss that pairs each output
with all targets, a sum in place of a mean, a metric that doesn't add.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from umbel.errors import CannotCompile, UmbelError
from umbel_models.spec import ModelSpec

_CLOSE: Final = 1e-3
"""How far sums over the same examples may be apart, relative to the larger, for they are added in another order."""
_EQUAL: Final = 1e-12
"""The same for losses that are the same, in float64."""
_WRAPPED: Final = {
    "DataParallel": "what it holds as `module`",
    "DistributedDataParallel": "what it holds as `module`",
    "OptimizedModule": "what torch.compile was given, its `_orig_mod`",
    "RecursiveScriptModule": "the module that was scripted",
    "TopLevelTracedModule": "the module that was traced",
}
"""Modules around others, which no trace goes through -> what to give instead."""


def require_sound(spec: ModelSpec) -> None:
    """Run module, loss and metrics on the example batch; leaves the module in evaluation mode.

    Raises:
        CannotCompile: one of them fails, or isn't what `ModelSpec` says.
    """
    with failures_of(spec, "module"), torch.no_grad():
        output = spec.module.eval()(*spec.inputs.values())
    _require_outputs(spec, output)
    _require_labels(spec, output)
    loss, doubled = _once_and_twice(spec, "loss", spec.loss, output)
    if not torch.isfinite(loss):
        raise CannotCompile(f"{spec.name!r}: the loss of the example batch is {loss:g}; look at its targets")
    if loss != 0 and _is_close(doubled, 2 * loss):
        raise CannotCompile(
            f"{spec.name!r}: the loss is twice as large when each example comes twice, so it is a sum; give the mean"
        )
    _require_paired(spec, output)
    _require_numbers_of_examples(spec, output)
    counts = {} if spec.count is None else {"count": spec.count}
    for name, metric in (*spec.metrics.items(), *counts.items()):
        value, doubled = _once_and_twice(spec, f"metric {name!r}", metric, output)
        if not _is_close(doubled, 2 * value):
            raise CannotCompile(
                f"{spec.name!r}: metric {name!r} is {value:g}, and {doubled:g} when each example comes twice; give a "
                "sum over the examples, which adds over batches and devices"
            )


def own_copy(spec: ModelSpec) -> ModelSpec:
    """The same with a copy of the module: modes are switched on the way, and some modules keep tensors of a call.

    Raises:
        CannotCompile: the module can't be copied, has hooks that no graph would have, or is on another device.
    """
    given = (*spec.inputs.items(), *spec.targets.items(), *spec.module.named_parameters(), *spec.module.named_buffers())
    elsewhere = [f"{name} on {tensor.device}" for name, tensor in given if tensor.device.type != "cpu"]
    if elsewhere:
        raise CannotCompile(f"{spec.name!r}: {', '.join(elsewhere)}; move module and examples by .cpu()")
    hooked = [name for name, parameter in spec.module.named_parameters() if parameter._backward_hooks]
    if hooked:
        what = f"hooks on the gradients of {', '.join(hooked)}"
        raise CannotCompile(f"{spec.name!r}: {what}, which no graph would have; scale the loss, or what goes into them")
    for path, part in spec.module.named_modules():
        if (inner := _WRAPPED.get(type(part).__name__)) is not None:
            where = f"module {path!r}" if path else "the module"
            raise CannotCompile(f"{spec.name!r}: {where} is a {type(part).__name__}; give {inner}")
    with failures_of(spec, "copying of the module"):
        return replace(spec, module=copied(spec.module))


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Let torch's Transformer layers answer as they train: their fast path answers zeros where padding is."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def copied(module: nn.Module) -> nn.Module:
    """A copy; tensors that a module works out anew at each call (`torch.nn.utils.weight_norm`) as they are now."""
    kept = [t for part in module.modules() for t in vars(part).values() if isinstance(t, Tensor) and not t.is_leaf]
    return copy.deepcopy(module, {id(tensor): tensor.detach().clone() for tensor in kept})


@contextmanager
def failures_of(spec: ModelSpec, what: str) -> Iterator[None]:
    """Turn whatever an author's own code raises on the example batch into one `CannotCompile` that says where."""
    try:
        yield
    except UmbelError as error:
        raise type(error)(f"{spec.name!r}: the {what}: {error}") from error
    except Exception as error:  # an author's code raises anything at all
        path = innermost(spec.module, error)
        told = f"{type(error).__name__}: {error}" + (f" (in module {path!r})" if path else "")
        raise CannotCompile(
            f"{spec.name!r}: the {what} fails on the example batch: {told}; the module is called with "
            f"{', '.join(spec.inputs)} in this order, the loss with what it returns and {', '.join(spec.targets)}"
        ) from error


def innermost(module: nn.Module, error: Exception) -> str | None:
    """The path of the innermost part of a module that an error went through."""
    paths = {id(part): path for path, part in module.named_modules()}
    frames = [id(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [paths[part] for part in frames if part in paths]
    return found[-1] if found else None


def _require_outputs(spec: ModelSpec, output: Any) -> None:
    outputs = spec.answers(output)
    for one in outputs:
        if not isinstance(one, Tensor):
            kind = type(one).__name__
            raise CannotCompile(
                f"{spec.name!r}: the module returns a {kind}; let it return a tensor, a tuple of them or a dict"
            )
    if len(outputs) != len(spec.outputs):
        raise CannotCompile(f"{spec.name!r}: the module returns {len(outputs)} tensors, names are {spec.outputs}")
    for name, one in zip(spec.outputs, outputs, strict=True):
        if one.shape[:1] != (spec.example_count,):
            raise CannotCompile(
                f"{spec.name!r}: output {name!r} has shape {list(one.shape)} for {spec.example_count} examples; the "
                "first dimension of each output is the batch"
            )
        if not torch.isfinite(one).all():
            odd = [name for name, weight in spec.module.named_parameters() if not torch.isfinite(weight).all()]
            why = f"weights {', '.join(odd)} hold such numbers" if odd else "use a large negative number to hide scores"
            raise CannotCompile(f"{spec.name!r}: output {name!r} holds NaN or infinity, which no answer may; {why}")


def _require_paired(spec: ModelSpec, output: Any) -> None:
    """Refuse a loss that doesn't care which target goes with which example, though it looks at targets.

    Worked out in float64, in which only losses that really are the same come out the same; those that insist on
    float32 are let pass.
    """
    given, *targets = pytree.tree_map_only(Tensor, _wide, [output, *spec.targets.values()])
    if not any((one != one[:1]).any() for one in spec.answers(given)):
        return
    others = [[t.roll(by, 0) for t in targets] for by in range(1, min(4, spec.example_count))]
    others.append([t[:1].expand(t.shape) for t in targets])
    try:
        with failures_of(spec, "loss"), warnings.catch_warnings(action="ignore"), torch.no_grad():
            loss, *rolled, alike = (spec.loss(given, *chosen) for chosen in (targets, *others))
    except CannotCompile:
        return
    if all(_is_close(one, loss, _EQUAL) for one in rolled) and not _is_close(alike, loss, _EQUAL):
        shapes = [list(t.shape) for t in (*spec.answers(output), *targets)]
        raise CannotCompile(
            f"{spec.name!r}: the loss is the same whichever target goes with which example; look for shapes that "
            f"broadcast, as [N, 1] with [N] does (here {', '.join(map(str, shapes))})"
        )


def _require_numbers_of_examples(spec: ModelSpec, output: Any) -> None:
    """Refuse a histogram of numbers that aren't each example's own."""
    answers = dict(zip(spec.outputs, spec.answers(output), strict=True))
    for name, counting in spec.histograms.items():
        with failures_of(spec, f"histogram {name!r}"), torch.no_grad():
            alone = counting.values(spec.inputs, answers, spec.targets)
            twice = counting.values(
                *pytree.tree_map_only(Tensor, partial(_repeated, times=2), [spec.inputs, answers, spec.targets])
            )
            if not torch.allclose(twice, torch.cat([alone, alone]), rtol=_CLOSE, atol=_CLOSE, equal_nan=True):
                raise CannotCompile("an example's number hangs on the others of its batch; give one of its own")


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _require_labels(spec: ModelSpec, output: Any) -> None:
    scores = (1, *spec.answers(output)[0].shape[1:])[-1]
    if spec.labels and (len(set(spec.labels)) != len(spec.labels) or scores != len(spec.labels)):
        found = f"{len(set(spec.labels))} different labels for {scores} scores in {spec.outputs[0]!r}"
        raise CannotCompile(f"{spec.name!r}: {found}; give one for each")


def _once_and_twice(spec: ModelSpec, what: str, function: Callable[..., Tensor], output: Any) -> tuple[Tensor, Tensor]:
    """What a loss or metric makes of the example batch, and of the same batch with each example twice."""
    values = []
    for times in (1, 2):
        given, *targets = pytree.tree_map_only(
            Tensor, partial(_repeated, times=times), [output, *spec.targets.values()]
        )
        with failures_of(spec, what), warnings.catch_warnings(), torch.no_grad():
            # Torch's losses only warn when they pair each output with every target.
            warnings.filterwarnings("error", message="Using a target size")
            value = function(given, *targets)
        if not isinstance(value, Tensor) or value.dim():
            found = f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise CannotCompile(
                f"{spec.name!r}: the {what} is {found}; it must be a tensor of one number, without a dimension"
            )
        values.append(value.to(torch.float64))
    return values[0], values[1]


def _repeated(tensor: Tensor, times: int) -> Tensor:
    """A dict may hold a number of the whole batch beside its answers."""
    return torch.cat([tensor] * times) if tensor.dim() else tensor


def _is_close(value: Tensor, other: Tensor, tolerance: float = _CLOSE) -> bool:
    return bool((value - other).abs() <= tolerance * max(value.abs(), other.abs()))
