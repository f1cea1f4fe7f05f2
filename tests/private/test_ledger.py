"""Noise and its price: what rounds cost adds up, a budget is never exceeded, and drowning is told before training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.private.parties import Party
from tests.private.test_coordinator import PRIVATE, PrivateWorld, quick_disk, sqlite_url
from tests.server.driving import OPERATOR, TASK, task, together
from umbel.descriptor import Lane, noise_multiplier, sensitivity
from umbel.errors import BudgetSpent, OutOfBounds
from umbel.plan import Kind, Plan
from umbel.ring import signed_norm
from umbel_server.privacy import signal_to_noise, with_noise
from umbel_server.privacy_ledger import epsilon, require_budget
from umbel_server.privacy_settings import PrivacySettings
from umbel_server.round import RoundState

__all__ = ["quick_disk", "sqlite_url"]
NOISY = PrivacySettings(noise_multiplier=2.0, metric_bound=50.0)


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[PrivateWorld]:
    world = PrivateWorld(sqlite_url, tmp_path / "blobs")
    yield world
    world.store.close()


def test_costs_add_up_as_the_literature_says() -> None:
    """A Gaussian mechanism of noise 2, five times, at delta 1e-6: epsilon 5.9."""
    assert epsilon([2.0] * 5, NOISY) == pytest.approx(5.93, abs=0.05)
    assert epsilon([], NOISY) == 0.0
    assert epsilon([2.0, 0.0], NOISY) == math.inf
    assert epsilon([2.0] * 50, replace(NOISY, rounds_per_device=5)) == epsilon([2.0] * 5, NOISY)


def _exact(multipliers: list[float], delta: float) -> float:
    """The epsilon of Gaussian mechanisms one after another: Balle and Wang 2018 (arXiv 1805.06530), theorem 8."""
    mu = math.sqrt(sum(multiplier**-2 for multiplier in multipliers))

    def excess(epsilon: float) -> float:
        below, above = (math.erfc((epsilon / mu + sign * mu / 2) / math.sqrt(2)) / 2 for sign in (-1, 1))
        return below - math.exp(epsilon) * above - delta

    least, most = 0.0, 500.0
    for _ in range(100):
        middle = (least + most) / 2
        least, most = (middle, most) if excess(middle) > 0 else (least, middle)
    return most


@pytest.mark.parametrize(
    "multipliers",
    [[0.1], [1.0], [30.0], [100.0], [1.0] * 100, [10.0] * 10_000, [0.5, 1.0, 2.0, 4.0] * 20, [3.0, 50.0]],
)
def test_a_second_accountant_finds_a_little_less_and_never_more(multipliers: list[float]) -> None:
    for delta in (1e-6, 1e-9, 1e-12):
        exact = _exact(multipliers, delta)
        assert exact <= epsilon(multipliers, replace(NOISY, delta=delta)) <= 1.2 * exact


def test_the_costliest_rounds_count_under_a_cap() -> None:
    capped = replace(NOISY, rounds_per_device=1)
    assert epsilon([4.0, 1.0, 8.0], capped) == epsilon([1.0], NOISY)


def test_a_round_gets_the_noise_that_was_asked_for() -> None:
    lanes = (Lane("loss", 100.0), Lane("correct", 100.0))
    descriptor = Party().describe(size=5000, max_weight=1, lanes=lanes)
    for multiplier in (0.5, 1.0, 4.0):
        noisy = with_noise(descriptor, multiplier)
        assert noise_multiplier(noisy) == pytest.approx(multiplier, rel=1e-3)
        assert noise_multiplier(noisy) >= multiplier * (1 - 1e-9)


def test_noise_that_leaves_no_room_is_refused() -> None:
    descriptor = Party().describe(size=5000, max_weight=1, ring_bits=16)
    with pytest.raises(OutOfBounds, match="no room"):
        with_noise(descriptor, 1000.0)


def test_a_rounded_delta_keeps_to_the_sensitivity() -> None:
    party = Party()
    descriptor = with_noise(party.describe(size=3000, max_weight=1, ring_bits=32, lanes=()), 1.0)
    from tests.private.parties import Cohort, delta

    cohort = Cohort(party, party.agree(descriptor))
    for seed in range(20):
        numbers = cohort.encoded(delta(seed, 3000, norm=3.0), seed=seed).numbers
        assert signed_norm(numbers) <= sensitivity(descriptor)


def test_the_sums_noise_is_the_helpers_and_has_the_right_size() -> None:
    party = Party()
    descriptor = with_noise(party.describe(size=20_000, max_weight=1, minimum=2), 1.0)
    from tests.private.parties import Cohort

    cohort = Cohort(party, party.agree(descriptor))
    for device in party.devices(3):
        cohort.take(cohort.report(device, cohort.encoded(np.zeros(20_000, np.float32))))
    total = cohort.sum.close().aggregate.total * np.float32(descriptor.scale)
    deviation = math.sqrt(descriptor.noise_variance)
    assert abs(total.std() / deviation - 1) < 0.03
    np.testing.assert_allclose(total, np.round(total), atol=deviation * 1e-5)


def test_a_budget_is_not_exceeded() -> None:
    descriptor = with_noise(Party().describe(size=100, max_weight=1), 2.0)
    settings = replace(NOISY, epsilon=epsilon([2.0] * 3, NOISY) + 0.01)
    require_budget([2.0, 2.0], descriptor, settings)
    with pytest.raises(BudgetSpent):
        require_budget([2.0] * 3, descriptor, settings)
    require_budget([2.0] * 300, descriptor, NOISY)


def test_drowning_is_told_before_training() -> None:
    """Noise on the mean has norm z * C * sqrt(d) / n: here 100 devices and 10^6 weights drown, 10^4 don't."""
    small = with_noise(Party().describe(size=100, max_weight=1, lanes=()), 1.0)
    large = with_noise(Party().describe(size=1_000_000, max_weight=1, lanes=()), 1.0)
    assert signal_to_noise(small, 100) == pytest.approx(100 / 10, rel=0.05)
    assert signal_to_noise(large, 100) < 0.2
    assert signal_to_noise(Party().describe(), 100) == math.inf


