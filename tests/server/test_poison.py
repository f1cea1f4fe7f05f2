"""One device that lies, in every way that was seen to kill or to own a Flower run, against a mean and against Krum.

Each attack gets a typed error, and the round ends as it would have ended without that device.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.server.cohorts import FEATURES, RULES, ZERO, cohort, report_all, sealed
from umbel.errors import BadInput, NotFinite, OutOfBounds, UmbelError, WeightsMismatch
from umbel.messages import update_to_bytes
from umbel.update import Update
from umbel.v1 import device_pb2 as pb
from umbel.weights import Weights
from umbel_server.aggregation import Aggregator, LeaderKey, aggregator_for
from umbel_server.flower import StrategySpec, apply
from umbel_server.validation import require_report

KEY = LeaderKey.generate()
GOOD = cohort(5)
HONEST = cohort(6)[5]
STRATEGIES = [StrategySpec("FedAvg"), StrategySpec("Krum", {"num_malicious_nodes": 1})]


def with_slope(slope: object) -> Update:
    return replace(HONEST, delta=Weights({"p_bias": HONEST.delta["p_bias"], "p_slope": np.asarray(slope)}))


def with_metrics(**changes: float) -> Update:
    return replace(HONEST, metrics={**HONEST.metrics, **changes})


def as_float64(update: Update) -> bytes:
    body = pb.UpdateBody.FromString(update_to_bytes(update))
    body.delta = update.delta.to_vector().astype("<f8").tobytes()
    return body.SerializeToString()


EXTRA = Weights({**HONEST.delta.arrays, "p_extra": np.zeros(3)})
ATTACKS: dict[str, tuple[Update | bytes, type[UmbelError]]] = {
    "nan": (with_slope(np.full(FEATURES, np.nan)), NotFinite),
    "infinity": (with_slope(np.full(FEATURES, np.inf)), NotFinite),
    "one number too many": (with_slope(np.zeros(FEATURES + 1)), WeightsMismatch),
    "a shape that would be broadcast": (with_slope(np.zeros(1)), WeightsMismatch),
    "a missing array": (replace(HONEST, delta=HONEST.delta.subset(["p_slope"])), WeightsMismatch),
    "one array too many": (replace(HONEST, delta=EXTRA), WeightsMismatch),
    "float64": (as_float64(HONEST), WeightsMismatch),
    "bytes that are no numbers": (pb.UpdateBody(delta=b"abc", weight=1.0).SerializeToString(), WeightsMismatch),
    "huge values": (with_slope(np.full(FEATURES, 1e30)), OutOfBounds),
    "values whose squares overflow": (with_slope(np.full(FEATURES, 3e38)), OutOfBounds),
    "weight -600": (replace(HONEST, weight=-600.0), OutOfBounds),
    "weight 0": (replace(HONEST, weight=0.0), OutOfBounds),
    "weight 1e12": (replace(HONEST, weight=1e12), OutOfBounds),
    "weight nan": (replace(HONEST, weight=math.nan), NotFinite),
    "one metric too many": (with_metrics(x=1.0), BadInput),
    "an infinite metric": (with_metrics(loss=math.inf), NotFinite),
    "a count below zero": (with_metrics(examples=-1.0), OutOfBounds),
    "a count beyond any device": (with_metrics(examples=1e12), OutOfBounds),
}


def round_of(strategy: StrategySpec, aggregator: Aggregator) -> bytes:
    weights, _ = apply(strategy, b"", ZERO, aggregator.close(), 1)
    return weights.to_bytes()


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda spec: spec.name)
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_poisoned_report_is_refused_and_the_round_ends_as_without_it(attack: str, strategy: StrategySpec) -> None:
    poison, error = ATTACKS[attack]
    attacked, clean = (aggregator_for(strategy, KEY, RULES) for _ in range(2))
    report_all(GOOD[:3], KEY, attacked)
    with pytest.raises(error):
        attacked.accept(sealed(poison, KEY, 3))
    for sequence, update in enumerate(GOOD[3:], 4):
        attacked.accept(sealed(update, KEY, sequence))
    report_all(GOOD, KEY, clean)
    assert round_of(strategy, attacked) == round_of(strategy, clean)


@pytest.mark.parametrize("attack", [name for name, (poison, _) in ATTACKS.items() if isinstance(poison, Update)])
def test_a_poisoned_update_that_never_was_bytes_is_refused_too(attack: str) -> None:
    poison, error = ATTACKS[attack]
    assert isinstance(poison, Update)
    with pytest.raises(error):
        require_report(poison, RULES)


def test_more_right_answers_than_examples_are_refused() -> None:
    rules = replace(RULES, metrics=RULES.metrics | {"correct"})
    with pytest.raises(OutOfBounds):
        require_report(with_metrics(correct=HONEST.metrics["examples"] + 1), rules)


@pytest.mark.parametrize("spoilt", [{"train_loss": -1.0}, {"train_examples": 0.0}])
def test_a_metric_that_a_strategy_reckons_with_must_make_sense(spoilt: dict[str, float]) -> None:
    rules = replace(RULES, required=frozenset({"train_loss", "train_examples"}))
    require_report(HONEST, rules)
    with pytest.raises(OutOfBounds):
        require_report(with_metrics(**spoilt), rules)
    with pytest.raises(OutOfBounds):
        require_report(replace(HONEST, metrics={}), rules)


def test_the_good_reports_are_good() -> None:
    for update in (*GOOD, HONEST):
        require_report(update, RULES)
