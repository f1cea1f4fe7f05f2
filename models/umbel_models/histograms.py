"""What a model counts beside its metrics: into which bins numbers fall that its author chose, of each example.

A device's examples are never seen, and neither is what they look like. What a cohort's look like together can be: each
device counts, the counts add, and the sum over a cohort can be compared from round to round. The counting
is part of the `evaluate` graph, so every runtime does it, and the edges are the same for all versions of a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from umbel.errors import BundleInvalid, CannotCompile
from umbel.histograms import Histogram

Named = Mapping[str, Tensor]
Value = Callable[[Named, Named, Named], Tensor]
"""(inputs, answers, targets, each by name, batch first) -> a number for each example [N], or several [N, ...]."""


@dataclass(frozen=True, slots=True)
class Counting:
    """A number of each example, and the edges between which it is counted.

    Of several numbers of an example each counts for its share, so that an example always counts as one.
    """

    value: Value
    edges: Sequence[float]
    """Ascending; below, between and above them lies one bin more than there are edges. See `edges_of`."""

    def __post_init__(self) -> None:
        if isinstance(self.edges, str) or not all(isinstance(edge, (int, float)) for edge in self.edges):
            raise CannotCompile(f"the edges of a histogram are {self.edges!r}; give numbers")
        object.__setattr__(self, "edges", tuple(torch.tensor(self.edges, dtype=torch.float32).tolist()))
        if not self.edges or not all(map(math.isfinite, self.edges)):
            raise CannotCompile(f"a histogram needs one edge or more, all finite; its edges are {self.edges}")
        if any(low >= high for low, high in pairwise(self.edges)):
            raise CannotCompile(f"the edges of a histogram must ascend, as float32; these don't: {self.edges}")

    def values(self, inputs: Named, answers: Named, targets: Named) -> Tensor:
        """The numbers, by example; [N, M], float32.

        Raises:
            CannotCompile: there isn't a row for each example.
        """
        found = self.value(inputs, answers, targets)
        count = next(iter(inputs.values())).shape[0]
        if not isinstance(found, Tensor) or not found.dim() or found.shape[0] != count or not found[0].numel():
            what = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise CannotCompile(f"its value is {what}; give a tensor with a number, or several, for each example")
        return found.to(torch.float32).flatten(1) if found.dim() > 1 else found.to(torch.float32).unsqueeze(1)

    def counts(self, values: Tensor) -> Tensor:
        """How many examples lie in each bin, from the lowest values up; [N, M] -> [bins]."""
        # Edges first: sums then run along memory.
        above = (values.reshape(1, -1) > torch.tensor(self.edges).unsqueeze(1)).to(torch.float32).sum(1)
        # Not the rest, which would take what is no number for small.
        lowest = (values <= self.edges[0]).to(torch.float32).sum().reshape(1)
        # Differences of whole numbers: exact, so that a count is never a little less than nothing.
        return torch.cat([lowest, above[:-1] - above[1:], above[-1:]]) / values.shape[1]


Countings = Mapping[str, Counting]


def histogram_of(name: str, counting: Counting, of_answers: bool = False) -> Histogram:
    """What stands in the manifest; raises `CannotCompile` for a name that can't stand there."""
    try:
        return Histogram(name, tuple(counting.edges), of_answers)
    except BundleInvalid as error:
        raise CannotCompile(str(error)) from error


def bins_of(countings: Countings, inputs: Named, answers: Named, targets: Named) -> dict[str, Tensor]:
    """The counts of a batch, a scalar for each bin, by the names of the metrics."""
    found: dict[str, Tensor] = {}
    for name, counting in countings.items():
        counts = counting.counts(counting.values(inputs, answers, targets))
        found |= dict(zip(histogram_of(name, counting).bins, counts.unbind(), strict=True))
    return found


class Asked(Mapping[str, Tensor]):
    """Tensors by name that note whether anybody wanted one."""

    def __init__(self, tensors: Named) -> None:
        self._tensors = tensors
        self.any = False

    def __getitem__(self, name: str) -> Tensor:
        self.any = True
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def feature(name: str, place: int, edges: Sequence[float]) -> Counting:
    """Of the input `name`, the numbers at `place` behind the batch: a column of a table, a channel of a recording."""
    return Counting(lambda inputs, answers, targets: inputs[name].select(1, place), edges)


def label(name: str, classes: int) -> Counting:
    """How often each class is the target `name`, of [N] or, for sequences, [N, T].

    What lies below 0 marks that there is nothing to learn (torch's `ignore_index`), and no class.
    """

    def classes_of(inputs: Named, answers: Named, targets: Named) -> Tensor:
        target = targets[name].to(torch.float32)
        return torch.where(target < 0, math.nan, target)

    return Counting(classes_of, _between(classes))


def predicted(name: str, classes: int) -> Counting:
    """How often each class has the largest score of the answer `name`, of [N, classes] or [N, ..., classes]."""
    return Counting(lambda inputs, answers, targets: answers[name].argmax(-1), _between(classes))


def confidence(name: str, bins: int = 10) -> Counting:
    """How sure the model is: the largest probability that the scores `name` [N, ..., classes] come to."""
    edges = [place / bins for place in range(1, bins)]
    return Counting(lambda inputs, answers, targets: answers[name].softmax(-1).amax(-1), edges)


def error(answer: str, target: str, edges: Sequence[float]) -> Counting:
    """How far an answer is above (or, below zero, under) its target, both of one shape."""
    return Counting(
        lambda inputs, answers, targets: answers[answer] - targets[target].reshape(answers[answer].shape), edges
    )


def edges_of(values: Tensor | Sequence[float], bins: int = 16) -> tuple[float, ...]:
    """Edges between which about equally many of some typical values lie; fewer where many values are the same.

    Raises:
        CannotCompile: no values, or all the same: there is nothing to tell apart.
    """
    known = torch.as_tensor(values, dtype=torch.float32).flatten()
    known = known[torch.isfinite(known)]
    if bins < 2 or not known.numel() or known.min() == known.max():
        raise CannotCompile(f"no edges for {bins} bins of values that are all the same, or none")
    # `torch.quantile` ends at 16 million values.
    ranks = (torch.arange(1, bins) * known.numel()) // bins
    cuts = sorted({*known.sort().values[ranks].tolist()} - {float(known.max())})
    return tuple(cuts) or (float(known.min()),)


def _between(classes: int) -> list[float]:
    if classes < 2:
        raise CannotCompile(f"a histogram of {classes} classes; give two or more")
    return [place + 0.5 for place in range(classes - 1)]
