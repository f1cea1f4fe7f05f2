"""Updates add: in any grouping, with a zero, and never across models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from umbel.errors import OutOfBounds, WeightsMismatch
from umbel.update import Aggregate, Update, add_metrics, is_count
from umbel.weights import Weights

SHAPES = {"p_a": (2, 3), "p_b": (), "p_c": (4,)}

# Whole numbers, so that float32 sums are exact and any order gives the same bits.
whole = st.integers(-50, 50).map(np.float32)
updates = st.builds(
    Update,
    delta=st.fixed_dictionaries({n: arrays.arrays(np.float32, s, elements=whole) for n, s in SHAPES.items()}).map(
        Weights
    ),
    weight=st.integers(1, 20).map(float),
    metrics=st.dictionaries(st.sampled_from(["loss", "correct", "examples"]), st.integers(0, 1000).map(float)),
)


def folded(several: Sequence[Update]) -> Aggregate:
    total = Aggregate.zero(SHAPES)
    for update in several:
        total.accumulate(update)
    return total


def same(left: Aggregate, right: Aggregate) -> bool:
    return (
        left.shapes == right.shapes
        and np.array_equal(left.total, right.total)
        and (left.weight, left.count) == (right.weight, right.count)
        and add_metrics(left.metrics, {}) == add_metrics(right.metrics, {})
    )


@given(st.lists(updates, max_size=6), st.integers(0, 6))
def test_a_fold_may_be_split_anywhere(several: list[Update], cut: int) -> None:
    assert same(folded(several[:cut]) + folded(several[cut:]), folded(several))


@given(st.lists(updates, max_size=5), st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(several: list[Update], chance: object) -> None:
    shuffled = sorted(several, key=lambda update: chance.random())  # type: ignore[attr-defined]
    assert same(folded(shuffled), folded(several))


@given(st.lists(updates, max_size=4))
def test_nobody_adds_nothing(several: list[Update]) -> None:
    total = folded(several)
    assert same(total + Aggregate.zero(SHAPES), total)
    assert same(Aggregate.zero(SHAPES) + total, total)


@given(st.lists(updates, min_size=1, max_size=5))
def test_the_mean_is_weighted_by_examples(several: list[Update]) -> None:
    mean = folded(several).mean()
    stacked = np.stack([update.delta.to_vector() for update in several]).astype(np.float64)
    expected = np.average(stacked, axis=0, weights=[update.weight for update in several])
    np.testing.assert_allclose(mean.to_vector(), expected, rtol=1e-5, atol=1e-5)
    assert mean.shapes == SHAPES


def test_a_mean_over_nobody_is_refused() -> None:
    with pytest.raises(OutOfBounds, match="no weight"):
        Aggregate.zero(SHAPES).mean()


@pytest.mark.parametrize(
    "shapes",
    [
        {"p_a": (2, 3), "p_b": ()},
        {**SHAPES, "p_d": (1,)},
        {**SHAPES, "p_a": (3, 2)},
        {**SHAPES, "p_a": (6,)},
        {**SHAPES, "p_c": (5,)},
        {},
    ],
    ids=["missing", "extra", "turned", "flat", "longer", "empty"],
)
def test_an_update_of_another_model_is_refused_and_the_sum_stays(shapes: dict[str, tuple[int, ...]]) -> None:
    ones = Update(Weights({n: np.ones(s, np.float32) for n, s in SHAPES.items()}), 2.0, {"loss": 1.0})
    total, untouched = folded([ones]), folded([ones])
    with pytest.raises(WeightsMismatch):
        total.accumulate(Update(Weights.zeros(shapes), 1.0, {"loss": 9.0}))
    with pytest.raises(WeightsMismatch):
        total + Aggregate.zero(shapes)
    assert same(total, untouched)


def test_adding_two_sums_changes_neither() -> None:
    one = Update(Weights({n: np.ones(s, np.float32) for n, s in SHAPES.items()}), 2.0, {"loss": 1.0})
    left, right, again = folded([one]), folded([one, one]), folded([one])
    total = left + right
    total.accumulate(one)
    assert same(left, again)
    assert right.count == 2


def test_an_evaluation_adds_metrics_alone() -> None:
    total = Aggregate.zero({})
    total.accumulate(Update(Weights({}), 80.0, {"correct": 60.0, "examples": 80.0}))
    total.accumulate(Update(Weights({}), 20.0, {"correct": 15.0, "examples": 20.0}))
    assert (total.metrics["correct"], total.metrics["examples"], total.count) == (75.0, 100.0, 2)


def test_whatever_counts_examples_is_known_by_its_name() -> None:
    assert all(map(is_count, ("examples", "correct", "train_examples", "age[0]", "age[17]")))
    assert not any(map(is_count, ("loss", "train_loss", "age", "age[]", "age[0]s", "age[-1]")))
