"""The facts about a candidate are what its graphs do on real data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy

from umbel.bundle import Bundle
from umbel.errors import MalformedMessage
from umbel.randomness import generator
from umbel.runtime.onnx import OnnxRuntime
from umbel.weights import Weights
from umbel_models.zoo import bundle_path
from umbel_server.examination import HeldOut, examine
from umbel_server.validation import Accepted, Comparison, Refused, ValidationPolicy, judge_candidate
from umbel_simulations.smartwatch import Windows, load_wearers

RUNTIME = OnnxRuntime()
BUNDLE = Bundle.open(bundle_path("smartwatch"))
BASE = BUNDLE.shared_weights()


@pytest.fixture(scope="module")
def windows() -> Windows:
    return load_wearers()[0].training


@pytest.fixture(scope="module")
def held_out(windows: Windows) -> HeldOut:
    blob = safetensors.numpy.save({"x": windows.x, "y": windows.y})
    return HeldOut.from_bytes(blob, BUNDLE.manifest)


@pytest.fixture(scope="module")
def trained(windows: Windows) -> Weights:
    session = RUNTIME.train(BUNDLE, BASE, {"lr": 0.1})
    order = generator("examination").permutation(len(windows))
    for rows in np.array_split(order, 15):
        session.step({"x": windows.x[rows]}, {"y": windows.y[rows]})
    return session.weights()


def test_a_candidate_that_learned_is_measured_and_accepted(trained: Weights, held_out: HeldOut) -> None:
    facts = examine(BUNDLE, trained, RUNTIME, recent_norms=(1.0,), held_out=held_out)
    assert facts.held_out is not None
    assert facts.held_out.candidate["examples"] == len(held_out)
    assert facts.held_out.candidate["correct"] > facts.held_out.parent["correct"]
    assert facts.step_norm == pytest.approx((trained - BASE).norm())
    assert judge_candidate(facts, ValidationPolicy()) == Accepted()


def test_a_candidate_that_forgot_is_refused_by_the_servers_own_data(trained: Weights, held_out: HeldOut) -> None:
    zeros = Weights.zeros(BASE.shapes)
    swapped = Comparison(held_out.measure(BUNDLE, zeros, RUNTIME), held_out.measure(BUNDLE, trained, RUNTIME))
    facts = replace(examine(BUNDLE, trained, RUNTIME), held_out=swapped)
    assert isinstance(judge_candidate(facts, ValidationPolicy()), Refused)


def test_a_candidate_with_nan_is_refused_without_being_run(trained: Weights) -> None:
    spoilt = {**trained.arrays, "p_head.bias": np.full_like(trained["p_head.bias"], np.nan)}
    verdict = judge_candidate(examine(BUNDLE, Weights(spoilt), RUNTIME), ValidationPolicy())
    assert verdict == Refused("the candidate holds NaN or infinity")


def test_a_candidate_whose_answers_are_not_finite_is_refused(trained: Weights) -> None:
    huge = Weights({name: array * np.float32(1e30) for name, array in trained.arrays.items()})
    verdict = judge_candidate(examine(BUNDLE, huge, RUNTIME), ValidationPolicy())
    assert isinstance(verdict, Refused)
    assert "golden" in verdict.reason


@pytest.mark.parametrize(
    "blob",
    [
        b"no",
        safetensors.numpy.save({"x": np.zeros((2, 6, 100), np.float32)}),
        safetensors.numpy.save({"x": np.zeros((2, 6, 100), np.float32), "y": np.zeros(3, np.int64)}),
        safetensors.numpy.save({"x": np.zeros((), np.float32), "y": np.zeros((), np.int64)}),
    ],
    ids=["no file", "no targets", "different lengths", "no batch"],
)
def test_held_out_data_that_do_not_fit_the_model_are_refused(blob: bytes) -> None:
    with pytest.raises(MalformedMessage):
        HeldOut.from_bytes(blob, BUNDLE.manifest)
