"""The gate: compiled graphs must answer, judge and train as torch does, or no bundle is written.

Answers and metrics are compared at several batch sizes, among them one and a ragged one. Training runs side by side:
three steps on their own, compared tightly, then on to twenty; with the weights of the last one it is answered again.
An activation within rounding of a kink (ReLU, a maximum) may take different sides in two engines, and training lets
that grow to anything; so after the third step torch takes over the graph's weights before each next one, while both
keep their own slots.

Some gradients are zero but for rounding: of a bias before batch norm, of the keys' bias in attention. Adam makes a
whole step of those, in a direction that says nothing; such weights may differ by as much (`_Rounding`).

Where training disagrees it is gone through once more, each step from the graph's weights, beside a twin: torch again,
from weights that are another in their last digit. Batch norm over two or three numbers makes a thousandth of that, in
torch as in any graph; tolerances widen by a few times what the twin is off, at that step, and no further.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from umbel.bundle import Bundle
from umbel.errors import CannotCompile, ParityFailed, UmbelError
from umbel.randomness import SEED
from umbel.runtime import Runtime
from umbel.update import Metrics
from umbel.weights import Weights
from umbel_models.adapters import resolved
from umbel_models.dropout import drawing_in_torch
from umbel_models.histograms import Named, histogram_of
from umbel_models.spec import ModelSpec
from umbel_models.vetting import copied, without_fast_path

BATCH_SIZES: Final = (1, 5, 8)
TRAIN_SIZES: Final = (8, 5, 16, 1)
"""Batch sizes of successive training steps, round and round."""
LAST_SIZE: Final = 5
"""Of the batch that is answered with the weights of the last step."""
SHORT: Final = 3
LONG: Final = 20
ANSWER_TOLERANCE: Final = 1e-4
"""For answers and metrics, relative to the largest number of a tensor, or to 1 where that is less."""
STEP_TOLERANCE: Final = 2e-5
"""For weights after each of the first `SHORT` steps, relative in the same way."""
KINK_TOLERANCE: Final = 1e-3
"""For weights after each further step up to `LONG`, relative in the same way."""

COUNT_TOLERANCE: Final = 1e-3
"""For counts of values, which are whole numbers of an example's share."""

ROUNDING: Final = 3e-6
"""A gradient that isn't zero and no larger than this, relative to the largest of all weights, is taken for rounding."""
ROUNDING_MARGIN: Final = 8
"""How many times further a graph may be from torch than torch is from itself, where its rounding is looked at."""
ROUNDING_LIMIT: Final = 0.1
"""The most that is put down to rounding, relative as above."""

PARITY_SEED: Final = 11_400_714.0
"""For the masks of dropout."""

_UNEQUAL: Final = "Look for a layer with randomness or state that the graph can't have (dropout, for one)"
_WILD: Final = (
    "In torch too a step goes elsewhere from weights that are another in their last digit: take a smaller rate, larger "
    "inputs, or GroupNorm in place of batch norm"
)

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class ParityReport:
    """The largest relative difference that was seen, by what was compared."""

    infer: float
    evaluate: float
    train_short: float
    train_long: float


def check_parity(spec: ModelSpec, bundle: Bundle, runtime: Runtime) -> ParityReport:
    """Compare a bundle with the module it was made from.

    Raises:
        ParityFailed: naming the signature and the tensor that differ, and by how much.
    """
    spec = resolved(spec)
    _require_same_weights(spec, bundle)
    module = copied(spec.module)
    minimum = 2 if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()) else 1
    try:
        with without_fast_path():
            infer = max(_infer(spec, module, bundle, runtime, size) for size in BATCH_SIZES)
            evaluate = max(_evaluate(spec, module, bundle, runtime, size) for size in BATCH_SIZES)
            short, long = _train(spec, bundle, runtime, minimum)
    except CannotCompile:
        raise
    except UmbelError as error:
        raise ParityFailed(f"{spec.name!r}: the compiled graphs don't run: {error}") from error
    return ParityReport(infer, evaluate, short, long)


