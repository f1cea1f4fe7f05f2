"""What holds of every runtime behind the seam: answers, judges and trains; refuses without losing what it has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.protos.watch import WATCH, batch
from umbel.errors import InputMismatch, NotFinite, OutOfBounds, RuntimeFailure, WeightsMismatch
from umbel.runtime import Runtime
from umbel.runtime.litert import LiteRTRuntime
from umbel.runtime.onnx import OnnxRuntime
from umbel.self_check import verify_golden
from umbel.weights import Weights

START = WATCH.shared_weights()


@pytest.fixture(params=[OnnxRuntime, LiteRTRuntime], ids=["onnx", "litert"])
def runtime(request: pytest.FixtureRequest) -> Runtime:
    made: Runtime = request.param()
    return made


def test_the_packaged_model_answers_its_golden_examples(runtime: Runtime) -> None:
    assert verify_golden(runtime, WATCH) < 1e-5


def test_training_goes_on_through_batches_of_any_size(runtime: Runtime) -> None:
    other = OnnxRuntime().train(WATCH, START)
    session = runtime.train(WATCH, START)
    for size in (8, 3, 1, 8, 5):
        assert session.step(*batch(size, size)) == pytest.approx(other.step(*batch(size, size)), abs=1e-5)
    assert (session.weights() - other.weights()).norm() < 1e-4


def test_other_weights_give_other_answers_from_the_same_graph(runtime: Runtime) -> None:
    inputs, _ = batch(3)
    first = runtime.infer(WATCH, START)(inputs)["logits"]
    second = runtime.infer(WATCH, START.scaled(2.0))(inputs)["logits"]
    assert not np.allclose(first, second)


def test_metrics_are_sums_so_that_they_add_over_batches(runtime: Runtime) -> None:
    judge = runtime.evaluate(WATCH, START)
    inputs, targets = batch(12)
    whole = judge(inputs, targets)
    parts = [judge({"x": inputs["x"][rows]}, {"y": targets["y"][rows]}) for rows in (slice(0, 5), slice(5, 12))]
    assert whole["examples"] == 12
    for name in WATCH.manifest.metrics:
        assert whole[name] == pytest.approx(sum(part[name] for part in parts), rel=1e-5)


def test_metrics_are_what_the_answers_say(runtime: Runtime) -> None:
    inputs, targets = batch(9)
    logits = runtime.infer(WATCH, START)(inputs)["logits"].astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    found = runtime.evaluate(WATCH, START)(inputs, targets)
    assert found["loss"] == pytest.approx(-logs[np.arange(9), targets["y"]].sum(), rel=1e-5)
    assert found["correct"] == (logits.argmax(1) == targets["y"]).sum()


def test_a_step_follows_the_slope_of_the_loss(runtime: Runtime) -> None:
    inputs, targets = batch(8)
    session = runtime.train(WATCH, START, {"lr": 1.0})
    session.step(inputs, targets)
    gradient = START - session.weights()

    def loss(weights: Weights) -> float:
        return runtime.evaluate(WATCH, weights)(inputs, targets)["loss"] / 8

    direction = gradient.scaled(1 / gradient.norm())
    slope = (loss(START + direction.scaled(1e-2)) - loss(START - direction.scaled(1e-2))) / 2e-2
    assert slope == pytest.approx(gradient.norm(), rel=0.02)


def test_training_learns_what_it_is_shown_and_leaves_its_start_alone(runtime: Runtime) -> None:
    inputs, targets = batch(14)
    before = START.to_bytes()
    session = runtime.train(WATCH, START)
    losses = [session.step(inputs, targets) for _ in range(60)]
    assert losses[-1] < 0.1 * losses[0]
    assert runtime.evaluate(WATCH, session.weights())(inputs, targets)["correct"] == 14
    assert START.to_bytes() == before


def test_weights_handed_out_do_not_change_with_later_steps(runtime: Runtime) -> None:
    inputs, targets = batch(4)
    session = runtime.train(WATCH, START)
    session.step(inputs, targets)
    handed = session.weights(), session.slots()
    copies = [one.to_bytes() for one in handed]
    session.step(inputs, targets)
    session.step(inputs, targets)
    assert [one.to_bytes() for one in handed] == copies


def test_two_sessions_of_one_runtime_do_not_touch_each_other(runtime: Runtime) -> None:
    (inputs, targets), (others, answers) = batch(8, 1), batch(5, 2)
    alone, first, second = (runtime.train(WATCH, START) for _ in range(3))
    for _ in range(5):
        alone.step(inputs, targets)
    for _ in range(5):
        first.step(inputs, targets)
        second.step(others, answers)
    assert first.weights() == alone.weights()
    assert second.weights() != alone.weights()


def test_the_anchor_is_where_training_started(runtime: Runtime) -> None:
    slots = runtime.train(WATCH, START).slots()
    assert set(slots) == {"s_anchor_" + name.removeprefix("p_") for name in START}
    assert np.array_equal(slots["s_anchor_head.bias"], START["p_head.bias"])


class StopAndGo(RuleBasedStateMachine):
    """However often training is put away and taken up again, its bits are those of an unbroken run."""

    runtime: Runtime

    @initialize()
    def begin(self) -> None:
        self.unbroken = self.runtime.train(WATCH, START, {"mu": 0.1})
        self.broken = self.runtime.train(WATCH, START, {"mu": 0.1})

    @rule(size=st.integers(1, 4), seed=st.integers(0, 5))
    def step(self, size: int, seed: int) -> None:
        assert self.unbroken.step(*batch(size, seed)) == self.broken.step(*batch(size, seed))

    @rule()
    def put_away_and_take_up(self) -> None:
        weights, slots = self.broken.weights(), self.broken.slots()
        weights, slots = Weights.from_bytes(weights.to_bytes()), Weights.from_bytes(slots.to_bytes())
        self.broken = type(self.runtime)().train(WATCH, weights, {"mu": 0.1}, slots)

    @rule()
    def spoil_a_step(self) -> None:
        inputs, targets = batch(2)
        with pytest.raises(NotFinite):
            self.broken.step({"x": np.full_like(inputs["x"], np.nan)}, targets)
        with pytest.raises(RuntimeFailure):
            self.broken.step(inputs, {"y": np.array([0, 99])})
        with pytest.raises(RuntimeFailure):
            self.broken.step(inputs, {"y": np.array([0, -1])})

    @invariant()
    def both_hold_the_same(self) -> None:
        assert self.unbroken.weights() == self.broken.weights()
        assert self.unbroken.slots() == self.broken.slots()


class OnnxStopAndGo(StopAndGo):
    runtime = OnnxRuntime()


class LiteRTStopAndGo(StopAndGo):
    runtime = LiteRTRuntime()


SETTINGS = settings(max_examples=15, stateful_step_count=12, deadline=None)
TestOnnxStopAndGo, TestLiteRTStopAndGo = OnnxStopAndGo.TestCase, LiteRTStopAndGo.TestCase
TestOnnxStopAndGo.settings = TestLiteRTStopAndGo.settings = SETTINGS


X, Y = (next(iter(part.values())) for part in batch(4))
MISMATCHES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no input": ({}, {"y": Y}, "input 'x' is missing"),
    "an input too many": ({"x": X, "z": X}, {"y": Y}, r"\['z'\]"),
    "a list": ({"x": X.tolist()}, {"y": Y}, "is a list"),
    "another dtype": ({"x": X.astype(np.float64)}, {"y": Y}, r"float64 \[4, 6, 100\]"),
    "another byte order": ({"x": X.astype(">f4")}, {"y": Y}, "'x' is >f4"),
    "another shape": ({"x": X[:, :5]}, {"y": Y}, r"give float32 \[batch, 6, 100\]"),
    "one example without its batch": ({"x": X[0]}, {"y": Y}, "batch, 6, 100"),
    "a number": ({"x": np.array(1, np.float32)}, {"y": Y}, "batch, 6, 100"),
    "masked numbers": ({"x": np.ma.masked_less(X, 0)}, {"y": Y}, "masked in parts"),
    "no example": ({"x": X[:0]}, {"y": Y[:0]}, "no example"),
    "labels of another dtype": ({"x": X}, {"y": Y.astype(np.int32)}, "target 'y' is int32"),
    "fewer labels": ({"x": X}, {"y": Y[:3]}, "4 examples with targets for 3"),
    "no labels": ({"x": X}, {}, "target 'y' is missing"),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_what_the_model_does_not_take_is_refused_in_words(runtime: Runtime, what: str) -> None:
    inputs, targets, match = MISMATCHES[what]
    session = runtime.train(WATCH, START)
    with pytest.raises(InputMismatch, match=match):
        session.step(inputs, targets)
    assert session.weights() == START
    with pytest.raises(InputMismatch, match=match):
        runtime.evaluate(WATCH, START)(inputs, targets)


def test_inference_checks_its_inputs_too(runtime: Runtime) -> None:
    session = runtime.infer(WATCH, START)
    with pytest.raises(InputMismatch, match="'x' is missing"):
        session({})
    with pytest.raises(InputMismatch, match="float64"):
        session({"x": X.astype(np.float64)})


def test_a_view_that_is_not_contiguous_is_read_rightly(runtime: Runtime) -> None:
    inputs, targets = batch(8)
    every_other = {"x": inputs["x"][::2]}, {"y": targets["y"][::2]}
    copied = {"x": inputs["x"][::2].copy()}, {"y": targets["y"][::2].copy()}
    sessions = [runtime.train(WATCH, START) for _ in range(2)]
    for session, (x, y) in zip(sessions, (every_other, copied), strict=True):
        session.step(x, y)
    assert sessions[0].weights() == sessions[1].weights()


def test_an_unknown_hyper_parameter_is_out_of_bounds(runtime: Runtime) -> None:
    with pytest.raises(OutOfBounds, match=r"\['momentum'\].*\['lr', 'mu'\]"):
        runtime.train(WATCH, START, {"momentum": 0.9})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39, -0.1])
def test_a_hyper_parameter_that_no_plan_may_have_is_out_of_bounds(runtime: Runtime, value: float) -> None:
    with pytest.raises(OutOfBounds, match="lr is"):
        runtime.train(WATCH, START, {"lr": value})


def test_weights_and_slots_of_another_model_are_refused(runtime: Runtime) -> None:
    other = Weights({"p_a": np.zeros(2, np.float32)})
    for bind in (runtime.infer, runtime.evaluate, runtime.train):
        with pytest.raises(WeightsMismatch):
            bind(WATCH, other)
    with pytest.raises(WeightsMismatch):
        runtime.train(WATCH, START, slots=other)
