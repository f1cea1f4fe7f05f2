"""A plan is run as it says, the same way each time, and nothing that isn't a number leaves the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.client.conftest import RUNTIME, SetClock
from tests.client.recordings import recordings
from umbel.bundle import Bundle
from umbel.errors import NotFinite, OutOfBounds
from umbel.plan import Kind, Plan
from umbel_client.examples import NONE, Examples, Split
from umbel_client.trainer import Job, Progress, Stopped, run
from umbel_models.zoo import bundle_path

BUNDLE = Bundle.open(bundle_path("smartwatch"))
PLAN = Plan(epochs=2, batch_size=16, hyperparameters={"lr": 0.1}, seed=1)


def examples(count: int, seed: str = "own") -> Examples:
    inputs, targets = recordings(count, seed)
    return Examples({"x": inputs}, {"y": targets}, count)


SPLIT = Split(examples(40), examples(14, "held"))


def job(plan: Plan = PLAN, device: str = "d") -> Job:
    return Job(plan, "learn", 3, device)


def train(plan: Plan = PLAN, split: Split = SPLIT, **parts: Any) -> Any:
    return run(job(plan), BUNDLE, split, RUNTIME, parts.pop("clock", SetClock()), **parts)


def test_training_again_gives_the_same_bits_and_another_device_another_order() -> None:
    first, second = train(), train()
    assert first.delta == second.delta
    assert first.metrics == second.metrics
    assert job().order(0, 40).tolist() != job(device="e").order(0, 40).tolist()
    assert job().order(0, 40).tolist() != job().order(1, 40).tolist()


def test_training_learns() -> None:
    long = replace(PLAN, epochs=40)
    delta = train(long).delta
    learnt = BUNDLE.shared_weights() + delta
    sums = RUNTIME.evaluate(BUNDLE, learnt)(SPLIT.held_back.inputs, SPLIT.held_back.targets)
    assert sums["correct"] / sums["examples"] > 0.9


def test_every_example_counts_once_an_epoch_and_the_last_batch_is_ragged() -> None:
    update = train()
    assert update.weight == 40
    assert update.metrics["train_examples"] == 80
    assert update.metrics["examples"] == 14


def test_the_base_is_judged_before_training() -> None:
    base = RUNTIME.evaluate(BUNDLE, BUNDLE.shared_weights())(SPLIT.held_back.inputs, SPLIT.held_back.targets)
    update = train()
    assert update.metrics["loss"] == pytest.approx(base["loss"])
    assert update.metrics["correct"] == base["correct"]


@pytest.mark.parametrize(
    ("change", "weight", "seen"),
    [({"max_steps": 1}, 16, 16), ({"max_examples": 10}, 10, 20), ({"max_weight": 7.0}, 7, 80), ({"epochs": 1}, 40, 40)],
)
def test_limits_of_a_plan_hold(change: dict[str, Any], weight: float, seen: float) -> None:
    update = train(replace(PLAN, **change))
    assert update.weight == weight
    assert update.metrics["train_examples"] == seen


def test_only_the_newest_examples_are_used_when_few_are_asked_for() -> None:
    newest = Split(SPLIT.training.take(slice(30, None)), SPLIT.held_back)
    assert train(replace(PLAN, max_examples=10)).delta == train(PLAN, newest).delta


def test_the_delta_is_clipped_on_the_device() -> None:
    free = train().delta.norm()
    assert free > 0.1
    assert train(replace(PLAN, clip_norm=0.1)).delta.norm() == pytest.approx(0.1, rel=1e-5)
    assert train(replace(PLAN, clip_norm=2 * free)).delta.norm() == free


def test_a_plan_with_no_time_left_still_takes_a_step_and_no_more() -> None:
    class Racing(SetClock):
        def now(self) -> float:
            self.instant += 10
            return self.instant

    assert train(replace(PLAN, max_seconds=1.0), clock=Racing()).metrics["train_examples"] == 16


def test_too_few_examples_are_told() -> None:
    with pytest.raises(OutOfBounds, match="asks for 41"):
        train(replace(PLAN, min_examples=41))
    with pytest.raises(OutOfBounds, match="0 examples"):
        train(replace(PLAN, min_examples=0), Split(NONE, SPLIT.held_back))
    with pytest.raises(OutOfBounds, match="0 examples"):
        train(Plan(kind=Kind.EVALUATE), Split(SPLIT.training, NONE))


def test_an_unknown_hyperparameter_is_told() -> None:
    with pytest.raises(OutOfBounds, match="momentum"):
        train(replace(PLAN, hyperparameters={"momentum": 0.9}))


def test_numbers_that_are_none_stay_on_the_device() -> None:
    with pytest.raises(NotFinite):
        train(replace(PLAN, hyperparameters={"lr": 1e30}))
    wild = Examples({"x": np.full((4, 6, 100), np.inf, np.float32)}, {"y": np.zeros(4, np.int64)}, 4)
    with pytest.raises(NotFinite):
        train(PLAN, Split(SPLIT.training, wild))


@pytest.mark.parametrize("stop_at", [0, 1, 2, 3, 5])
def test_stopping_at_any_step_and_going_on_equals_not_stopping(stop_at: int) -> None:
    # With a proximal term the optimiser has slots, which must come back too.
    plan = replace(PLAN, hyperparameters={"lr": 0.1, "mu": 0.5})
    looks = iter(range(100))
    progress: Progress | None = None
    with pytest.raises(Stopped) as stopped:
        train(plan, go_on=lambda: ("in use",) if next(looks) == stop_at else ())
    progress = stopped.value.progress
    assert progress.steps == stop_at
    resumed, unbroken = train(plan, progress=progress), train(plan)
    assert resumed.delta == unbroken.delta
    assert resumed.metrics == unbroken.metrics
