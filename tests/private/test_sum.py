"""What a private round gives: the sum over its cohort, for any ring, any weights, any order, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.private.parties import Cohort, Party, delta
from umbel.errors import NotFinite
from umbel.plan import Kind
from umbel.shares import Cleartext
from umbel_server.secure_aggregation import SecureSum


@pytest.fixture(scope="module")
def party() -> Party:
    return Party()


def fresh_number(party: Party) -> int:
    latest = party.records.latest("learn")
    return 1 if latest is None else latest[0] + 1


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"ring_bits": 32}, 1e-5),
        ({"ring_bits": 32, "max_weight": 64}, 1e-3),
        ({"ring_bits": 16, "max_weight": 1}, 0.05),
        ({"ring_bits": 16, "max_weight": 1, "rotated": True, "size": 5000}, 0.02),
        ({"ring_bits": 32, "max_weight": 64, "rotated": True, "size": 5000}, 1e-3),
    ],
)
def test_the_sum_is_the_sum(party: Party, changes: dict[str, int], tolerance: float) -> None:
    cohort = party.open(number=fresh_number(party), **changes)
    weight = min(3, cohort.descriptor.max_weight)
    expected = cohort.fill(party.devices(6), weight)
    found = cohort.sum.close().aggregate
    assert found.count == 6 and found.weight == 6 * weight
    assert found.metrics == {"loss": pytest.approx(15.0, abs=1e-3), "correct": 18.0}
    assert np.linalg.norm(found.total - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("unit", [1.0, 9.765625, 500.0])
def test_the_mean_is_the_devices_own_whatever_a_step_of_weight_is_worth(party: Party, unit: float) -> None:
    """A plan may allow more examples than the ring has steps: then a step is worth several, and so is its delta."""
    cohort = party.open(number=fresh_number(party), max_weight=64)
    expected = cohort.fill(party.devices(5), 3) / 15
    shapes = {"w": (cohort.descriptor.size,)}
    leader = SecureSum(cohort.agreed, party.leader, party.port, shapes, unit, cohort.spool.__getitem__)
    for sequence, (name, data) in enumerate(cohort.spool.items()):
        leader.accept(cohort.sealed(data, name, sequence))
    found = leader.close().aggregate
    assert found.weight == 15 * unit
    np.testing.assert_allclose(found.mean().to_vector(), expected, atol=1e-3)


def test_an_evaluation_sums_metrics_only(party: Party) -> None:
    cohort = party.open(number=fresh_number(party), kind=Kind.EVALUATE, size=0)
    for device in party.devices(4):
        cohort.take(cohort.report(device, cohort.encoded(np.zeros(0, np.float32), 5, loss=0.5, correct=7.0)))
    found = cohort.sum.close().aggregate
    assert found.total.size == 0 and found.weight == 20
    assert found.metrics == {"loss": 2.0, "correct": 28.0}


def test_a_shared_random_mask_sends_only_its_numbers(party: Party) -> None:
    cohort = party.open(number=fresh_number(party), size=300, sent=75)
    expected = cohort.fill(party.devices(4))
    total = cohort.sum.close().aggregate.total
    kept = total != 0
    assert kept.sum() <= 75
    np.testing.assert_allclose(total[kept], expected[kept], atol=1e-4)


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_full_cohort_at_the_largest_level_does_not_wrap(party: Party, bits: int, sign: int) -> None:
    size = 40
    cohort = party.open(number=fresh_number(party), ring_bits=bits, size=size, maximum=8, max_weight=2, minimum=2)
    level, weight = cohort.descriptor.level, cohort.descriptor.max_weight
    for device in party.devices(8):
        extreme = Cleartext(cohort.encoded(np.zeros(size, np.float32), weight).layout)
        extreme.numbers[:] = np.array(sign * level * weight).astype(extreme.numbers.dtype)
        extreme.lanes[0] = weight
        cohort.take(cohort.report(device, extreme))
    # All at the bound is beyond the norm bound (only one number can be at clip_norm), so look at the ring itself.
    prepared = party.port.prepare(cohort.agreed.rd, cohort.items())
    answer = party.port.commit(cohort.agreed.rd, prepared.accepted)
    from umbel.ring import to_signed
    from umbel.shares import HelperTotal

    clear = cohort.sum._total.plus(HelperTotal.from_bytes(extreme.layout, answer.total))
    assert set(to_signed(clear.numbers).tolist()) == {sign * level * weight * 8}


@settings(max_examples=25, deadline=None)
@given(
    order=st.permutations(range(6)),
    chosen=st.sets(st.integers(0, 5), min_size=2),
    bits=st.sampled_from([16, 32]),
)
def test_any_subset_in_any_order_sums_to_itself(order: list[int], chosen: set[int], bits: int) -> None:
    party = Party()
    cohort = party.open(minimum=2, ring_bits=bits, max_weight=1, size=50)
    expected = np.zeros(50)
    for index in (one for one in order if one in chosen):
        vector = delta(index, 50)
        expected += vector
        cohort.take(cohort.report(party.device(), cohort.encoded(vector, seed=index)))
    found = cohort.sum.close().aggregate
    assert found.count == len(chosen)
    step = 1 / cohort.descriptor.scale
    assert np.abs(found.total - expected).max() <= len(chosen) * step + 1e-6


def test_rounding_is_unbiased(party: Party) -> None:
    cohort = party.open(number=fresh_number(party), ring_bits=16, max_weight=1, size=400, level=7)
    vector = np.full(400, 0.3 / cohort.descriptor.scale, np.float32)
    numbers = np.concatenate([cohort.encoded(vector, seed=seed).numbers.copy() for seed in range(50)])
    assert set(numbers.tolist()) == {0, 1}
    assert abs(numbers.mean() - 0.3) < 5 * np.sqrt(0.21 / numbers.size)


@pytest.mark.parametrize("norm", [1.0, 50.0, 1e6])
def test_an_honest_device_clips(party: Party, norm: float) -> None:
    cohort = party.open(number=fresh_number(party), minimum=2)
    for device in party.devices(3):
        cohort.take(cohort.report(device, cohort.encoded(delta(1, norm=norm))))
    total = cohort.sum.close().aggregate.total
    assert np.linalg.norm(total) == pytest.approx(3.0, rel=1e-3)


def test_a_delta_that_overflows_when_it_is_rotated_is_not_sent(party: Party) -> None:
    """Each number and the norm are finite; what a device would send without a look would be noise to the cohort."""
    cohort = party.open(number=fresh_number(party), size=300, rotated=True)
    with np.errstate(over="ignore", invalid="ignore"), pytest.raises(NotFinite):
        cohort.encoded(np.full(300, 3e38, np.float32))


def test_nothing_secret_prints(party: Party) -> None:
    cohort: Cohort = party.open(number=fresh_number(party))
    cleartext = cohort.encoded(delta(1))
    assert repr(cleartext) == f"Cleartext({cleartext.layout.size} bytes)"
    shares = cohort.report(party.device(), cleartext)
    for secret in (shares, party.leader, party.sign, cohort.sum):
        assert "key=" not in repr(secret) and len(repr(secret)) < 120
