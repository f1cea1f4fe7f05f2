"""Cutting data into users loses nothing and gives nothing twice, and the same seed cuts the same."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.errors import OutOfBounds
from umbel.randomness import generator
from umbel_simulations.data.partition import LEAST, by_label, dirichlet, iid

KINDS = {
    "iid": lambda labels, users, chance: iid(len(labels), users, chance),
    "dirichlet": lambda labels, users, chance: dirichlet(labels, users, 0.1, chance),
    "by-label": lambda labels, users, chance: by_label(labels, users, 2, chance),
}


def _labels(count: int, kinds: int, seed: int) -> np.ndarray:
    return generator(seed, "labels").integers(0, kinds, count)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(1, 12), st.integers(1, 10), st.integers(0, 2**32))
def test_every_row_goes_to_one_user_once(kind: str, users: int, kinds: int, seed: int) -> None:
    labels = _labels(users * 2 * LEAST + seed % 50, kinds, seed)
    parts = KINDS[kind](labels, users, generator(seed, kind))
    assert len(parts) == users
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert min(len(part) for part in parts) >= LEAST


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_same_seed_cuts_the_same_and_another_doesnt(kind: str) -> None:
    labels = _labels(400, 10, 1)
    once, again, other = (KINDS[kind](labels, 8, generator(seed, kind)) for seed in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(once, other, strict=True))


def test_a_small_alpha_leaves_users_few_labels_and_a_large_one_many() -> None:
    labels = _labels(4000, 10, 2)

    def labels_for_most(alpha: float) -> float:
        parts = dirichlet(labels, 20, alpha, generator(3))
        return float(
            np.mean([np.sort(np.bincount(labels[part], minlength=10))[-2:].sum() / len(part) for part in parts])
        )

    assert labels_for_most(0.05) > 0.8
    assert labels_for_most(100.0) < 0.35


def test_by_label_gives_each_user_the_labels_it_asked_for() -> None:
    labels = np.repeat(np.arange(10), 40)
    parts = by_label(labels, 10, 2, generator(4))
    assert all(len(set(labels[part].tolist())) <= 2 for part in parts)


def test_too_many_users_for_the_data_are_refused() -> None:
    for cut in KINDS.values():
        with pytest.raises(OutOfBounds, match="fewer users"):
            cut(np.zeros(20, np.int64), 5, generator(0))
    with pytest.raises(OutOfBounds, match="fewer users or labels"):
        by_label(np.zeros(99, np.int64), 4, 5, generator(0))
    assert [len(part) for part in by_label(np.zeros(100, np.int64), 4, 5, generator(0))] == [25] * 4
