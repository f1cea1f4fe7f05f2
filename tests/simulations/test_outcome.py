"""An outcome's text is the same for the same run, and a changed one is found out."""

import dataclasses
import math

import pytest

from umbel.errors import MalformedMessage
from umbel_simulations.outcome import Cost, HourOutcome, Outcome, RoundOutcome, Spread, from_json, mean_of, to_json
from umbel_simulations.scenario import Data, Scenario, to_tree


def an_outcome() -> Outcome:
    return Outcome(
        scenario=to_tree(Scenario("small", "smartwatch", Data("smartwatch"))),
        engine="cohort",
        seed=3,
        hours=0.5,
        rounds=(RoundOutcome(1, "accepted", 0.0, 0.25, 13, 10, accuracy=0.5, loss=1.25),),
        weights="ab",
        accuracy=0.5,
        per_device={"seconds": Spread.of([1.0, 2.0, 4.0]) or pytest.fail()},
        hourly=(HourOutcome(0, 5, 3, 2, 1),),
        shapes={"-v[]+^": 2},
    )


def test_a_report_comes_back_as_it_was() -> None:
    cost = Cost(1.5, 0.25, 2, 100.0)
    assert from_json(to_json(an_outcome(), cost)) == (an_outcome(), cost)


def test_what_it_cost_is_no_part_of_its_digest() -> None:
    quick, slow = (from_json(to_json(an_outcome(), Cost(seconds, 0.1, 1, 1.0)))[0] for seconds in (1.0, 9.0))
    assert quick.digest() == slow.digest()
    assert quick.digest() != dataclasses.replace(quick, wasted=1).digest()


def test_a_changed_report_is_refused() -> None:
    text = to_json(an_outcome())
    with pytest.raises(MalformedMessage, match="changed after it was written"):
        from_json(text.replace('"reported":10', '"reported":11'))
    with pytest.raises(MalformedMessage, match=r"outcome\.hours.*finite number"):
        from_json(text.replace('"hours":0.5', '"hours":Infinity'))
    with pytest.raises(MalformedMessage, match=r"outcome\.seed"):
        from_json(text.replace('"seed":3', '"seed":"three"'))


def test_a_loss_that_is_no_number_any_more_is_none_measured_and_the_report_is_written() -> None:
    """A model that has diverged may still be a version: its weights are finite, and so are its golden answers."""
    assert mean_of({"loss": 3.0, "examples": 4.0}, "loss") == 0.75
    lost = [mean_of({"loss": loss, "examples": 4.0}, "loss") for loss in (math.inf, -math.inf, math.nan)]
    assert lost == [mean_of({}, "loss"), mean_of({"loss": 0.0, "examples": 0.0}, "loss"), None] == [None] * 3
    assert from_json(to_json(dataclasses.replace(an_outcome(), loss=lost[0])))[0].loss is None


def test_the_spread_of_nothing_is_none() -> None:
    assert Spread.of([]) is None
    assert Spread.of([3.0]) == Spread(1, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0)
