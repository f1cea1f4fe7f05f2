"""A scenario: everything that a simulation is told, as one frozen value; one TOML file.

`umbel_simulations.scenario_file.load` reads it; every engine is a function of it (`umbel_simulations.engines`).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, with_config

from umbel.bundle import MANIFEST_FILE
from umbel.errors import BadInput, NotFound, OutOfBounds
from umbel.plan import Plan
from umbel_server.flower.spec import StrategySpec
from umbel_server.privacy_settings import PrivacySettings
from umbel_server.task import Task
from umbel_server.validation import ValidationPolicy
from umbel_simulations.parts import STRICT, AtLeastOne, Count, Epochs, Name, NotNegative, Positive, Share
from umbel_simulations.world import Adversary, Faults, Population, RolloutPlan, Shift, Switches

EngineName = Literal["fleet", "cohort", "ray"]
FederationName = Literal["smartwatch", "shakespeare", "digits", "flights", "own"]


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Data:
    """Whose data the devices learn from, and how they are cut."""

    federation: FederationName
    """Which data set; "own" is yours, in `folder`."""
    partition: Literal["natural", "iid", "dirichlet", "by-label"] = "natural"
    """By the people in the data, or cut anew."""
    users: Count = 0
    """How many users to cut into, or to keep of the natural ones; 0: as many as there are (20 where data are cut)."""
    alpha: Positive = 0.5
    """For "dirichlet": small means that each user has few labels, and that some have much less (arXiv:1905.12022)."""
    labels_per_user: AtLeastOne = 2
    """For "by-label": how many labels each user has (arXiv:1602.05629)."""
    most_examples: Count = 0
    """Most training examples of one user; 0: no such limit."""
    folder: str = ""
    """For "own": a folder with a NumPy archive for each user, from the scenario's own folder."""

    def __post_init__(self) -> None:
        if self.federation == "digits" and self.partition == "natural":
            raise BadInput(
                'data: the digits have no natural users; choose partition = "dirichlet", "iid" or "by-label"'
            )
        if (self.federation == "own") != bool(self.folder):
            raise BadInput('data: federation = "own" and a folder of archives go together')


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class PlanPart:
    """What a device runs for a round."""

    epochs: Epochs = 1
    """How often each example is seen."""
    batch_size: Annotated[int, Field(ge=1, lt=2**31)] = 16
    """Examples in a step."""
    lr: NotNegative = 0.0
    """Learning rate; 0: the one that the bundle names."""
    momentum: Share | None = None
    """Momentum of the optimiser; left out: the one that the bundle names, if it has any."""
    mu: NotNegative = 0.0
    """Weight of FedProx's proximal term."""
    max_steps: Count = 0
    """Most steps of one device in a round; 0: no such limit."""
    max_examples: Count = 0
    """Most examples of one device in a round; 0: all."""
    clip_norm: NotNegative = 0.0
    """Largest norm of an update; private rounds need one."""
    max_weight: Positive = 10_000.0
    """Most that one device counts, in examples."""


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class StrategyPart:
    """How a cohort's updates become a step: one of Flower's strategies."""

    name: str = "FedAvg"
    """One of Flower's names."""
    arguments: dict[str, float | int] = field(default_factory=dict)
    """By name; see docs/reference/strategies.md."""


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class PrivacyPart:
    """Private rounds: coordinator and helper learn the sum of a cohort and nothing else."""

    on: bool = False
    """Whether rounds are private."""
    ring_bits: Literal[0, 16, 32] = 0
    """Width of the numbers that are summed; 0: by the model's size."""
    noise_multiplier: NotNegative = 0.0
    """The helper's noise; 0: none."""
    epsilon: NotNegative = 0.0
    """Budget of the whole task; 0: none."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    """The delta that epsilon goes with."""
    rounds_per_device: Count = 0
    """In how many rounds one device may be; 0: in all."""
    metric_bound: NotNegative = 0.0
    """Largest metric of one device; needed with noise."""


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class TaskPart:
    """What the population is asked to do."""

    rounds: AtLeastOne = 10
    """How many get as far as a verdict."""
    goal: AtLeastOne = 10
    """Reports wished for in a round."""
    minimum: AtLeastOne = 1
    """Fewest reports that make a round count."""
    over_selection: Annotated[float, Field(ge=1, le=100)] = 1.3
    """Sessions that may be open or reported, as a multiple of the goal."""
    deadline_seconds: Annotated[float, Field(ge=1)] = 600.0
    """From a round's opening to its last moment."""
    evaluate_candidates: bool = False
    """Whether a cohort measures each candidate before it becomes a version."""
    plan: PlanPart = field(default_factory=PlanPart)
    """What each device runs."""
    strategy: StrategyPart = field(default_factory=StrategyPart)
    """How updates become a step."""
    privacy: PrivacyPart = field(default_factory=PrivacyPart)
    """Whether and how sums are secret."""
    validation: dict[str, float | int] = field(default_factory=dict)
    """Bounds of the validation policy that differ from its defaults, by name; see docs/reference/umbel-cli.md."""


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Algorithm:
    """What the cohort engine does beyond the task's strategy."""

    kind: Literal["strategy", "scaffold", "fedbuff"] = "strategy"
    """Flower's strategy as the task names it; control variates (arXiv:1910.06378); a buffer (arXiv:2106.06639)."""
    backend: Literal["onnx", "torch"] = "onnx"
    """What trains: ONNX Runtime, or torch for a model that can't be lowered; `model` is "package.module:spec" then."""
    app: str = ""
    """A Flower ServerApp, "module:attribute", that runs the rounds in place of the task's strategy."""
    app_config: dict[str, bool | int | float | str] = field(default_factory=dict)
    """What it is run with: Flower's run_config."""
    server_lr: Positive = 1.0
    """For "scaffold" and "fedbuff": scale of the server's step."""
    buffer: AtLeastOne = 10
    """For "fedbuff": updates that make a step."""
    staleness: NotNegative = 0.5
    """For "fedbuff": an update that is s steps old counts (1 + s) to the power of minus this."""
    personalisation: Literal["none", "fine-tune", "head", "interpolate"] = "none"
    """What each user makes of the last version for itself."""
    personal_epochs: Epochs = 3
    """Epochs of personalisation."""
    personal_lr: NotNegative = 0.0
    """Learning rate of personalisation; 0: the plan's."""


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Thresholds:
    """What a run must show before a launch; what is left out isn't judged."""

    accuracy: Share | None = None
    """Least share of right answers of the last version on held-back examples."""
    fairness_floor: Share | None = None
    """Least share of right answers of the worst twentieth of the devices."""
    loss: float | None = None
    """Largest loss of the last version on held-back examples; for models that have no right answers, too."""
    wasted_sessions: Share | None = None
    """Most sessions that trained for nothing, as a share of those that began to train."""
    megabytes_per_device: Positive | None = None
    """Most megabytes, both ways, for nineteen devices in twenty."""
    seconds_per_device: Positive | None = None
    """Most seconds of work in the whole run, for nineteen devices in twenty."""
    epsilon: Positive | None = None
    """Most privacy spent."""
    roll_back_hours: Positive | None = None
    """Longest time from the start of a broken release to the last device that has left it."""
    exposed_devices: Share | None = None
    """Largest share of the population that a broken release may reach."""
    shift_noticed_hours: Positive | None = None
    """Longest time from the first shift of the data to the first alarm after it."""
    false_alarms: Count | None = None
    """Most alarms before any data had shifted."""
    accepted_rounds: AtLeastOne | None = None
    """Fewest rounds that made a version."""


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Scenario:
    """All that a simulation is told."""

    name: Name
    """What it is called; lower-case letters, digits, dots, dashes and underscores."""
    model: str
    """A bundle: a name of the zoo, or a folder, from the scenario's own."""
    data: Data
    """Whose data the devices learn from."""
    description: str = ""
    """What it shows, for people."""
    engine: EngineName = "fleet"
    """The whole product on virtual time, only the training, or only the training on Ray."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Where all chance comes from."""
    hours: Positive = 24.0
    """Most virtual time that passes; a fleet stops earlier when its task and its rollouts are done."""
    start_hour: Annotated[float, Field(ge=0, lt=24)] = 20.0
    """Hour of the day (UTC) at which it begins."""
    task: TaskPart = field(default_factory=TaskPart)
    """What the devices are asked to do."""
    population: Population = field(default_factory=Population)
    """Who the devices are."""
    server: Switches = field(default_factory=Switches)
    """What the server may do to waste less."""
    faults: Faults = field(default_factory=Faults)
    """What goes wrong."""
    adversaries: tuple[Adversary, ...] = ()
    """Who lies."""
    shifts: tuple[Shift, ...] = ()
    """How data change on the way."""
    rollouts: tuple[RolloutPlan, ...] = ()
    """Which releases move through the population."""
    algorithm: Algorithm = field(default_factory=Algorithm)
    """What the cohort engine does beyond a strategy."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    """What must hold before a launch."""

    def __post_init__(self) -> None:
        if math.fsum(adversary.share for adversary in self.adversaries) > 1:
            raise OutOfBounds("adversaries: their shares together are more than the whole population")
        left = devices = self.population.devices
        for place, adversary in enumerate(self.adversaries):
            left -= (whose := min(round(adversary.share * devices), left))
            if adversary.share and not whose:
                raise OutOfBounds(
                    f"adversaries.{place}: a share of {adversary.share:g} of {devices} devices is nobody"
                    + ("" if left else " beside those before it, whose shares are rounded")
                    + "; ask for a larger share, or for more devices"
                )
        for place, shift in enumerate(self.shifts):
            if shift.share and not round(shift.share * devices):
                raise OutOfBounds(
                    f"shifts.{place}: a share of {shift.share:g} of {devices} devices is nobody; ask for a larger "
                    "share, or for more devices"
                )
        if self.engine == "fleet" and self.algorithm != Algorithm():
            raise BadInput('algorithm: only engine = "cohort" has algorithms of its own; the fleet runs the product')
        self._require_one_leader()
        if self.algorithm.kind == "fedbuff" and self.algorithm.buffer < self.task.minimum:
            raise OutOfBounds(
                f"algorithm: a buffer of {self.algorithm.buffer} never holds the {self.task.minimum} reports that "
                "task.minimum asks for; make it larger"
            )
        try:
            self.server_task()
        except BadInput as error:
            raise type(error)(f"task: {error}") from error

    def _require_one_leader(self) -> None:
        """An app runs its rounds itself, and sees single updates, here as over devices."""
        if not self.algorithm.app:
            if self.algorithm.app_config:
                raise BadInput("algorithm.app_config: there is no algorithm.app that it could be for")
            return
        if self.algorithm.kind != "strategy":
            raise BadInput(f'algorithm.app runs the rounds itself, so algorithm.kind can\'t be "{self.algorithm.kind}"')
        if self.engine != "cohort":
            raise BadInput('algorithm.app needs engine = "cohort"')
        if self.task.privacy.on:
            raise BadInput("algorithm.app sees single updates, so task.privacy.on can't be true")

    def files(self) -> list[Path]:
        """What it names and doesn't hold: its users' archives, its trace, its bundle's manifest, its app's module.

        Raises:
            NotFound: there is no such trace; an engine that plays none must not take a wrong name either.
        """
        named = [Path(self.model) / MANIFEST_FILE, Path(self.population.trace or ".")]
        if self.population.trace and not named[1].is_file():
            raise NotFound(f"no trace file at {named[1]}")
        users = sorted(Path(self.data.folder).glob("*.npz")) if self.data.folder else []
        return [path for path in (*named, *users, *_source_of(self.algorithm.app)) if path.is_file()]

    def server_task(self, *, population: str = "simulated", model: str = "simulated") -> Task:
        """The task as the product runs it, updates in the open unless `task.privacy.on`.

        Raises:
            BadInput: a strategy or a setting that the product refuses.
        """
        part = self.task
        return Task(
            name=self.name,
            population=population,
            model=model,
            plan=self.plan(),
            goal=part.goal,
            minimum=part.minimum,
            over_selection=part.over_selection,
            deadline_seconds=part.deadline_seconds,
            rounds=part.rounds,
            strategy=StrategySpec(part.strategy.name, dict(part.strategy.arguments)),
            validation=ValidationPolicy.from_tree(dict(part.validation)),
            evaluate_candidates=part.evaluate_candidates,
            updates_private=part.privacy.on,
            privacy=_privacy(part.privacy),
            seed=self.seed,
        )

    def plan(self) -> Plan:
        """What each device runs."""
        part = self.task.plan
        rates = {name: value for name, value in (("lr", part.lr), ("mu", part.mu)) if value}
        rates |= {} if part.momentum is None else {"momentum": part.momentum}
        return Plan(
            epochs=part.epochs,
            batch_size=part.batch_size,
            max_steps=part.max_steps,
            max_examples=part.max_examples,
            clip_norm=part.clip_norm,
            max_weight=part.max_weight,
            hyperparameters=rates,
            seed=self.seed,
        )


def _source_of(app: str) -> list[Path]:
    """The file of an app's module, in the current folder or among what is installed, if any; nothing is imported."""
    if not app:
        return []
    module = Path(*app.partition(":")[0].split("."))
    found = (Path(place) / module for place in ("", *sys.path))
    return [path for stem in found for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()][:1]


def _privacy(part: PrivacyPart) -> PrivacySettings:
    if not part.on:
        return PrivacySettings()
    return PrivacySettings(
        ring_bits=part.ring_bits,
        noise_multiplier=part.noise_multiplier,
        epsilon=part.epsilon,
        delta=part.delta,
        rounds_per_device=part.rounds_per_device,
        metric_bound=part.metric_bound,
    )


SCENARIOS: TypeAdapter[Scenario] = TypeAdapter(Scenario)
"""Reads, writes and describes scenarios."""


def to_tree(scenario: Scenario) -> dict[str, Any]:
    """A scenario as plain JSON values, every default written out."""
    tree: dict[str, Any] = SCENARIOS.dump_python(scenario, mode="json")
    return tree
