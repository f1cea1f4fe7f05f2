"""The clip finds its quantile from noised votes: at no price beyond the ledger's, through restarts, whoever lies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.private.parties import Cohort, Party, delta
from tests.private.test_coordinator import PRIVATE, PrivateWorld, quick_disk, sqlite_url
from tests.server.driving import OPERATOR, TASK, task, together
from umbel.clip_vote import WITHIN_CLIP, share_within
from umbel.descriptor import Lane, RoundDescriptor, descriptor_from_bytes, noise_multiplier, sensitivity
from umbel.errors import BadInput, MalformedMessage, OutOfBounds, SumImplausible
from umbel.plan import Plan
from umbel_server.adaptive_clip import next_clip
from umbel_server.admin_messages import task_from_message
from umbel_server.privacy import with_noise
from umbel_server.privacy_ledger import epsilon
from umbel_server.privacy_settings import PrivacySettings
from umbel_server.round import RoundKey, RoundState
from umbel_server.validation import ValidationPolicy

__all__ = ["quick_disk", "sqlite_url"]
MOVING = PrivacySettings(noise_multiplier=1.0, metric_bound=50.0, clip_quantile=0.5)
NEARLY_BARE = replace(MOVING, noise_multiplier=0.02, clip_vote_noise=0.011)
"""So little noise that a share can be told; no promise to anybody."""
ROOMY = ValidationPolicy(max_accuracy_drop=1.0)


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[PrivateWorld]:
    world = PrivateWorld(sqlite_url, tmp_path / "blobs")
    yield world
    world.store.close()


def voting(party: Party, number: int = 1, clip: float = 1.0, multiplier: float = 0.5, **changes: Any) -> Cohort:
    """A round in which devices vote on the clip."""
    draft = party.describe(number, max_weight=1, lanes=(), clip_norm=clip, **changes)
    return Cohort(party, party.agree(with_noise(draft, multiplier, votes=1.0)))


def clip_of(world: PrivateWorld, number: int) -> float:
    agreed = world.coordinator.private.find(RoundKey(TASK, number))
    assert agreed is not None
    return agreed.descriptor.clip_norm


# The vote.


def test_a_device_votes_by_the_norm_that_it_had_before_clipping() -> None:
    cohort = voting(Party())
    lane = 1 + [one.name for one in cohort.descriptor.lanes].index(WITHIN_CLIP)
    short, long = (cohort.encoded(delta(1, norm=norm)).lanes[lane] for norm in (0.99, 1.01))
    assert (int(short), int(long)) == (1 << 15, 2**64 - (1 << 15))


def test_a_device_that_lies_about_its_vote_moves_the_sum_by_at_most_one() -> None:
    """Whatever it hands to its encoder as a metric of that name, and whatever norm it pretends to have."""
    cohort = voting(Party())
    lane = 1 + [one.name for one in cohort.descriptor.lanes].index(WITHIN_CLIP)
    truth = cohort.encoded(delta(1, norm=0.5)).lanes[lane]
    for norm, told in ((0.5, 1e12), (0.5, -1e12), (5e8, 0.0), (1e-8, 3.0)):
        lie = cohort.encoded(delta(1, norm=norm), **{WITHIN_CLIP: told}).lanes[lane]
        assert abs(int((lie - truth).astype(np.int64))) <= 1 << 16


def test_a_vote_that_no_cohort_can_cast_costs_the_round() -> None:
    party = Party()
    cohort = voting(party)
    lane = 1 + [one.name for one in cohort.descriptor.lanes].index(WITHIN_CLIP)
    devices = party.devices(4)
    cohort.fill(devices[:3])
    forged = cohort.encoded(delta(9))
    forged.lanes[lane] = 20 << 16
    cohort.take(cohort.report(devices[3], forged))
    with pytest.raises(SumImplausible, match=WITHIN_CLIP):
        cohort.sum.close()


@given(st.floats(-1e9, 1e9), st.integers(1, 1000))
def test_a_share_is_a_share_whatever_noise_and_liars_add(total: float, count: int) -> None:
    assert 0.0 <= share_within(total, count) <= 1.0


def test_the_votes_are_no_metric_of_the_model() -> None:
    party = Party()
    cohort = voting(party)
    cohort.fill(party.devices(4))
    found = cohort.sum.close()
    assert found.within_clip is not None and WITHIN_CLIP not in found.metrics


# The price.


def parts(descriptor: RoundDescriptor) -> tuple[float, float]:
    """Noise on the numbers, per sensitivity, and on the count of votes."""
    votes = next(lane for lane in descriptor.lanes if lane.name == WITHIN_CLIP)
    return math.sqrt(descriptor.noise_variance) / sensitivity(descriptor), math.sqrt(votes.noise_variance) / (1 << 16)


@pytest.mark.parametrize(("multiplier", "votes"), [(0.5, 0.3), (1.0, 5.0), (3.0, 1.6)])
def test_the_noise_is_split_as_in_the_paper(multiplier: float, votes: float) -> None:
    """z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2), and what the ledger counts is z (Andrew et al. 2021, theorem 1)."""
    bare = Party().describe(size=3000, max_weight=1, lanes=())
    numbers, count = parts(with_noise(bare, multiplier, votes))
    assert numbers == pytest.approx((multiplier**-2 - (2 * votes) ** -2) ** -0.5, rel=1e-3)
    assert count == pytest.approx(votes, rel=1e-3)
    for lanes in ((), (Lane("loss", 100.0), Lane("correct", 9.0))):
        assert noise_multiplier(with_noise(replace(bare, lanes=lanes), multiplier, votes)) == pytest.approx(
            multiplier, rel=1e-3
        )


def test_votes_that_cost_more_than_the_whole_round_may_are_refused() -> None:
    with pytest.raises(OutOfBounds, match="costs more"):
        with_noise(Party().describe(max_weight=1), 2.0, votes=1.0)


# The way to the quantile.


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 0.9), st.floats(-3.0, 3.0), st.floats(0.01, 50.0), st.integers(0, 2**32))
@example(0.1, 2.0, 0.01171875, 0)  # a long way up, by a fiftieth a round at most
def test_the_clip_tends_to_the_quantile_of_the_fleets_norms(
    quantile: float, center: float, start: float, seed: int
) -> None:
    chance = np.random.Generator(np.random.PCG64(seed))
    norms = np.exp(center + chance.standard_normal(400))
    wanted, clip = replace(MOVING, clip_quantile=quantile, clip_least=1e-9), start
    tail = []
    for number in range(600):
        cohort = chance.choice(norms, 60)
        within = share_within(float((cohort <= clip).sum()) - 30 + 3 * chance.standard_normal(), 60)
        clip = next_clip(clip, within, wanted, Plan(clip_norm=1e9))
        tail += [float((norms <= clip).mean())] if number >= 400 else []
    assert abs(np.mean(tail) - quantile) < 0.03


def test_the_clip_finds_the_median_through_real_sums() -> None:
    party, plan, clip = Party(), Plan(clip_norm=100.0), 8.0
    devices = party.devices(20)
    norms = [0.1 * 1.25**step for step in range(20)]
    for number in range(1, 31):
        cohort = voting(party, number, clip, size=8, maximum=20)
        for norm, device in zip(norms, devices, strict=True):
            cohort.take(cohort.report(device, cohort.encoded(delta(number, 8, norm))))
        within = cohort.sum.close().within_clip
        assert within is not None
        clip = next_clip(clip, within, replace(MOVING, clip_rate=0.3), plan)
    assert norms[6] <= clip <= norms[13]


@given(st.floats(0.0, 1.0), st.floats(0.1, 2.0))
def test_the_clip_keeps_within_its_bounds_and_moves_by_steps(within: float, clip: float) -> None:
    bounded = replace(MOVING, clip_least=0.1)
    after = next_clip(clip, within, bounded, Plan(clip_norm=2.0))
    assert 0.1 <= after <= 2.0 and abs(math.log(after / clip)) <= bounded.clip_rate + 1e-12


# Through the coordinator.


async def test_the_next_round_has_the_new_clip_and_devices_are_told(world: PrivateWorld) -> None:
    devices = world.enrol_private("a", "b", "c", "d")
    await world.begin(task(**PRIVATE | {"rounds": 3}, privacy=NEARLY_BARE, validation=ROOMY))
    assert clip_of(world, 1) == 20.0
    assert (await devices[0].assignment()).plan.clip_norm == 0.0
    for number in (1, 2):
        assert all(await together(*devices))
        await world.coordinator.tick()
        await world.coordinator.tick()
        assert world.round(number).state is RoundState.COMPLETED
        assert WITHIN_CLIP not in world.round(number).metrics
        # All deltas were shorter than the clip: it sinks by exp(-0.2 * (1 - 0.5)), but for a little noise.
        assert clip_of(world, number + 1) == pytest.approx(clip_of(world, number) * math.exp(-0.1), rel=0.01)
    told = world.coordinator.operations.privacy(TASK)
    assert (told.clip_norm, told.clip_quantile) == (clip_of(world, 3), 0.5)
    assert told.epsilon_spent == pytest.approx(epsilon([0.02] * 3, NEARLY_BARE), rel=0.01)


async def test_the_clip_survives_restarts_to_the_bit(world: PrivateWorld) -> None:
    devices = world.enrol_private("a", "b", "c", "d")
    await world.begin(task(**PRIVATE, privacy=replace(NEARLY_BARE, clip_start=0.37)))
    assert clip_of(world, 1) == 0.37
    assert all(await together(*devices[:3])) and await devices[3].visit()
    world.restart()
    await world.coordinator.tick()
    stored = world.coordinator.operations.task(TASK).clip_norm
    assert stored is not None and 0.37 < stored == clip_of(world, 2)
    with world.store.transaction() as connection:
        from umbel_server.tables import PRIVATE_ROUNDS

        connection.execute(PRIVATE_ROUNDS.delete().where(PRIVATE_ROUNDS.c.number == 2))
    world.restart()
    await world.coordinator.tick()
    assert clip_of(world, 2) == stored
    held = world.coordinator.private.find(RoundKey(TASK, 2))
    assert held is not None and descriptor_from_bytes(held.signed.statement).clip_norm == stored


async def test_votes_count_though_the_candidate_is_refused(world: PrivateWorld) -> None:
    devices = world.enrol_private("a", "b", "c", "d")
    await world.begin(task(**PRIVATE, privacy=NEARLY_BARE, validation=ValidationPolicy(max_step_norm=1e-9)))
    assert all(await together(*devices))
    await world.coordinator.tick()
    await world.coordinator.tick()
    assert world.round(1).state is RoundState.FAILED and "step" in world.round(1).reason
    assert clip_of(world, 2) == pytest.approx(20 * math.exp(-0.1), rel=0.01)


@pytest.mark.parametrize("restarts", [False, True])
async def test_votes_count_while_the_candidate_is_still_measured(world: PrivateWorld, restarts: bool) -> None:
    devices = world.enrol_private("a", "b", "c", "d")
    await world.begin(task(**PRIVATE, privacy=NEARLY_BARE, evaluate_candidates=True, validation=ROOMY))
    assert all(await together(*devices))
    await world.coordinator.tick()
    lowered = world.coordinator.operations.task(TASK).clip_norm
    assert lowered == pytest.approx(20 * math.exp(-0.1), rel=0.01)
    if restarts:
        world.restart()
    assert all(await together(*devices))
    await world.coordinator.tick()
    await world.coordinator.tick()
    assert clip_of(world, 2) == lowered


async def test_a_round_that_is_lost_leaves_the_clip_as_it_was(world: PrivateWorld) -> None:
    devices = world.enrol_private("a", "b", "c", "d")
    await world.begin(task(**PRIVATE, privacy=NEARLY_BARE))
    for device in devices[:2]:
        world.people.revoke(device.pinned.certificate.public_key)
    assert all(await together(*devices))
    await world.coordinator.tick()
    assert world.round(1).state is RoundState.FAILED
    assert world.coordinator.operations.task(TASK).clip_norm == 20.0


# What is refused.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"noise_multiplier": 0.0, "metric_bound": 0.0}, "without noise"),
        ({"clip_quantile": 1.0}, "clip_quantile"),
        ({"clip_quantile": -0.1}, "clip_quantile"),
        ({"clip_rate": 0.0}, "clip_rate"),
        ({"clip_vote_noise": 0.5}, "clip_vote_noise"),
        ({"clip_start": math.nan}, "clip_start"),
    ],
)
def test_a_moving_clip_that_breaks_its_promise_is_refused(changes: dict[str, float], words: str) -> None:
    with pytest.raises(OutOfBounds, match=words):
        replace(MOVING, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"updates_private": False}, "secret sums"),
        ({"privacy": replace(MOVING, clip_start=21.0)}, "rising order"),
        ({"privacy": replace(MOVING, clip_least=5.0, clip_start=4.0)}, "rising order"),
        ({"plan": Plan(max_weight=64.0)}, "above 0"),
    ],
)
def test_a_task_whose_clip_can_not_move_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        task(**(PRIVATE | {"privacy": MOVING} | changes))


async def test_a_ring_must_have_room_at_every_clip_that_is_allowed(world: PrivateWorld) -> None:
    """Checked when the task is made, at the smallest and at the largest; not when a clip gets there."""
    narrow = replace(MOVING, ring_bits=16, noise_multiplier=50.0, clip_vote_noise=26.0)
    with pytest.raises(OutOfBounds, match="wider ring"):
        world.coordinator.operations.create_task(task(**PRIVATE, privacy=narrow), OPERATOR)


def test_an_operator_sets_it_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    from umbel_server.cli.task_file import read_task, settings_of

    file = tmp_path / "task.toml"
    file.write_text(
        'name = "t"\npopulation = "p"\nmodel = "m"\nminimum = 3\n[plan]\nclip_norm = 4.0\n'
        "[privacy]\nnoise_multiplier = 1.0\nmetric_bound = 9.0\nclip_quantile = 0.9\n"
    )
    spec = read_task(file, {}, {}, None, settings_of(["clip_quantile=0.5", "ring_bits=16"]))
    found = task_from_message(spec).privacy
    assert (found.clip_quantile, found.ring_bits, found.noise_multiplier) == (0.5, 16, 1.0)
    for wrong in ("clip_quantile", "clip_quantile=half", "clip_quantil=0.5", "clip_quantile=true"):
        with pytest.raises(MalformedMessage):
            read_task(file, {}, {}, None, settings_of([wrong]))


def test_a_metric_may_not_go_by_the_name_of_the_votes() -> None:
    from umbel_server.privacy import _metric_lanes

    with pytest.raises(BadInput, match="name is taken"):
        _metric_lanes(("loss", WITHIN_CLIP), 1.0)
