"""What a person decides about a rollout: the release, the waves, the conditions between them.

An approval covers exactly this (`RolloutSpec.subject`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import partial
from typing import Any, Final, NamedTuple

from umbel import fields as checks
from umbel.clock import DAY
from umbel.digests import Digest, digest_of
from umbel.errors import MalformedMessage, OutOfBounds
from umbel_server.gates import GatePolicy
from umbel_server.json_text import like, texts, to_text

LADDER: Final = (1.0, 5.0, 25.0, 100.0)
EVERYBODY: Final = ""
"""In place of a population: all of a channel's."""


class Audience(NamedTuple):
    """Whom a release is for: the devices of a population that follow a channel of a model."""

    model: str
    channel: str
    population: str = EVERYBODY

    def __str__(self) -> str:
        """As in messages."""
        whose = f" of population {self.population!r}" if self.population != EVERYBODY else ""
        return f"channel {self.channel!r}{whose}"


class Promotion(Enum):
    """Who opens the next wave once a gate has passed."""

    AUTOMATIC = "automatic"
    MANUAL = "manual"


class OnFailure(Enum):
    """What a failed gate does."""

    ROLL_BACK = "roll-back"
    PAUSE = "pause"


@dataclass(frozen=True, slots=True)
class Wave:
    """One step: so many per cent of the population, together with all the waves before it."""

    percent: float
    soak_seconds: float = 3600.0
    """Time that must pass before its gate may pass."""
    deadline_seconds: float = 7 * DAY
    """Time after which a gate that still can't tell pauses the rollout."""
    promotion: Promotion = Promotion.AUTOMATIC
    lab: bool = False
    """Take the spec's trusted lab devices and nobody else; `percent` is 0."""

    def __post_init__(self) -> None:
        if self.lab != (self.percent == 0) or not 0 <= self.percent <= 100:
            raise OutOfBounds(f"a wave of {self.percent} per cent; it must lie above 0 and at most at 100")
        if not 0 <= self.soak_seconds <= self.deadline_seconds < float("inf"):
            raise OutOfBounds("a wave's soak time must lie between 0 and its deadline")


def ladder(**settings: Any) -> tuple[Wave, ...]:
    """The usual waves: 1, 5, 25 and 100 per cent."""
    return tuple(Wave(percent, **settings) for percent in LADDER)


@dataclass(frozen=True, slots=True)
class ExperimentArm:
    """One side of an experiment: a release, and its share of the devices relative to the other arms'."""

    release: int
    weight: float


@dataclass(frozen=True, slots=True)
class RolloutSpec:
    """All that a person decides about a rollout, and that an approval covers."""

    model: str
    channel: str
    population: str
    release: int
    """The release to move to, already signed."""
    from_release: int = 0
    """What devices have now; 0: nothing."""
    revert_release: int = 0
    """A higher release with the old content, signed beforehand; 0: rolling back needs a signature first."""
    waves: tuple[Wave, ...] = field(default_factory=ladder)
    gate: GatePolicy = field(default_factory=GatePolicy)
    on_failure: OnFailure = OnFailure.ROLL_BACK
    hold_back_percent: float = 0.0
    """Devices that get nothing from this rollout, nor from the channel once it has succeeded, to compare with."""
    hold_back_salt: str = ""
    lab: tuple[str, ...] = ()
    """Ids of trusted devices that a lab wave takes."""
    only: tuple[str, ...] = ()
    """Ids of a group; empty: the whole population."""
    start_at: float = 0.0
    """POSIX seconds before which it doesn't start by itself."""
    arms: tuple[ExperimentArm, ...] = ()
    """For an experiment: two or more, `release` the newest of them; it ends when a person promotes that one."""

    def __post_init__(self) -> None:
        checks.name(self.model, "model")
        checks.name(self.channel, "channel")
        checks.name(self.population, "population")
        checks.text(self.hold_back_salt, "hold_back_salt")
        for device in (*self.lab, *self.only):
            checks.text(device, "device")
        if not self.waves:
            raise OutOfBounds("a rollout needs at least one wave")
        shares = [wave.percent for wave in self.waves]
        if sorted(set(shares)) != shares or shares[-1] == 0:
            raise OutOfBounds("each wave must take more of the population than the one before it")
        if any(wave.lab for wave in self.waves) and not self.lab:
            raise OutOfBounds("a lab wave needs the ids of the lab's devices")
        if self.release <= self.from_release or (self.revert_release and self.revert_release <= self.release):
            raise OutOfBounds("numbers must rise: from what devices have, to the release, to the one to go back with")
        if not 0 <= self.hold_back_percent < 100:
            raise OutOfBounds("hold_back_percent must lie between 0 and 100")
        if self.arms:
            self._require_arms()

    def _require_arms(self) -> None:
        if len(self.arms) < 2 or not all(0 < arm.weight < float("inf") for arm in self.arms):
            raise OutOfBounds("an experiment needs at least two arms with weights above 0")
        releases = [arm.release for arm in self.arms]
        if len(set(releases)) < len(releases) or min(releases) <= self.from_release or max(releases) != self.release:
            raise OutOfBounds(
                "an experiment's arms must be releases of their own, newer than what devices have, and the newest of "
                "them must be `release`: devices only ever move to higher numbers"
            )

    @property
    def audience(self) -> Audience:
        """Whose devices it moves."""
        return Audience(self.model, self.channel, self.population)

    @property
    def takes_everybody(self) -> bool:
        """Whether its last wave takes the whole population, but for who is held back."""
        return self.waves[-1].percent == 100 and not self.only

    @property
    def subject(self) -> Digest:
        """What an approval is bound to: the digest of all of this."""
        return digest_of(to_text(spec_to_tree(self)).encode())


# As JSON, for the store and for operators.


def spec_to_tree(spec: RolloutSpec) -> dict[str, Any]:
    """A spec as plain JSON values."""
    tree = asdict(spec)
    tree["on_failure"] = spec.on_failure.value
    tree["waves"] = [asdict(wave) | {"promotion": wave.promotion.value} for wave in spec.waves]
    return tree


def spec_from_tree(tree: Mapping[str, Any]) -> RolloutSpec:
    """Undo `spec_to_tree`; what is absent keeps its default.

    Raises:
        MalformedMessage: unknown or ill-typed fields.
        OutOfBounds: values that make no sense.
    """
    try:
        values = dict(tree)
        _convert(values, "waves", lambda waves: tuple(_wave(wave) for wave in waves))
        _convert(values, "gate", lambda gate: GatePolicy(**like(GatePolicy, gate, "a gate")))
        _convert(values, "on_failure", OnFailure)
        _convert(
            values, "arms", lambda arms: tuple(ExperimentArm(**like(ExperimentArm, arm, "an arm")) for arm in arms)
        )
        _convert(values, "lab", partial(texts, "lab"))
        _convert(values, "only", partial(texts, "only"))
        return RolloutSpec(**like(RolloutSpec, values, "a rollout's spec"))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise MalformedMessage(f"not a rollout's spec: {error}") from error


def _wave(tree: Mapping[str, Any]) -> Wave:
    values = like(Wave, tree, "a wave")
    _convert(values, "promotion", Promotion)
    return Wave(**values)


def _convert(values: dict[str, Any], name: str, conversion: Any) -> None:
    if name in values:
        values[name] = conversion(values[name])
