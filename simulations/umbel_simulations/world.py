"""The world that a scenario puts a server into: who the devices are, what goes wrong, who lies.

Parts of `umbel_simulations.scenario.Scenario`. The defaults are those of published fleets: a day/night swing of four,
speeds over two decades, a session in twelve lost (Bonawitz et al. 2019, arXiv:1902.01046; FLINT, arXiv:2302.12862).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from pydantic import Field, with_config

from umbel.errors import BadInput, OutOfBounds
from umbel_server.gates import GatePolicy
from umbel_server.rollout_spec import Wave
from umbel_simulations.parts import STRICT, Decades, NotNegative, Positive, Share


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Population:
    """Who the devices are: when they are free, how fast they are, what joins them to the server."""

    devices: Annotated[int, Field(ge=1, le=10_000_000)] = 100
    """How many there are; they get the users of the data in turn."""
    availability: Literal["always", "diurnal", "trace"] = "diurnal"
    """When a device is idle, charging and on an unmetered network."""
    trace: str = ""
    """For "trace": a file in FedScale's format, from the scenario's own folder; its second 0 is the run's first."""
    mean_availability: Share = 0.25
    """For "diurnal": share of a day in which a device is free."""
    day_night_swing: Annotated[float, Field(ge=1)] = 4.0
    """For "diurnal": free devices at the best hour, as a multiple of those at the worst."""
    time_zones: tuple[float, ...] = (0.0,)
    """Hours ahead of UTC: 2 is UTC+2, -8 is UTC-8. Devices are spread over them evenly."""
    examples_per_second: Positive = 200.0
    """Median speed of training."""
    speed_decades: Decades = 2.0
    """Powers of ten between the slowest and the fastest 2.5 per cent (log-normal)."""
    megabits_down: Positive = 20.0
    """Median bandwidth towards a device, in Mbit/s."""
    megabits_up: Positive = 5.0
    """Median bandwidth from a device, in Mbit/s."""
    network_decades: Decades = 1.0
    """As `speed_decades`, for bandwidth."""
    latency_seconds: NotNegative = 0.05
    """Median time of a message there and back."""
    drop_out: Share = 0.08
    """Share of the sessions in which a device is taken away before it has reported."""
    check_in_hours: Annotated[float, Field(ge=0.001)] = 1.0
    """How often a free device looks in, unless it was told when to come back."""
    wrong_clocks: Share = 0.0
    """Share of devices whose clock is wrong."""
    clock_error_hours: Annotated[float, Field(ge=0, le=1_000_000)] = 24.0
    """How wrong, at most, either way."""
    watts: NotNegative = 2.0
    """Power drawn by training, for the estimate of energy."""
    joules_per_megabyte_up: NotNegative = 10.0
    """Energy of sending, for the estimate."""
    joules_per_megabyte_down: NotNegative = 5.0
    """Energy of receiving, for the estimate."""

    def __post_init__(self) -> None:
        if (self.availability == "trace") != bool(self.trace):
            raise BadInput('population: availability = "trace" and a trace file go together')
        most = (self.day_night_swing + 1) / (2 * self.day_night_swing)
        if self.availability == "diurnal" and self.mean_availability > most:
            raise OutOfBounds(
                f"population: mean_availability is {self.mean_availability:g}, and with a day_night_swing of "
                f"{self.day_night_swing:g} at most {most:g} can be, when all are free at the best hour; lower either"
            )
        if not self.time_zones or any(not -12 <= zone <= 14 for zone in self.time_zones):
            raise OutOfBounds("population: time_zones must name at least one zone, each between -12 and 14 hours")


