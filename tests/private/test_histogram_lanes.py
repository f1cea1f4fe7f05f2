"""To whoever measures noise a histogram is one metric: a device moves its bins by one bound, whatever a graph says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.private.parties import Party, delta
from umbel.clip_vote import VOTE, WITHIN_CLIP
from umbel.descriptor import Lane, RoundDescriptor, noise_multiplier
from umbel.errors import NotFinite
from umbel.plan import Kind
from umbel.ring import LANE_FRACTION_BITS
from umbel.secure_sum import encode_update
from umbel_server.privacy import with_noise

UNIT = 1 << LANE_FRACTION_BITS
BINS = tuple(f"age[{place}]" for place in range(4))


def describe(bound: float = 50.0, others: tuple[str, ...] = ("loss", "correct")) -> RoundDescriptor:
    lanes = tuple(Lane(name, bound) for name in (*others, *BINS))
    return Party().describe(size=100, max_weight=1, lanes=lanes)


def sent(descriptor: RoundDescriptor, counts: list[float], loss: float = 1.0) -> NDArray[np.int64]:
    """What one device puts into the bins, in the lanes' units."""
    metrics = {"loss": loss, "correct": 1.0, **dict(zip(BINS, counts, strict=True))}
    clear = encode_update(descriptor, delta(1, 100), 1, metrics, np.random.default_rng(1))
    return clear.lanes[3:].astype(np.int64)


@settings(deadline=None)  # other tests may have the machine
@given(
    st.lists(st.floats(-1e300, 1e300), min_size=4, max_size=4),
    st.sampled_from([0.3, 1.0, 50.0, 1e6]) | st.floats(1e-3, 1e6),
)
def test_no_counts_move_the_sum_by_more_than_the_bound_that_noise_is_measured_against(
    counts: list[float], bound: float
) -> None:
    """An attacker may train on graphs of its own, whose bins are anything at all."""
    bins = sent(describe(bound), counts)
    assert (bins >= 0).all()
    assert bins.sum() <= bound * UNIT


def test_a_device_with_many_examples_keeps_its_shares() -> None:
    np.testing.assert_allclose(sent(describe(), [600.0, 0.0, 300.0, 100.0]) / UNIT, [30.0, 0.0, 15.0, 5.0], atol=1e-4)
    np.testing.assert_array_equal(sent(describe(), [6.0, 0.0, 3.5, 1.0]), np.array([6.0, 0.0, 3.5, 1.0]) * UNIT)


def test_other_metrics_keep_bounds_of_their_own() -> None:
    descriptor = describe()
    metrics = {"loss": -1e9, "correct": 1e9} | dict.fromkeys(BINS, 1e9)
    clear = encode_update(descriptor, delta(1, 100), 1, metrics, np.random.default_rng(1))
    assert clear.lanes[1:3].astype(np.int64).tolist() == [-50 * UNIT, 50 * UNIT]


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_count_that_is_no_number_is_not_sent(odd: float) -> None:
    with pytest.raises(NotFinite):
        sent(describe(), [1.0, odd, 1.0, 1.0])


def test_a_histogram_gets_as_little_noise_as_one_metric_and_costs_as_much() -> None:
    noisy = with_noise(describe(), 2.0)
    three = with_noise(replace(describe(), lanes=tuple(Lane(name, 50.0) for name in ("loss", "correct", "age"))), 2.0)
    assert {lane.noise_variance for lane in noisy.lanes} == {lane.noise_variance for lane in three.lanes}
    assert noise_multiplier(noisy) == pytest.approx(2.0, rel=1e-3) and noise_multiplier(noisy) >= 2.0 * (1 - 1e-9)


def test_the_bin_with_the_least_noise_and_the_one_with_the_largest_bound_say_what_a_histogram_costs() -> None:
    """A leader that saves noise on one bin, where all of a device's examples may lie, is found out."""
    noisy = with_noise(describe(), 2.0)
    *others, last = noisy.lanes
    saved = replace(noisy, lanes=(*others, replace(last, noise_variance=last.noise_variance // 100)))
    assert noise_multiplier(saved) < 0.7
    assert noise_multiplier(replace(noisy, lanes=(*others, replace(last, noise_variance=0)))) == 0.0
    wide = replace(noisy, lanes=(*others, replace(last, bound=last.bound * 100)))
    assert noise_multiplier(wide) < 0.1


def test_a_histogram_named_like_a_metric_leaves_that_alone() -> None:
    lanes = tuple(Lane(name, 50.0) for name in ("loss", "loss[0]", "loss[1]"))
    descriptor = Party().describe(size=100, max_weight=1, lanes=lanes)
    metrics = {"loss": -40.0, "loss[0]": 30.0, "loss[1]": 20.0}
    clear = encode_update(descriptor, delta(1, 100), 1, metrics, np.random.default_rng(1))
    assert (clear.lanes[1:].astype(np.int64) / UNIT).tolist() == [-40.0, 30.0, 20.0]


def test_votes_that_a_leader_calls_like_a_histogram_are_paid_for_beside_it() -> None:
    """A vote is cast whatever the bins hold, so one noise for both would hide less than is said."""
    alone = with_noise(describe(bound=VOTE, others=()), 2.0).lanes
    votes = replace(alone[0], name=WITHIN_CLIP)
    named = tuple(replace(lane, name=f"{WITHIN_CLIP}[{place}]") for place, lane in enumerate(alone))
    bare = describe(others=())
    both = replace(bare, size=0, sent=0, kind=Kind.EVALUATE, lanes=(votes, *named))
    either = replace(both, lanes=named)
    assert noise_multiplier(both) == pytest.approx(noise_multiplier(either) / math.sqrt(2))


def test_what_is_summed_in_secret_is_what_devices_counted() -> None:
    party = Party()
    cohort = party.open(size=100, lanes=(Lane("loss", 50.0), *(Lane(name, 50.0) for name in BINS)))
    for number, device in enumerate(party.devices(4)):
        metrics = {"loss": 1.0, **dict.fromkeys(BINS, float(number))}
        cohort.take(cohort.report(device, cohort.encoded(delta(number, 100), **metrics)))
    found = cohort.sum.close().aggregate.metrics
    assert [found[name] for name in BINS] == [6.0] * 4 and found["loss"] == 4.0
