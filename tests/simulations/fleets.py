"""Small fleets: the tiny model, a dozen users, devices that are always free unless a test says otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.simulations import tiny
from umbel.bundle import Bundle
from umbel_simulations.engines import Silent
from umbel_simulations.fleet.engine import play
from umbel_simulations.outcome import Outcome
from umbel_simulations.scenario import Data, PlanPart, PrivacyPart, Scenario, TaskPart
from umbel_simulations.world import Adversary, Crash, Faults, Outage, Population, RolloutPlan, WaveStep

USERS = 12
WAVES = (WaveStep(50.0, soak_hours=0.2), WaveStep(100.0, soak_hours=0.2))
GATE = {"least_answers": 2, "least_answer_share": 0.3, "margin": 0.0, "ceiling_devices": 1, "ceiling_share": 0.0}
STORM = Faults(
    loss=0.05,
    duplicate=0.1,
    reorder=0.05,
    delay=0.1,
    delay_seconds=20.0,
    crashes=(
        Crash("coordinator", 4, until_hour=0.3),
        Crash("leader", 2, until_hour=0.3),
        Crash("device", 6, until_hour=0.3),
        Crash("helper", 2, until_hour=0.3),
    ),
    outages=(Outage("coordinator", 0.1, 0.2), Outage("helper", 0.05, 0.1)),
)


def population(**changes: Any) -> Population:
    calm = Population(devices=USERS, availability="always", check_in_hours=0.25, drop_out=0.0, examples_per_second=20.0)
    return replace(calm, **changes)


def scenario(folder: Path, **changes: Any) -> Scenario:
    """Four rounds of six reports within six hours, of the model in a folder."""
    plan = PlanPart(epochs=1, batch_size=4, lr=0.2, clip_norm=2.0)
    task = TaskPart(rounds=4, goal=6, minimum=3, deadline_seconds=600.0, plan=plan)
    told = Scenario("tiny", str(folder), Data("smartwatch"), hours=6.0, seed=3, task=task, population=population())
    return replace(told, **changes)


def everything(folder: Path) -> Scenario:
    """Private rounds in a storm, with liars and wrong clocks, and a rollout of what was learned."""
    told = scenario(folder)
    return replace(
        told,
        hours=1.2,
        task=replace(told.task, privacy=PrivacyPart(on=True)),
        population=population(wrong_clocks=0.2, drop_out=0.1, availability="diurnal", mean_availability=0.6),
        faults=STORM,
        adversaries=(Adversary("scaling", 0.1), Adversary("replay", 0.1)),
        rollouts=(RolloutPlan(0.6, waves=WAVES, gate=GATE),),
    )


def home_of(bundle: Bundle) -> Path:
    """The folder that a bundle was opened from."""
    return bundle.paths[next(iter(bundle.manifest.common_files))].parent


def played(told: Scenario, folder: Path, workers: int = 1) -> Outcome:
    setting = tiny.setting(Bundle.open(Path(told.model)), USERS)
    return play(told, setting, workers=workers, progress=Silent(), folder=folder)
