"""Which candidates become versions, and why others don't."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel.errors import MalformedMessage, OutOfBounds
from umbel_server.validation import (
    Accepted,
    CandidateFacts,
    Comparison,
    Refused,
    ValidationPolicy,
    judge_candidate,
)

POLICY = ValidationPolicy()
GOOD = CandidateFacts(finite=True, step_norm=1.0, recent_norms=(0.9, 1.1, 1.0))


def right(candidate: float, parent: float, examples: float = 100.0) -> Comparison:
    return Comparison(
        {"correct": candidate * examples, "examples": examples, "loss": 1.0},
        {"correct": parent * examples, "examples": examples, "loss": 1.0},
    )


def lost(candidate: float, parent: float) -> Comparison:
    return Comparison({"loss": candidate, "examples": 100.0}, {"loss": parent, "examples": 100.0})


@pytest.mark.parametrize(
    "facts",
    [
        GOOD,
        replace(GOOD, recent_norms=(), step_norm=1e9),
        replace(GOOD, step_norm=4.9),
        replace(GOOD, held_out=right(0.86, 0.9), federated=right(0.9, 0.8)),
        replace(GOOD, federated=right(0.0, 1.0, examples=29)),
        replace(GOOD, federated=Comparison({}, {})),
        replace(GOOD, held_out=lost(3.0, 1.0)),
    ],
    ids=["plain", "first step", "within the bound", "not much worse", "too few to tell", "nobody", "loss not asked"],
)
def test_a_candidate_that_nothing_stands_against_is_accepted(facts: CandidateFacts) -> None:
    assert judge_candidate(facts, POLICY) == Accepted()


@pytest.mark.parametrize(
    ("facts", "policy", "says"),
    [
        (replace(GOOD, finite=False), POLICY, "NaN"),
        (replace(GOOD, step_norm=math.inf), POLICY, "NaN or infinity"),
        (replace(GOOD, step_norm=5.1), POLICY, "5 times the median"),
        (replace(GOOD, step_norm=9.0, recent_norms=(100.0, *[1.0] * 5)), POLICY, "the last 5"),
        (replace(GOOD, recent_norms=(), step_norm=2.0), ValidationPolicy(max_step_norm=1.5), "at most 1.5"),
        (replace(GOOD, golden_failure="output 'y' holds NaN"), POLICY, "golden"),
        (replace(GOOD, held_out=right(0.84, 0.9)), POLICY, "held-out data 84.0%"),
        (replace(GOOD, federated=right(0.5, 0.9)), POLICY, "devices' data 50.0%"),
        (replace(GOOD, held_out=lost(1.3, 1.0)), ValidationPolicy(max_loss_ratio=1.2), "the loss is 0.013"),
        (replace(GOOD, held_out=lost(math.nan, 1.0)), ValidationPolicy(max_loss_ratio=1.2), "nan"),
    ],
)
def test_a_refused_candidate_is_told_why(facts: CandidateFacts, policy: ValidationPolicy, says: str) -> None:
    verdict = judge_candidate(facts, policy)
    assert isinstance(verdict, Refused)
    assert says in verdict.reason


def test_bounds_can_be_switched_off() -> None:
    free = ValidationPolicy(max_step_ratio=0.0, max_accuracy_drop=1.0)
    far = replace(GOOD, step_norm=1e6, federated=right(0.0, 1.0))
    assert judge_candidate(far, free) == Accepted()


def test_a_candidate_that_nobody_measured_is_not_held_against_its_parent_whatever_the_policy() -> None:
    nobody = replace(GOOD, federated=right(0.0, 0.0, examples=0.0))
    assert judge_candidate(nobody, ValidationPolicy(least_examples=0, max_loss_ratio=1.0)) == Accepted()


@given(
    ratio=st.floats(0.1, 1e6),
    drop=st.floats(0, 1),
    history=st.integers(1, 100),
    holdout=st.text(alphabet="0123456789abcdef", max_size=64),
)
def test_a_policy_survives_json(ratio: float, drop: float, history: int, holdout: str) -> None:
    policy = ValidationPolicy(max_report_ratio=ratio, max_accuracy_drop=drop, history=history, holdout=holdout)
    assert ValidationPolicy.from_tree(json.loads(json.dumps(policy.to_tree()))) == policy


@pytest.mark.parametrize(
    "tree",
    [{"max_norm": 1.0}, {"history": 1.5}, {"history": True}, {"holdout": 3}, {"max_accuracy_drop": "5%"}],
    ids=str,
)
def test_a_tree_that_is_no_policy_is_refused(tree: dict[str, object]) -> None:
    with pytest.raises(MalformedMessage):
        ValidationPolicy.from_tree(tree)


@pytest.mark.parametrize(
    "tree",
    [{"max_step_ratio": -1.0}, {"max_accuracy_drop": math.nan}, {"history": 0}, {"max_report_ratio": 0.0}],
    ids=str,
)
def test_a_policy_beyond_its_bounds_is_refused(tree: dict[str, object]) -> None:
    with pytest.raises(OutOfBounds):
        ValidationPolicy.from_tree(tree)
