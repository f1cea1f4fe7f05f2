"""What a model's author says about a model: the module, its loss, an example batch, and how it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from umbel.errors import CannotCompile
from umbel.fields import MAX_ENTRIES
from umbel.histograms import is_bin
from umbel_models.histograms import Counting, histogram_of
from umbel_models.losses import correct
from umbel_models.optimizers import SGD, Optimizer
from umbel_models.trainable import Head, LoRA, Trainable, every_weight

Loss = Callable[..., Tensor]
"""(what the module returned, *targets) -> the mean loss over the examples of the batch, a scalar."""
MetricSum = Callable[..., Tensor]
"""(what the module returned, *targets) -> a sum over the examples of the batch, a scalar."""

_MOST_METRICS: Final = MAX_ENTRIES - 5
"""What a report has room for beside loss and count, those two of the training, and a vote on the clip."""
Examples = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""Inputs and targets by name, batch first."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """All that the compiler needs to know about a model."""

    name: str
    module: nn.Module
    """Called with the inputs in order; its present weights become version one."""
    loss: Loss
    inputs: Mapping[str, Tensor]
    """An example batch by input name, batch first; a few of its examples become the golden ones."""
    targets: Mapping[str, Tensor]
    """The targets of the same batch, by name."""
    outputs: tuple[str, ...] = ("logits",)
    """Names for what the module returns, a tensor or a tuple of tensors; of a dict, names of the answers.

    Loss and metrics get the whole dict."""
    metrics: Mapping[str, MetricSum] = field(default_factory=lambda: {"correct": correct})
    """Sums to report beside the loss and the count of examples."""
    histograms: Mapping[str, Counting] = field(default_factory=dict)
    """What else is counted of the examples, by a name for each: how an operator notices that data changed."""
    count: MetricSum | None = None
    """What a batch counts for, as `examples`: over how much the loss is a mean (`token_count` for sequences).

    None counts each example as one."""
    trainable: Trainable = every_weight
    """Which weights are trained: a function of a parameter's name, `Head()`, `Named(...)` or `LoRA(...)`.

    Others are frozen and never travel back."""
    optimizer: Optimizer = field(default_factory=SGD)
    clip_examples: float | None = None
    """The largest norm of one example's gradient, for DP-SGD; None leaves gradients as they are.

    Costs a loop over the examples of a batch."""
    calibration: Examples | None = None
    """Real inputs and targets by name, on which graphs in fewer bits are judged; None takes the example batch."""
    labels: tuple[str, ...] = ()
    golden_tolerance: float = 1e-4
    """How far a device's answers to the golden examples may be off; see `Manifest.golden_tolerance`."""
    description: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Module):
            raise CannotCompile(f"{self.name!r}: the module is a {type(self.module).__name__}; give a torch.nn.Module")
        for name, tensor in (*self.inputs.items(), *self.targets.items()):
            if not isinstance(tensor, Tensor):
                raise CannotCompile(f"{self.name!r}: {name!r} is a {type(tensor).__name__}; give a torch.Tensor")
        if not isinstance(self.trainable, (Head, LoRA)) and not callable(self.trainable):
            raise CannotCompile(f"{self.name!r}: trainable is {self.trainable!r}; give Head(), Named(...) or LoRA(...)")
        if not isinstance(self.optimizer, Optimizer):
            kind = f"{type(self.optimizer).__module__}.{type(self.optimizer).__name__}"
            raise CannotCompile(f"{self.name!r}: the optimizer is a {kind}; give one of umbel_models.optimizers")
        given = [*self.inputs, *self.targets]
        for names in ([*given, *self.outputs], [*given, "loss", *self.metrics, "examples"]):
            if "" in names or len(set(names)) != len(names):
                raise CannotCompile(f"{self.name!r}: of these names none may be empty or come twice: {names}")
        self._require_few_metrics()
        sizes = {name: tuple(tensor.shape[:1]) for name, tensor in (*self.inputs.items(), *self.targets.items())}
        if not self.inputs or len(set(sizes.values())) != 1 or () in sizes.values():
            raise CannotCompile(f"{self.name!r}: inputs and targets must share one batch dimension, found {sizes}")
        if self.example_count < 2:
            raise CannotCompile(f"{self.name!r}: the example batch needs two examples or more")
        if self.clip_examples is not None and not 0 < self.clip_examples < math.inf:
            raise CannotCompile(f"{self.name!r}: clip_examples is {self.clip_examples}; it must be a number above zero")

    @property
    def bins(self) -> tuple[str, ...]:
        """The metrics that hold the counts of `histograms`."""
        return tuple(one for name, how in self.histograms.items() for one in histogram_of(name, how).bins)

    def trains(self, name: str) -> bool:
        """Whether a parameter of the module is trained, by its name.

        Raises:
            CannotCompile: `umbel_models.adapters.resolved` has yet to work out what was chosen.
        """
        if isinstance(self.trainable, (Head, LoRA)):
            raise CannotCompile(f"{self.name!r}: {self.trainable} has to be worked out first, by adapters.resolved")
        return self.trainable(name)

    def _require_few_metrics(self) -> None:
        if odd := [name for name in self.metrics if is_bin(name)]:
            raise CannotCompile(f"{self.name!r}: metric {odd[0]!r} is named like the bin of a histogram; rename it")
        if len(self.bins) + len(self.metrics) > _MOST_METRICS:
            raise CannotCompile(
                f"{self.name!r}: {len(self.metrics)} metrics and {len(self.bins)} bins of histograms; a report holds "
                f"{_MOST_METRICS}: count fewer, or in fewer bins"
            )

    @property
    def example_count(self) -> int:
        """How many examples the batch holds."""
        return int(next(iter(self.inputs.values())).shape[0])

    def batch(self, size: int, start: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs and targets of `size` examples, taken round and round from the example batch."""
        rows = torch.arange(start, start + size) % self.example_count
        pick = {name: tensor[rows] for name, tensor in self.inputs.items()}
        return pick, {name: tensor[rows] for name, tensor in self.targets.items()}

    def answers(self, output: Any) -> tuple[Any, ...]:
        """What a module returned, as one tensor for each of `outputs`; of a dict those under these names.

        Raises:
            CannotCompile: the dict has no such names.
        """
        if not isinstance(output, Mapping):
            return tuple(output) if isinstance(output, (tuple, list)) else (output,)
        missing = [name for name in self.outputs if name not in output]
        if missing:
            raise CannotCompile(
                f"{self.name!r}: the module returns a dict of {', '.join(map(str, output))}, without "
                f"{', '.join(missing)}; name those of them in `outputs` that are answers"
            )
        return tuple(output[name] for name in self.outputs)
