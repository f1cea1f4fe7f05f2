"""Which of Flower's strategies can be asked for, with which arguments; knows Flower's names but doesn't load it.

Loading flwr costs a second and tens of megabytes, so that whoever only writes a task down goes without. A test holds
this catalogue against the signatures of the installed flwr.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from umbel.errors import BadInput, OutOfBounds

Value = float | int | bool | str


@dataclass(frozen=True, slots=True)
class StrategySpec:
    """A strategy by Flower's name, with the arguments that differ from their defaults."""

    name: str = "FedAvg"
    arguments: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a strategy: a number within bounds."""

    default: float | int | None
    """`None`: it must be given. An integer default asks for an integer."""
    least: float
    most: float
    meaning: str
    strictly_above: bool = False
    """Whether `least` itself is excluded."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One strategy of the catalogue."""

    summary: str
    paper: str
    arguments: Mapping[str, Argument]
    state: tuple[str, ...] = ()
    """The attributes of Flower's object that outlive a round."""
    robust: bool = False
    """Whether it looks at single updates; the others are content with the mean."""


_BIG: Final = 1e6
_ETA: Final = Argument(0.1, 0.0, _BIG, "server learning rate", strictly_above=True)
_TAU: Final = Argument(1e-3, 0.0, _BIG, "how far the step adapts; added to the root of the second moment", True)
_ETA_L: Final = Argument(0.1, 0.0, _BIG, "client learning rate; Flower keeps it but doesn't use it", True)
_BETA_1: Final = Argument(0.9, 0.0, 0.999999, "decay of the first moment")
_BETA_2: Final = Argument(0.99, 0.0, 0.999999, "decay of the second moment")
_ADAPTIVE: Final = {"eta": _ETA, "eta_l": _ETA_L, "tau": _TAU}
_MALICIOUS: Final = Argument(0, 0, 10_000, "how many devices of a cohort may lie")

CATALOGUE: Final[Mapping[str, Entry]] = {
    "FedAvg": Entry("the weighted mean of the devices' models", "arXiv:1602.05629", {}),
    "FedAvgM": Entry(
        "the mean step with server momentum",
        "arXiv:1909.06335",
        {
            "server_learning_rate": Argument(1.0, 0.0, _BIG, "scale of the server's step", strictly_above=True),
            "server_momentum": Argument(0.0, 0.0, 0.999999, "share of the last step that goes on"),
        },
        state=("momentum_vector",),
    ),
    "FedAdagrad": Entry(
        "Adagrad on the server, with the mean step as gradient", "arXiv:2003.00295", _ADAPTIVE, state=("m_t", "v_t")
    ),
    "FedAdam": Entry(
        "Adam on the server, with the mean step as gradient",
        "arXiv:2003.00295",
        _ADAPTIVE | {"beta_1": _BETA_1, "beta_2": _BETA_2},
        state=("m_t", "v_t"),
    ),
    "FedYogi": Entry(
        "Yogi on the server, with the mean step as gradient",
        "arXiv:2003.00295",
        _ADAPTIVE
        | {
            "eta": Argument(0.01, 0.0, _BIG, "server learning rate", strictly_above=True),
            "eta_l": Argument(0.0316, 0.0, _BIG, _ETA_L.meaning, strictly_above=True),
            "beta_1": _BETA_1,
            "beta_2": _BETA_2,
        },
        state=("m_t", "v_t"),
    ),
    "FedProx": Entry(
        "the mean, of devices that are held near the model they started from",
        "arXiv:1812.06127",
        {"proximal_mu": Argument(0.0, 0.0, _BIG, "weight of the proximal term; devices get it as `mu`")},
    ),
    "FedMedian": Entry("the median of each number", "arXiv:1803.01498", {}, robust=True),
    "FedTrimmedAvg": Entry(
        "the mean of each number without its extremes",
        "arXiv:1803.01498",
        {"beta": Argument(0.2, 0.0, 0.499999, "share cut off at each end")},
        robust=True,
    ),
    "Krum": Entry(
        "the one model that is nearest to its neighbours",
        "arXiv:1703.02757",
        {"num_malicious_nodes": _MALICIOUS},
        robust=True,
    ),
    "MultiKrum": Entry(
        "the mean of the models that are nearest to their neighbours",
        "arXiv:1703.02757",
        {
            "num_malicious_nodes": _MALICIOUS,
            "num_nodes_to_select": Argument(1, 1, 10_000, "how many models the mean is taken of"),
        },
        robust=True,
    ),
    "Bulyan": Entry(
        "Krum's choice, then the mean of the numbers nearest to the median",
        "arXiv:1802.07927",
        {"num_malicious_nodes": _MALICIOUS},
        robust=True,
    ),
    "QFedAvg": Entry(
        "more weight for devices with a higher loss",
        "arXiv:1905.10497",
        {
            "client_learning_rate": Argument(None, 0.0, _BIG, "the devices' learning rate", strictly_above=True),
            "q": Argument(0.1, 0.0, 100.0, "how much fairness counts; 0 is FedAvg without weights"),
        },
        robust=True,
    ),
}


