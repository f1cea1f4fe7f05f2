"""A task: what a population is asked to do for a model, round after round, and its form as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from umbel.clock import DAY
from umbel.errors import BadInput, MalformedMessage, OutOfBounds, WrongState
from umbel.fields import name
from umbel.plan import Kind, Plan
from umbel.release import STABLE
from umbel_server.adaptive_clip import require_adaptable
from umbel_server.flower.spec import StrategySpec, device_hyperparameters, least_reports, require_strategy
from umbel_server.json_text import from_text, to_text
from umbel_server.privacy_settings import PrivacySettings
from umbel_server.validation import ValidationPolicy


class TaskState(Enum):
    """Whether a task's rounds go on; see `docs/explanation/data-model.md`."""

    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Task:
    """A computation for a population: to train a model over `rounds` rounds, or to evaluate it."""

    name: str
    population: str
    model: str
    plan: Plan = field(default_factory=Plan)
    goal: int = 10
    """Reports wished for: a round closes at once when it has them."""
    minimum: int = 1
    """Fewest reports that make a round count."""
    over_selection: float = 1.3
    """Sessions that may be open or reported at a time, as a multiple of the goal."""
    deadline_seconds: float = 600.0
    """From a round's opening to its last moment."""
    rounds: int = 1
    """Rounds that get as far as a verdict; abandoned ones are made up for."""
    strategy: StrategySpec = field(default_factory=StrategySpec)
    validation: ValidationPolicy = field(default_factory=ValidationPolicy)
    evaluate_candidates: bool = False
    """Whether a cohort of devices measures each candidate before the verdict."""
    updates_private: bool = True
    """Whether only sums of updates are ever known (`umbel-2agg/1`); false lets the coordinator open each update."""
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    driven: bool = False
    """Whether a program, such as a Flower `ServerApp`, orders its cohorts: no round opens by itself, none makes a
    version, and the program gets the single updates, which therefore may not be private."""
    seed: int = 0
    channel: str = STABLE
    """Where each accepted version is released at once; empty for nowhere, until an operator publishes it."""
    state: TaskState = TaskState.RUNNING

    def __post_init__(self) -> None:
        for what in ("name", "population", "model"):
            name(getattr(self, what), what)
        if self.channel:
            name(self.channel, "channel")
        if not 1 <= self.minimum <= self.goal <= 1_000_000:
            raise OutOfBounds(f"minimum {self.minimum} and goal {self.goal}: need 1 <= minimum <= goal <= 1000000")
        if not 1 <= self.over_selection <= 100:
            raise OutOfBounds(f"over_selection is {self.over_selection}; it must lie between 1 and 100")
        # Shorter, and rounds would be given up faster than they are opened: the coordinator would do nothing else.
        if not 1 <= self.deadline_seconds <= 30 * DAY:
            raise OutOfBounds(f"deadline_seconds is {self.deadline_seconds}; at least a second and at most 30 days")
        if not 1 <= self.rounds <= 1_000_000:
            raise OutOfBounds(f"rounds is {self.rounds}; it must lie between 1 and 1000000")
        self._check_strategy()
        require_adaptable(self.privacy, self.plan, self.updates_private)

    def _check_strategy(self) -> None:
        if self.driven and (self.updates_private or self.evaluate_candidates):
            raise BadInput(
                "a program that drives a task sees single updates and judges by itself; "
                "say openly that updates are not private, and leave evaluate_candidates out"
            )
        require_strategy(self.strategy, self.updates_private)
        least = least_reports(self.strategy)
        if self.minimum < least:
            raise OutOfBounds(f"{self.strategy.name} as set needs {least} reports; raise minimum from {self.minimum}")
        for what, asked in device_hyperparameters(self.strategy).items():
            if self.plan.hyperparameters.get(what, asked) != asked:
                raise BadInput(
                    f"the plan's {what} is {self.plan.hyperparameters[what]:g}, and {self.strategy.name} asks devices "
                    f"for {asked:g}; leave it to one of them"
                )

    @property
    def slots(self) -> int:
        """How many sessions of a round may be open or reported at a time."""
        return math.ceil(self.goal * self.over_selection)

    def plan_for(self, kind: Kind) -> Plan:
        """What a device of one of its rounds runs: the plan, with what the strategy asks of devices."""
        wanted = {**self.plan.hyperparameters, **device_hyperparameters(self.strategy)}
        # A clip that moves is the round's, and is voted on by norms before clipping; so it isn't the plan's.
        clip = 0.0 if self.privacy.clip_quantile else self.plan.clip_norm
        return replace(self.plan, kind=kind, seed=self.seed, hyperparameters=wanted, clip_norm=clip)

    def paused(self) -> Task:
        """Running -> paused: open rounds go on, no new one begins."""
        return self._moved(TaskState.PAUSED, TaskState.RUNNING)

    def resumed(self) -> Task:
        """Paused -> running."""
        return self._moved(TaskState.RUNNING, TaskState.PAUSED)

    def done(self) -> Task:
        """Running or paused -> done, for good."""
        return self._moved(TaskState.DONE, TaskState.RUNNING, TaskState.PAUSED)

    def _moved(self, to: TaskState, *allowed: TaskState) -> Task:
        if self.state not in allowed:
            raise WrongState(f"task {self.name!r} is {self.state.value}, so it can't become {to.value}")
        return replace(self, state=to)

    def to_json(self) -> str:
        """Canonical JSON of everything but the state, which changes."""
        tree = {
            one.name: getattr(self, one.name)
            for one in dataclasses.fields(self)
            if one.name not in ("plan", "strategy", "validation", "privacy", "state")
        }
        tree["plan"] = plan_to_tree(self.plan)
        tree["strategy"] = {"name": self.strategy.name, "arguments": dict(self.strategy.arguments)}
        tree["validation"] = self.validation.to_tree()
        tree["privacy"] = self.privacy.to_tree()
        return to_text(tree)

    @classmethod
    def from_json(cls, text: str, state: TaskState = TaskState.RUNNING) -> Task:
        """Undo `to_json`.

        Raises:
            MalformedMessage: not a task's JSON.
            BadInput: a task that contradicts itself.
        """
        tree = from_text(text)
        try:
            plan = _plan(tree.pop("plan"))
            strategy = StrategySpec(**tree.pop("strategy"))
            validation = ValidationPolicy.from_tree(tree.pop("validation"))
            tree["privacy"] = PrivacySettings.from_tree(tree.pop("privacy", {}))
            return cls(plan=plan, strategy=strategy, validation=validation, state=state, **tree)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise MalformedMessage(f"not a task: {error}") from error


def plan_to_tree(plan: Plan) -> dict[str, object]:
    """A plan as a JSON object."""
    tree = {one.name: getattr(plan, one.name) for one in dataclasses.fields(plan)}
    return tree | {"kind": plan.kind.value, "hyperparameters": dict(plan.hyperparameters)}


def _plan(tree: Mapping[str, Any]) -> Plan:
    return Plan(**{**tree, "kind": Kind(tree["kind"])})
