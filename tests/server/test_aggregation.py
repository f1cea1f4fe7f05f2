"""What is added is what was sent, in O(model) memory, and nothing that fails is added."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.cohorts import RULES, SHAPES, binding_of, cohort, report_all, sealed
from umbel.errors import MalformedMessage, OutOfBounds, SealBroken, WrongState
from umbel.update import Update
from umbel.weights import Weights
from umbel_server.aggregation import Aggregator, LeaderKey, PlainSum, Presummed, Singles, Spooled, aggregator_for
from umbel_server.flower import StrategySpec
from umbel_server.validation import ReportRules

KEY = LeaderKey.generate()


def totals(aggregator: Aggregator) -> tuple[bytes, float, int, dict[str, float]]:
    collected = aggregator.close()
    numbers = collected.aggregate.total if isinstance(collected, Presummed) else collected.deltas
    return numbers.tobytes(), collected.weight, collected.count, dict(collected.metrics)


@given(order=st.permutations(range(6)))
@settings(max_examples=25, deadline=None)
def test_any_order_gives_the_same_mean_within_float_tolerance(order: list[int]) -> None:
    updates = cohort(6)
    total = PlainSum(KEY, RULES)
    report_all([updates[index] for index in order], KEY, total)
    weight = sum(update.weight for update in updates)
    for name in SHAPES:
        expected = sum(np.float64(update.weight) * update.delta[name].astype(np.float64) for update in updates)
        np.testing.assert_allclose(total.close().aggregate.mean()[name], expected / weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [PlainSum, Spooled])
def test_a_refold_after_a_restart_is_bit_equal_to_an_unbroken_sum(kind: type[PlainSum] | type[Spooled]) -> None:
    updates = cohort(9)
    reports = [sealed(update, KEY, sequence) for sequence, update in enumerate(updates)]
    unbroken = kind(KEY, RULES)
    for report in reports:
        unbroken.accept(report)
    resumed = kind(LeaderKey.from_bytes(KEY.to_bytes()), RULES)
    for report in reports:
        resumed.accept(report)
    assert totals(resumed) == totals(unbroken)


@pytest.mark.parametrize("kind", [PlainSum, Spooled])
def test_a_report_that_fails_leaves_the_sum_unchanged_to_the_bit(kind: type[PlainSum] | type[Spooled]) -> None:
    good = cohort(4)
    aggregator = kind(KEY, RULES)
    report_all(good[:3], KEY, aggregator)
    before = totals(aggregator)
    far = replace(good[3], delta=good[3].delta.scaled(1e30))
    attacks = [
        (sealed(b"\xff\xff", KEY, 3), MalformedMessage),
        (sealed(far, KEY, 3), OutOfBounds),
        (sealed(good[3], KEY, 3, LeaderKey.generate().sealing), SealBroken),
        (replace(sealed(good[3], KEY, 3), binding=binding_of(3, round_number=2)), SealBroken),
        (replace(sealed(good[3], KEY, 3), binding=binding_of(4)), SealBroken),
        (sealed(good[1], KEY, 1), WrongState),
    ]
    for report, error in attacks:
        with pytest.raises(error):
            aggregator.accept(report)
        assert totals(aggregator) == before
    aggregator.accept(sealed(good[3], KEY, 3))
    assert totals(aggregator)[2] == 4


def test_a_spool_gives_back_each_update_as_it_was_sent_and_leaves_no_file(tmp_path: Path) -> None:
    updates = cohort(5)
    spool = Spooled(KEY, RULES, tmp_path)
    report_all(updates, KEY, spool)
    found = spool.close()
    del spool
    assert list(tmp_path.iterdir()) == []
    assert [(one.delta, one.weight, one.metrics) for one in found] == [
        (one.delta, one.weight, one.metrics) for one in updates
    ]
    assert found.weight == sum(update.weight for update in updates)
    assert found.metrics["examples"] == sum(update.metrics["examples"] for update in updates)


def test_an_empty_spool_closes_with_nothing() -> None:
    assert Spooled(KEY, RULES).close().count == 0


def test_singles_in_memory_equal_those_of_a_spool() -> None:
    updates = cohort(3)
    spool = Spooled(KEY, RULES)
    report_all(updates, KEY, spool)
    assert np.array_equal(Singles.of(updates).deltas, spool.close().deltas)


def test_the_memory_of_a_sum_does_not_grow_with_the_cohort() -> None:
    size = 300_000
    rules = ReportRules({"p_w": (size,)}, frozenset(), 10.0, 1e6)
    update = Update(Weights({"p_w": np.ones(size, np.float32)}), 1.0, {})

    def peak(reports: int) -> int:
        total = PlainSum(KEY, rules)
        tracemalloc.start()
        for sequence in range(reports):
            total.accept(sealed(update, KEY, sequence))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)
    assert peak(12) < peak(2) + 4 * size


def test_an_evaluation_sums_metrics_and_has_no_delta() -> None:
    rules = replace(RULES, shapes={})
    total = aggregator_for(StrategySpec("Krum"), KEY, rules)
    report_all([Update(Weights({}), 5.0, {"loss": 2.0, "examples": 5.0})] * 3, KEY, total)
    assert total.close().metrics == {"loss": 6.0, "examples": 15.0}


def test_only_robust_strategies_get_single_updates() -> None:
    assert isinstance(aggregator_for(StrategySpec("FedAdam"), KEY, RULES), PlainSum)
    assert isinstance(aggregator_for(StrategySpec("FedMedian"), KEY, RULES), Spooled)


def test_a_leader_key_does_not_print_its_secret() -> None:
    key = LeaderKey.generate()
    assert key.to_bytes().hex() not in repr(key) + str(key)
    assert key.sealing.key_id in repr(key)


def test_bytes_that_are_no_key_are_refused() -> None:
    with pytest.raises(MalformedMessage):
        LeaderKey.from_bytes(b"short")
