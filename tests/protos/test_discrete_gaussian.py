"""The noise is the discrete Gaussian: by its distribution, by its exact path, and by having no float in it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import pytest

from umbel.discrete_gaussian import MAX_VARIANCE, discrete_gaussian
from umbel.errors import OutOfBounds


def entropy(seed: str) -> Callable[[int], bytes]:
    """Bytes told again in every run."""
    state = [0]

    def draw(size: int) -> bytes:
        state[0] += 1
        return hashlib.shake_128(f"{seed}/{state[0]}".encode()).digest(size)

    return draw


def chi_squared(values: np.ndarray, variance: int) -> float:
    """Against the exact probabilities, in standard deviations from its mean."""
    reach = math.ceil(3.5 * math.sqrt(variance)) + 1
    weights = {x: math.exp(-x * x / (2 * variance)) for x in range(-20 * reach, 20 * reach + 1)}
    norm, statistic, cells = sum(weights.values()), 0.0, 0
    for x in range(-reach, reach + 1):
        expected = len(values) * weights[x] / norm
        if expected >= 5:
            statistic += (np.count_nonzero(values == x) - expected) ** 2 / expected
            cells += 1
    return (statistic - cells) / math.sqrt(2 * cells)


@pytest.mark.parametrize("variance", [1, 2, 7, 100, 2500])
def test_it_is_distributed_as_it_should_be(variance: int) -> None:
    values = discrete_gaussian(variance, 200_000, entropy(f"fast {variance}"))
    assert values.dtype == np.int64
    assert abs(chi_squared(values, variance)) < 5


@pytest.mark.parametrize("variance", [1, 7, 30])
def test_the_exact_path_alone_gives_the_same_distribution(variance: int) -> None:
    """With a slack of 1 no decision is left to float64."""
    values = discrete_gaussian(variance, 1500, entropy(f"exact {variance}"), slack=1.0)
    assert abs(chi_squared(values, variance)) < 5


def test_the_exact_path_decides_as_the_fast_one_does() -> None:
    fast = discrete_gaussian(50, 400, entropy("same"))
    # A wider zone takes more bits only for draws inside of it; with a stream of its own each decision is the same.
    slow = discrete_gaussian(50, 400, entropy("same"), slack=2.0**-40)
    np.testing.assert_array_equal(fast, slow)


@pytest.mark.parametrize("variance", [10**4, 10**8, 10**12, MAX_VARIANCE])
def test_its_moments_are_right_at_any_scale(variance: int) -> None:
    values = discrete_gaussian(variance, 100_000, entropy(f"moments {variance}")) / math.sqrt(variance)
    assert abs(values.mean()) < 5 / math.sqrt(100_000)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / 100_000)
    assert abs((values**4).mean() - 3) < 0.3
    assert np.abs(values).max() < 6.5


def test_all_low_bits_of_wide_noise_are_uniform() -> None:
    """Noise made of scaled floats would leave its low bits empty."""
    values = discrete_gaussian(10**16, 100_000, entropy("bits"))
    for bit in range(16):
        share = ((values >> bit) & 1).mean()
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(100_000)


def test_none_is_none() -> None:
    assert discrete_gaussian(1, 0, entropy("none")).size == 0


@pytest.mark.parametrize("variance", [0, -1, MAX_VARIANCE + 1])
def test_a_variance_out_of_bounds_is_refused(variance: int) -> None:
    with pytest.raises(OutOfBounds):
        discrete_gaussian(variance, 1, entropy("bad"))
