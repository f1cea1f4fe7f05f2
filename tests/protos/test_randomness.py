"""Chance is the same for the same purpose, on every machine, and different for every other."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from umbel.randomness import generator
from umbel.visit import RetryWindow

GOLDEN_INTEGERS = [955440005, 641913686, 1811642897, 1769447358]
GOLDEN_PERMUTATION = [0, 4, 1, 2, 3, 5]

purposes = st.lists(st.text(max_size=8) | st.integers(-(2**70), 2**70), max_size=4).map(tuple)


def test_the_numbers_are_these_for_ever() -> None:
    """A run of today can be told again by a later version."""
    assert generator(7, "exercises", 3, "0123abcd").integers(0, 2**32, 4).tolist() == GOLDEN_INTEGERS
    assert generator().permutation(6).tolist() == GOLDEN_PERMUTATION


@given(purposes)
def test_one_purpose_draws_the_same_at_every_call(purpose: tuple[str | int, ...]) -> None:
    assert np.array_equal(generator(*purpose).random(8), generator(*purpose).random(8))


@given(purposes, purposes)
def test_two_purposes_never_share_their_numbers(left: tuple[str | int, ...], right: tuple[str | int, ...]) -> None:
    assume(left != right)
    assert not np.array_equal(generator(*left).random(4), generator(*right).random(4))


def test_a_number_and_its_digits_are_different_purposes() -> None:
    assert generator(1).random() != generator("1").random()


def test_letters_cannot_wander_between_the_parts() -> None:
    assert len({generator(*parts).random() for parts in (("ab", "c"), ("a", "bc"), ("abc",), ("", "abc"))}) == 4


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.integers(0, 100))
def test_a_device_comes_back_inside_its_window(start: float, width: float, seed: int) -> None:
    window = RetryWindow(start, start + width)
    moment = window.draw(generator(seed), now=1000.0)
    assert 1000.0 + window.earliest <= moment <= 1000.0 + window.latest


def test_devices_told_the_same_window_spread_over_it() -> None:
    moments = [RetryWindow(0, 100).draw(generator("device", number), now=0.0) for number in range(200)]
    tenths = np.histogram(moments, bins=10, range=(0, 100))[0]
    assert tenths.min() > 0