Process = Literal["device", "leader", "helper", "coordinator"]


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Crash:
    """A process that is killed and started again from what it has on disk."""

    process: Process
    """What is killed; the leader is the coordinator while it combines a sum. Only private rounds have a helper."""
    times: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    """How often; for devices: over the whole population."""
    from_hour: NotNegative = 0.0
    """When the first may come."""
    until_hour: NotNegative = 0.0
    """Crashes are spread by chance over this time; 0: until the end."""
    down_seconds: NotNegative = 5.0
    """How long it stays away."""

    def __post_init__(self) -> None:
        if 0 < self.until_hour < self.from_hour:
            raise OutOfBounds(f"faults: crashes can't come from hour {self.from_hour} until hour {self.until_hour}")


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Outage:
    """A time in which something can't be reached."""

    process: Literal["helper", "coordinator"]
    """What can't be reached. Only private rounds have a helper."""
    from_hour: NotNegative
    """When it begins."""
    until_hour: NotNegative
    """When it is back."""

    def __post_init__(self) -> None:
        if self.until_hour <= self.from_hour:
            raise OutOfBounds(f"faults: an outage must end after it began: {self.from_hour} to {self.until_hour}")


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong. Rates are per message between a device and the server."""

    loss: Share = 0.0
    """Share of the messages that are lost."""
    duplicate: Share = 0.0
    """Share of the calls that come twice; answers and downloads never do."""
    reorder: Share = 0.0
    """Share that is overtaken by later ones."""
    delay: Share = 0.0
    """Share that comes late."""
    delay_seconds: NotNegative = 30.0
    """How late, on the average (exponential)."""
    crashes: tuple[Crash, ...] = ()
    """Processes that are killed."""
    outages: tuple[Outage, ...] = ()
    """Times in which something is away."""


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Adversary:
    """Devices that don't do as they should."""

    kind: Literal["sign-flip", "scaling", "label-flip", "lazy", "nan", "replay"]
    """What they do."""
    share: Share
    """Share of the population."""
    factor: Positive = 10.0
    """For "scaling": what the update is multiplied by."""


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Shift:
    """A change in what devices see, for good."""

    at_hour: NotNegative
    """When it comes."""
    share: Share = 1.0
    """Share of the population that it comes to; who, is drawn for each shift by itself."""
    kind: Literal["inputs", "answers"] = "inputs"
    """Inputs move (data drift), or the same inputs have the opposite answers (concept drift)."""
    by: Annotated[float, Field(ge=-1000, le=1000)] = 1.0
    """For "inputs": what is added to each number, in standard deviations of that number over all users."""


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class WaveStep:
    """One step of a rollout."""

    percent: Positive
    """Share of the population, with the waves before it."""
    soak_hours: NotNegative = 1.0
    """Time that must pass before the gate may pass."""
    deadline_hours: Positive = 48.0
    """Time after which a gate that can't tell pauses the rollout."""

    def __post_init__(self) -> None:
        self.wave()

    def wave(self) -> Wave:
        """The step as the product takes it; raises `OutOfBounds` for one that it refuses."""
        try:
            return Wave(self.percent, self.soak_hours * 3600.0, self.deadline_hours * 3600.0)
        except OutOfBounds as error:
            raise OutOfBounds(f"rollouts: {error}") from error


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """A release that moves through the population in waves."""

    at_hour: NotNegative
    """When it begins."""
    content: Literal["trained", "noisy", "unloadable", "slow"] = "trained"
    """The newest accepted version, or a broken one: weights with noise, a graph that doesn't load, a slow one."""
    noise: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """For "noisy": standard deviation of what is added to each weight, as a multiple of the weights' own."""
    waves: tuple[WaveStep, ...] = (WaveStep(1.0), WaveStep(5.0), WaveStep(25.0), WaveStep(100.0))
    """Its steps."""
    gate: dict[str, float | int] | None = None
    """Settings of the gate that differ from its defaults, by name; see docs/reference/rollouts.md."""
    on_failure: Literal["roll-back", "pause"] = "roll-back"
    """What a failed gate does."""

    def __post_init__(self) -> None:
        shares = [wave.percent for wave in self.waves]
        if not shares or shares != sorted(set(shares)):
            raise OutOfBounds("rollouts: waves must rise, and there must be one")
        self.gate_policy()

    def gate_policy(self) -> GatePolicy:
        """The gate between the waves.

        Raises:
            BadInput: a setting that a gate doesn't have.
            OutOfBounds: a value that makes no sense.
        """
        chosen = self.gate or {}
        known = [entry.name for entry in fields(GatePolicy)]
        for name in chosen:
            if name not in known:
                raise BadInput(f"rollouts: a gate has no setting {name!r}; it has {', '.join(known)}")
        return GatePolicy(**chosen)  # type: ignore[arg-type]


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Switches:
    """Settings of the server that a scenario may turn off, to see what each contributes."""

    pace_steering: bool = True
    """Whether devices are told when to come back by how many are wanted."""
    adaptive_deadline: bool = True
    """Whether a round's deadline follows how long devices really take."""
    abort_before_upload: bool = True
    """Whether a device asks before it sends a report for a round that is over."""
