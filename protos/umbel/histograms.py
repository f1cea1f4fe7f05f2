"""Histograms that add: where the values of a fleet's examples lie, told by metrics and by nothing else.

A histogram is so many metrics of a model, `age[0]`, `age[1]`, …, each the number of examples whose value lies in one
bin. Being sums, they travel, add and are hidden in a cohort like the loss is, and a device needs no code for them: the
model's `evaluate` graph counts. The edges stand in the manifest, so that all versions of a model count alike and their
sums can be compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from umbel.errors import BundleInvalid
from umbel.fields import is_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BIN: Final = re.compile(r"(.*)\[\d+\]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Histogram:
    """What is counted, and between which edges; raises `BundleInvalid` for what can't be."""

    name: str
    edges: tuple[float, ...]
    """Ascending. Bin 0 holds values up to `edges[0]`, bin i those above `edges[i - 1]` and up to `edges[i]`, the last
    one what is larger. What is no number lies in no bin."""
    of_answers: bool = False
    """Whether what is counted hangs on the model's answers: then it changes with each version, and tells of the data
    only between rounds of one."""

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise BundleInvalid(f"histogram {self.name[:80]!r} has no name of letters, digits, '.', '_' and '-'")
        if not self.edges or not all(map(math.isfinite, self.edges)):
            raise BundleInvalid(f"histogram {self.name!r} has edges {self.edges}; give one or more, all finite")
        if any(low >= high for low, high in pairwise(self.edges)):
            raise BundleInvalid(f"the edges of histogram {self.name!r} don't ascend: {self.edges}")

    @property
    def bins(self) -> tuple[str, ...]:
        """The metrics that hold its counts, from the lowest values up: one more than there are edges."""
        return tuple(f"{self.name}[{place}]" for place in range(len(self.edges) + 1))

    def counts(self, metrics: Mapping[str, float]) -> NDArray[np.float64]:
        """How many examples lie in each bin, of these metrics; 0 where one is missing. [bins]"""
        import numpy as np  # here, so that `umbel`, which shows metrics, starts without it

        return np.array([metrics.get(one, 0.0) for one in self.bins])


def is_bin(metric: str) -> bool:
    """Whether a metric is a histogram's, by its name."""
    return counted_in(metric) is not None


def counted_in(metric: str) -> str | None:
    """The histogram that a bin is of, by its name; None for other metrics."""
    found = _BIN.fullmatch(metric)
    return found[1] if found else None


def without_bins(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that a person reads one by one."""
    return {name: value for name, value in metrics.items() if not is_bin(name)}