def require_strategy(spec: StrategySpec, updates_private: bool) -> None:
    """Refuse, before any round, a strategy that can't be run.

    Raises:
        BadInput: an unknown name or argument, or a strategy that would have to see private updates.
        OutOfBounds: an argument that isn't a number within its bounds.
    """
    entry = _entry(spec)
    if entry.robust and updates_private:
        means = ", ".join(name for name, other in CATALOGUE.items() if not other.robust)
        raise BadInput(
            f"{spec.name} looks at single updates, and this task's are private; choose one of {means}, "
            "or say openly that updates are not private"
        )
    for name in spec.arguments:
        if name not in entry.arguments:
            raise BadInput(f"{spec.name} has no argument {name!r}; it takes {_listed(entry)}")
    for name, argument in entry.arguments.items():
        _require_value(f"{name} of {spec.name}", spec.arguments.get(name, argument.default), argument)


def needs_singles(spec: StrategySpec) -> bool:
    """Whether the strategy looks at single updates."""
    return _entry(spec).robust


def least_reports(spec: StrategySpec) -> int:
    """The fewest reports for which the strategy keeps what its paper promises; a task's minimum may not be lower."""
    malicious = int(spec.arguments.get("num_malicious_nodes", 0))
    if spec.name == "Bulyan":
        return 4 * malicious + 3
    if spec.name in ("Krum", "MultiKrum"):
        return max(2 * malicious + 3, int(spec.arguments.get("num_nodes_to_select", 1)))
    return 1


def needed_metrics(spec: StrategySpec) -> frozenset[str]:
    """Metrics without which a report is of no use to the strategy; a round's report rules require them."""
    return frozenset({"train_loss", "train_examples"}) if spec.name == "QFedAvg" else frozenset()


def device_hyperparameters(spec: StrategySpec) -> dict[str, float]:
    """What the strategy asks of the devices: inputs of the training graph that a plan must carry."""
    if spec.name == "FedProx":
        return {"mu": float(spec.arguments.get("proximal_mu", 0.0))}
    return {}


def _entry(spec: StrategySpec) -> Entry:
    if spec.name not in CATALOGUE:
        known = "; ".join(f"{name} ({_listed(entry)})" for name, entry in CATALOGUE.items())
        raise BadInput(f"no strategy is called {spec.name!r}; known are {known}")
    return CATALOGUE[spec.name]


def _listed(entry: Entry) -> str:
    return ", ".join(entry.arguments) or "no arguments"


def _require_value(what: str, value: Value | None, argument: Argument) -> None:
    if value is None:
        raise OutOfBounds(f"{what} must be given: {argument.meaning}")
    if isinstance(value, bool | str) or not math.isfinite(value):
        raise OutOfBounds(f"{what} is {value!r}; it must be a number")
    if isinstance(argument.default, int) and value != int(value):
        raise OutOfBounds(f"{what} is {value}; it must be a whole number")
    if not argument.least <= value <= argument.most or (argument.strictly_above and value == argument.least):
        bound = "above" if argument.strictly_above else "at least"
        raise OutOfBounds(f"{what} is {value}; it must be {bound} {argument.least:g} and at most {argument.most:g}")