def require_same_names(spec: ModelSpec, bundle: Bundle) -> Mapping[str, Tensor]:
    """The weights of a resolved spec by a bundle's names; raises `ParityFailed` if it has others, or trains others."""
    own = {("p_" if spec.trains(name) else "f_") + name: weight for name, weight in spec.module.named_parameters()}
    names = set(own)
    known = {each.name for each in (*bundle.manifest.trainable, *bundle.manifest.frozen)}
    if names != known:
        raise ParityFailed(
            f"{spec.name!r}: the bundle has other weights, or trains others: {', '.join(sorted(names ^ known))}; "
            "give the spec, and the choice of what is trained, that it was built from"
        )
    return own


def _require_same_weights(spec: ModelSpec, bundle: Bundle) -> None:
    own = require_same_names(spec, bundle)
    weights = bundle.weights()
    others = [name for name, weight in own.items() if not np.array_equal(weights[name], weight.detach().numpy())]
    if others:
        raise ParityFailed(
            f"{spec.name!r}: the bundle holds other numbers in {', '.join(others)}; give a spec with the weights that "
            "it was built with (torch.manual_seed makes a new module's the same each time)"
        )


def to_numpy(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Tensors as arrays."""
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def _infer(
    spec: ModelSpec, module: nn.Module, bundle: Bundle, runtime: Runtime, size: int, trained: Weights | None = None
) -> float:
    inputs, _ = spec.batch(size, start=1)
    with torch.no_grad():
        outputs = spec.answers(module.eval()(*inputs.values()))
    weights = bundle.weights() if trained is None else Weights({**bundle.weights().arrays, **trained.arrays})
    found = runtime.infer(bundle, weights)(to_numpy(inputs))
    expected = to_numpy(dict(zip(spec.outputs, outputs, strict=True)))
    where = f"infer (batch of {size})" if trained is None else "infer, after training"
    return max(_compare(where, n, found[n], expected[n], ANSWER_TOLERANCE) for n in expected)


def _evaluate(spec: ModelSpec, module: nn.Module, bundle: Bundle, runtime: Runtime, size: int) -> float:
    inputs, targets = spec.batch(size, start=2)
    with torch.no_grad():
        output = module.eval()(*inputs.values())
        count = _count(spec, output, targets, size)
        expected = {"loss": spec.loss(output, *targets.values()) * count, "examples": count}
        expected |= {name: metric(output, *targets.values()) for name, metric in spec.metrics.items()}
    found = runtime.evaluate(bundle, bundle.weights())(to_numpy(inputs), to_numpy(targets))
    where = f"evaluate (batch of {size})"
    answers = dict(zip(spec.outputs, spec.answers(output), strict=True))
    _compare_histograms(where, spec, (inputs, answers, targets), found)
    return max(
        _compare(where, name, np.array(found[name]), value.numpy(), ANSWER_TOLERANCE)
        for name, value in expected.items()
    )


def _compare_histograms(where: str, spec: ModelSpec, given: tuple[Named, Named, Named], found: Metrics) -> None:
    """Compare how many values lie above each edge; of those that lie on it, but for rounding, none needs to."""
    for name, counting in spec.histograms.items():
        values = counting.values(*given)
        margin = ANSWER_TOLERANCE * max(1.0, float(values.nan_to_num(0.0, 0.0, 0.0).abs().max()))
        counts = histogram_of(name, counting).counts(found)
        least, above, most = (
            np.cumsum(one[::-1]) - by
            for one, by in (
                (counting.counts(values - margin).numpy(), COUNT_TOLERANCE),
                (counts, 0.0),
                (counting.counts(values + margin).numpy(), -COUNT_TOLERANCE),
            )
        )
        if not ((least <= above) & (above <= most)).all():
            raise ParityFailed(f"{where}: histogram {name!r} counts {counts}, torch {counting.counts(values).numpy()}")


def _count(spec: ModelSpec, output: Any, targets: Mapping[str, Tensor], size: int) -> Tensor:
    """What a batch counts for."""
    return torch.tensor(float(size)) if spec.count is None else spec.count(output, *targets.values())


def _train(spec: ModelSpec, bundle: Bundle, runtime: Runtime, minimum: int) -> tuple[float, float]:
    """Side by side; where that fails once more, by tolerances that widen as far as torch's own rounding goes."""
    try:
        return _side_by_side(spec, bundle, runtime, minimum, doubted=False)
    except ParityFailed:
        return _side_by_side(spec, bundle, runtime, minimum, doubted=True)


def _side_by_side(
    spec: ModelSpec, bundle: Bundle, runtime: Runtime, minimum: int, doubted: bool
) -> tuple[float, float]:
    chosen = {SEED: PARITY_SEED} if SEED in bundle.manifest.hyperparameters else {}
    session = runtime.train(bundle, bundle.weights(), chosen)
    torch_side = _TorchSide(spec)
    twin = _TorchSide(spec) if doubted else None
    rounding = _Rounding(spec.optimizer.reach)
    short = long = 0.0
    for step in range(1, LONG + 1):
        size = max(minimum, TRAIN_SIZES[step % len(TRAIN_SIZES)])
        inputs, targets = spec.batch(size, start=7 * step)
        if twin is not None:
            twin.nudge()
            apart = twin.step(step, inputs, targets)
        loss = torch_side.step(step, inputs, targets, rounding.look_at)
        found, moved = np.array(session.step(to_numpy(inputs), to_numpy(targets))), session.weights()
        own = 0.0 if twin is None else twin.distance(torch_side, apart - loss, rounding, moved)
        _compare(f"train (step {step})", "loss", found, loss.numpy(), ANSWER_TOLERANCE + own)
        difference = _compare_weights(torch_side.module, moved, step, rounding, own)
        if step <= SHORT:
            short = max(short, difference)
        else:
            long = max(long, difference)
        if twin is not None:
            twin.take_over(moved)
        if step <= SHORT and twin is None:
            rounding.take_over(torch_side.module, moved)
        else:
            torch_side.take_over(moved)
    # Answers must follow whatever training moves.
    _infer(spec, torch_side.module, bundle, runtime, LAST_SIZE, moved)
    return short, long


class _TorchSide:
    """What torch itself makes of a model's training."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec, self.module = spec, copied(spec.module).train()
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(spec.trains(name))
        self._trained = [p for p in self.module.parameters() if p.requires_grad]
        self._optimizer = spec.optimizer.torch_optimizer([*self._trained])

    def step(
        self,
        number: int,
        inputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        look_at: Callable[[nn.Module], None] = lambda module: None,
    ) -> Tensor:
        """One step on a batch: its loss. `look_at` sees the module when it has its gradients."""
        self._optimizer.zero_grad()
        with drawing_in_torch(torch.tensor(PARITY_SEED), torch.tensor(number - 1.0)):
            output = self.module(*inputs.values())
        loss = self._spec.loss(output, *targets.values())
        if not loss.requires_grad:
            raise CannotCompile(
                f"{self._spec.name!r}: the loss doesn't depend on any weight that is trained; look at both"
            )
        if self._spec.clip_examples is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            loss = _clipped_backward(self._spec, self.module, inputs, targets)
        for parameter in self._trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # torch would leave it out, even of weight decay
        look_at(self.module)
        size = len(next(iter(inputs.values())))
        clipped = self._spec.clip_examples is not None
        self._optimizer.step(float(size if clipped else _count(self._spec, output, targets, size)))
        return loss.detach()

    def nudge(self) -> None:
        """Move each weight that is trained by its last digit, every other one up."""
        for parameter in self._trained:
            way = torch.tensor([math.inf, -math.inf]).repeat(parameter.numel() // 2 + 1)[: parameter.numel()]
            parameter.data = torch.nextafter(parameter.data, way.reshape(parameter.shape))

    def distance(self, other: _TorchSide, losses: Tensor, rounding: _Rounding, names: Iterable[str]) -> float:
        """How much rounding may account for: a few times how far the two are apart, relative as in `_compare`."""
        tensors, others = _named_tensors(self.module), _named_tensors(other.module)
        gaps = [float(losses.abs())]
        for name in names:
            gap = ((tensors[name] - others[name]).abs() - rounding.allowed(name)).max()
            gaps.append(float(gap / others[name].abs().max().clamp(min=1)))
        return min(ROUNDING_MARGIN * max(gaps), ROUNDING_LIMIT)

    def take_over(self, weights: Weights) -> None:
        """Go on from these."""
        tensors = _named_tensors(self.module)
        for name in weights:
            tensors[name].copy_(torch.tensor(weights[name]))


def _clipped_backward(
    spec: ModelSpec, module: nn.Module, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> Tensor:
    """Example by example, as DP-SGD is told: the mean of clipped gradients into the weights, and of losses."""
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
    sums = [torch.zeros_like(weight) for weight in weights]
    losses = []
    for row in range(len(next(iter(inputs.values())))):
        one, wanted = ({name: t[row : row + 1] for name, t in part.items()} for part in (inputs, targets))
        loss = spec.loss(module(*one.values()), *wanted.values())
        gradients = torch.autograd.grad(loss, weights)
        norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient * min(1.0, (spec.clip_examples or 0.0) / max(norm, 1e-12))
        losses.append(loss.detach())
    for weight, total in zip(weights, sums, strict=True):
        weight.grad = total / len(losses)
    return torch.stack(losses).mean()


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    tensors = {f"p_{name}": parameter.detach() for name, parameter in module.named_parameters()}
    return tensors | {f"b_{name}": buffer for name, buffer in module.named_buffers()}


class _Rounding:
    """How far weights may be apart after a step because their gradients are nothing but rounding.

    Args:
        reach: that of the optimiser; where it is zero, nothing is forgiven.
    """

    def __init__(self, reach: float) -> None:
        self._reach = reach
        self._seen: dict[str, Tensor] = {}

    def look_at(self, module: nn.Module) -> None:
        """Find such gradients; once found, a number counts as one of them."""
        sizes = {f"p_{name}": p.grad.abs() for name, p in module.named_parameters() if p.grad is not None}
        limit = ROUNDING * max(float(size.max()) for size in sizes.values())
        for name, size in sizes.items():
            # A zero among nothing but rounding is rounding too; others are zero because nothing came by.
            now = (size <= limit) & ((size > 0) | bool(0 < size.max() <= limit))
            self._seen[name] = now | self._seen.get(name, now)

    def allowed(self, name: str) -> Tensor:
        """By how much each number of a tensor may be off."""
        return 2 * self._reach * self._seen.get(name, torch.zeros(()))

    def take_over(self, module: nn.Module, weights: Weights) -> None:
        """Let torch go on from the graph's weights where they may differ, before others follow them."""
        for name, parameter in module.named_parameters() if self._reach else ():
            if (seen := self._seen.get(f"p_{name}")) is not None:
                parameter.data = torch.where(seen, torch.tensor(weights[f"p_{name}"]), parameter.data)


def _compare_weights(module: nn.Module, found: Weights, step: int, rounding: _Rounding, own: float) -> float:
    tensors = _named_tensors(module)
    tolerance = own + (STEP_TOLERANCE if step <= SHORT else KINK_TOLERANCE)
    return max(
        _compare(
            f"train (step {step})",
            name,
            found[name],
            tensors[name].numpy(),
            tolerance,
            rounding.allowed(name).numpy(),
        )
        for name in found
    )


def _compare(
    where: str, name: str, found: NDArray[Any], expected: NDArray[Any], tolerance: float, allowed: Any = 0.0
) -> float:
    if found.shape != expected.shape:
        raise ParityFailed(f"{where}: {name!r} has shape {found.shape}, torch gives {expected.shape}")
    gap = np.maximum(np.abs(found.astype(np.float64) - expected.astype(np.float64)) - allowed, 0.0)
    scale = max(1.0, float(np.max(np.abs(expected), initial=0.0)))
    difference = float(np.max(gap, initial=0.0)) / scale
    if not difference <= tolerance:
        raise ParityFailed(
            f"{where}: {name!r} differs from torch by {difference:.3g}, {tolerance:.3g} is allowed; no bundle is "
            f"written. {_WILD if tolerance >= ROUNDING_LIMIT else _UNEQUAL}"
        )
    return difference