async def test_an_overspending_round_is_not_opened_and_the_task_pauses(world: PrivateWorld) -> None:
    once = epsilon([2.0], NOISY)
    devices = world.enrol_private("a", "b", "c", "d")
    await world.begin(task(**PRIVATE, privacy=replace(NOISY, epsilon=once * 1.1)))
    before = world.coordinator.operations.privacy(TASK)
    assert (before.rounds, before.private) == (1, True)
    assert before.epsilon_spent == pytest.approx(once, rel=0.01) and before.epsilon_next > before.budget
    assert before.signal_to_noise < 1
    assert all(await together(*devices))
    await world.coordinator.tick()
    await world.coordinator.tick()
    assert world.round(1).state.is_over
    second = world.round(2)
    assert second.state is RoundState.ABANDONED and "epsilon" in second.reason
    assert world.coordinator.operations.task(TASK).task.state.value == "paused"
    assert world.coordinator.operations.privacy(TASK).rounds == 1


async def test_a_task_whose_budget_allows_no_round_is_refused_at_once(world: PrivateWorld) -> None:
    with pytest.raises(BudgetSpent):
        world.coordinator.operations.create_task(task(**PRIVATE, privacy=replace(NOISY, epsilon=0.01)), OPERATOR)


async def test_a_task_without_noise_says_that_it_promises_no_number(world: PrivateWorld) -> None:
    await world.begin(task(**PRIVATE))
    told = world.coordinator.operations.privacy(TASK)
    assert told.private and told.epsilon_spent == math.inf and told.bytes_per_weight == 4.0
    assert "development trust" in told.trust


async def test_a_task_that_only_evaluates_tells_of_no_clip(world: PrivateWorld) -> None:
    await world.begin(task(**PRIVATE | {"plan": Plan(kind=Kind.EVALUATE, max_weight=64.0)}))
    told = world.coordinator.operations.privacy(TASK)
    assert told.private and (told.clip_norm, told.bytes_per_weight) == (0.0, 0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"ring_bits": 24},
        {"sent_share": 0.0},
        {"sent_share": 1.5},
        {"noise_multiplier": -1.0},
        {"epsilon": 3.0},
        {"noise_multiplier": 1.0},
        {"delta": 0.0},
        {"rounds_per_device": -1},
    ],
)
def test_settings_that_promise_what_they_can_not_keep_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(OutOfBounds):
        PrivacySettings(**changes)  # type: ignore[arg-type]
