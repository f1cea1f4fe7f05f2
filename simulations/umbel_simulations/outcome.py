"""What a run was: the same value from every engine, equal bit for bit when the run is told again.

What depends on the machine (`Cost`) stands beside it and isn't part of its digest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from umbel.digests import Digest, digest_of
from umbel.errors import MalformedMessage
from umbel_server.json_text import to_text

_FORM: Final = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, defer_build=True)

Counts = dict[str, int]


@with_config(_FORM)
@dataclass(frozen=True, slots=True)
class RoundOutcome:
    """One round, or one step of an algorithm that has no rounds."""

    number: int
    verdict: str
    """accepted, refused, or abandoned."""
    opened_hour: float
    closed_hour: float
    """Virtual hours since the run began; the engines without virtual time count seconds of training."""
    invited: int
    reported: int
    """Reports that were counted."""
    accuracy: float | None = None
    """Share of right answers of this round's result on the federation's held-back examples; None: not measured."""
    loss: float | None = None
    train_loss: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    epsilon: float = 0.0
    """Spent so far."""
    reason: str = ""
    """Why it was refused or abandoned."""


@with_config(_FORM)
@dataclass(frozen=True, slots=True)
class HourOutcome:
    """One hour of the fleet's day."""

    hour: int
    available: int
    """Devices that were free at its beginning."""
    check_ins: int
    sessions: int
    """Check-ins that got something to do."""
    reports: int


@with_config(_FORM)
@dataclass(frozen=True, slots=True)
class Spread:
    """How a quantity is spread over devices."""

    count: int
    mean: float
    least: float
    p05: float
    median: float
    p95: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """The spread of some finite numbers; None of none."""
        numbers = np.sort(np.fromiter(values, np.float64))
        if not len(numbers):
            return None
        p05, median, p95 = (float(np.quantile(numbers, share)) for share in (0.05, 0.5, 0.95))
        return cls(len(numbers), float(np.mean(numbers)), float(numbers[0]), p05, median, p95, float(numbers[-1]))


def mean_of(metrics: Mapping[str, float], what: str) -> float | None:
    """A metric's mean over the examples; None where it wasn't measured, and where it is no number any more."""
    count = metrics.get("examples", 0.0)
    found = metrics[what] / count if count and what in metrics else math.nan
    return found if math.isfinite(found) else None


@with_config(_FORM)
@dataclass(frozen=True, slots=True)
class RolloutEvent:
    """Something that happened to a rollout."""

    hour: float
    what: str


@with_config(_FORM)
@dataclass(frozen=True, slots=True)
class RolloutOutcome:
    """How a release fared."""

    release: int
    content: str
    """As in the scenario: trained, noisy, unloadable, slow."""
    ending: str
    """completed, rolled-back, paused, running; not-begun: the run's hours were over before."""
    started_hour: float | None
    ended_hour: float | None
    devices_reached: int
    """Devices that ever switched to it, on trial or for good."""
    devices_left: int
    """Devices that still had it when the run ended."""
    cleared_hour: float | None = None
    """For one that was rolled back: when the last device had left it."""
    events: tuple[RolloutEvent, ...] = ()


@with_config(_FORM)
@dataclass(frozen=True, slots=True)
class Alarm:
    """A time at which the sums of rounds began to look unlike the first ones, by the product's test."""

    what: str
    """A histogram of the model, "loss per example" or "right answers"."""
    round: int
    """After which it was seen."""
    hour: float
    p_value: float


@with_config(_FORM)
@dataclass(frozen=True, slots=True)
class DriftOutcome:
    """Whether data seemed to change."""

    looks: int = 0
    """After how many rounds the newest ones were held against the first."""
    alarms: tuple[Alarm, ...] = ()


@with_config(_FORM)
@dataclass(frozen=True, slots=True)
class Outcome:
    """All that a run showed."""

    scenario: dict[str, Any]
    """The scenario as `to_tree` writes it."""
    engine: str
    seed: int
    hours: float
    """Virtual hours that passed."""
    rounds: tuple[RoundOutcome, ...]
    weights: str
    """Digest of the last version's weights."""
    accuracy: float | None
    """Of the last version, over all held-back examples of the federation."""
    loss: float | None = None
    first_accuracy: float | None = None
    """Of the version that it began with."""
    per_device: dict[str, Spread] = field(default_factory=dict)
    """By quantity: accuracy, personal_accuracy, seconds, bytes_up, bytes_down, joules, sessions."""
    devices: int = 0
    sessions: int = 0
    """Check-ins that got something to do."""
    trained: int = 0
    """Sessions that began to train, of rounds that are over."""
    wasted: int = 0
    """Of these, those of which nothing counts: interrupted, late, refused, lost, or in a round that came to nothing."""
    dropped: int = 0
    """Sessions in which the device was taken away."""
    shapes: Counts = field(default_factory=dict)
    """Sessions that have ended, by the string of their events, as the product writes it."""
    hourly: tuple[HourOutcome, ...] = ()
    rollouts: tuple[RolloutOutcome, ...] = ()
    drift: DriftOutcome = DriftOutcome()
    faults: Counts = field(default_factory=dict)
    """What was done to the fleet, by kind."""
    refusals: Counts = field(default_factory=dict)
    """What the product refused, by the error's code."""
    epsilon: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    invariants: tuple[str, ...] = ()
    """What was checked at the end and held."""

    @property
    def wasted_share(self) -> float | None:
        """Sessions that trained for nothing, as a share of those that trained; None where no engine counts them."""
        return self.wasted / self.trained if self.trained and self.engine == "fleet" else None

    @property
    def dropped_share(self) -> float | None:
        """Sessions in which the device was taken away, as a share of all; None where none can be."""
        return self.dropped / self.sessions if self.sessions and self.engine == "fleet" else None

    def canonical(self) -> str:
        """The same text, byte for byte, for the same run."""
        return to_text(_OUTCOMES.dump_python(self, mode="json"))

    def digest(self) -> Digest:
        """What two equal runs have in common."""
        return digest_of(self.canonical().encode())


@with_config(_FORM)
@dataclass(frozen=True, slots=True)
class Cost:
    """What a run took of this machine; differs from time to time."""

    seconds: float
    start_seconds: float
    """Until the first round could begin."""
    workers: int
    peak_megabytes: float


_OUTCOMES: TypeAdapter[Outcome] = TypeAdapter(Outcome)
_COSTS: TypeAdapter[Cost] = TypeAdapter(Cost)


def to_json(outcome: Outcome, cost: Cost | None = None) -> str:
    """The report's JSON: the outcome, its digest, and what it cost."""
    tree = {
        "outcome": _OUTCOMES.dump_python(outcome, mode="json"),
        "digest": str(outcome.digest()),
        "cost": None if cost is None else _COSTS.dump_python(cost, mode="json"),
    }
    return to_text(tree)


def from_json(text: str | bytes) -> tuple[Outcome, Cost | None]:
    """Undo `to_json`.

    Raises:
        MalformedMessage: not a report, or one whose digest isn't its own.
    """
    try:
        report = _REPORTS.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise MalformedMessage(f"not a simulation's report: {place or 'the whole'}: {first['msg']}") from error
    if str(report.outcome.digest()) != report.digest:
        raise MalformedMessage("the report was changed after it was written: its digest isn't its own")
    return report.outcome, report.cost


@with_config(_FORM)
@dataclass(frozen=True, slots=True)
class _Report:
    outcome: Outcome
    digest: str
    cost: Cost | None = None


_REPORTS: TypeAdapter[_Report] = TypeAdapter(_Report)
