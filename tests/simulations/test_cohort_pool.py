"""Results come in the order of the items, whoever is ready first."""

from __future__ import annotations

from threading import Event

import pytest

from umbel.bundle import Bundle
from umbel.errors import OutOfBounds
from umbel_simulations.cohort.clients import Worker
from umbel_simulations.cohort.pool import Pool
from umbel_simulations.cohort.resident import OnnxBackend


def test_results_are_taken_in_order_although_the_first_is_ready_last(tiny_bundle: Bundle) -> None:
    last_began, taken = Event(), []

    def work(_worker: Worker, item: int) -> int:
        if item == 0:
            assert last_began.wait(10)
        if item == 4:
            last_began.set()
        return item * item

    with Pool(OnnxBackend(tiny_bundle), 2) as pool:
        pool.each(range(5), work, lambda item, result: taken.append((item, result)))
    assert taken == [(0, 0), (1, 1), (2, 4), (3, 9), (4, 16)]


def test_nobody_runs_far_ahead_of_an_item_that_takes_long(tiny_bundle: Bundle) -> None:
    begun: list[int] = []
    most_ahead, taken = [0], [0]

    def work(_worker: Worker, item: int) -> int:
        begun.append(item)
        most_ahead[0] = max(most_ahead[0], len(begun) - taken[0])
        return item

    def take(_item: int, _result: int) -> None:
        taken[0] += 1

    with Pool(OnnxBackend(tiny_bundle), 2) as pool:
        pool.each(range(200), work, take)
    assert len(begun) == 200
    assert most_ahead[0] <= 2 * 4 + 2


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_stops_the_rest_and_is_raised(tiny_bundle: Bundle, workers: int) -> None:
    begun: list[int] = []

    def work(_worker: Worker, item: int) -> int:
        begun.append(item)
        if item == 3:
            raise LookupError("the third")
        return item

    with pytest.raises(LookupError, match="the third"), Pool(OnnxBackend(tiny_bundle), workers) as pool:
        pool.each(range(1000), work, lambda _item, _result: None)
    assert len(begun) < 100


def test_a_pool_of_nobody_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(OutOfBounds):
        Pool(OnnxBackend(tiny_bundle), 0)
