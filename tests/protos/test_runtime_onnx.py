"""ONNX Runtime behind the seam: answers, judges and trains; refuses without losing what it has."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.protos.watch import WATCH, batch
from umbel.errors import InputMismatch, NotFinite, OutOfBounds, RuntimeFailure, WeightsMismatch
from umbel.runtime.onnx import OnnxRuntime
from umbel.weights import Weights

RUNTIME = OnnxRuntime()
START = WATCH.shared_weights()


def test_stock_onnxruntime_runs_the_infer_graph_where_it_lies() -> None:
    session = onnxruntime.InferenceSession(str(WATCH.graph_path("onnx", "infer")), providers=["CPUExecutionProvider"])
    golden = WATCH.golden()
    (logits,) = session.run(None, dict(golden.inputs))
    np.testing.assert_allclose(logits, golden.outputs["logits"], atol=1e-5)


def test_other_weights_give_other_answers_from_the_same_graph() -> None:
    inputs, _ = batch(3)
    first = RUNTIME.infer(WATCH, START)(inputs)["logits"]
    second = RUNTIME.infer(WATCH, START.scaled(2.0))(inputs)["logits"]
    assert not np.allclose(first, second)


def test_metrics_are_sums_so_that_they_add_over_batches() -> None:
    judge = RUNTIME.evaluate(WATCH, START)
    inputs, targets = batch(12)
    whole = judge(inputs, targets)
    parts = [judge({"x": inputs["x"][rows]}, {"y": targets["y"][rows]}) for rows in (slice(0, 5), slice(5, 12))]
    assert whole["examples"] == 12
    for name in WATCH.manifest.metrics:
        assert whole[name] == pytest.approx(sum(part[name] for part in parts), rel=1e-5)


def test_metrics_are_what_the_answers_say() -> None:
    inputs, targets = batch(9)
    logits = RUNTIME.infer(WATCH, START)(inputs)["logits"].astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    found = RUNTIME.evaluate(WATCH, START)(inputs, targets)
    assert found["loss"] == pytest.approx(-logs[np.arange(9), targets["y"]].sum(), rel=1e-5)
    assert found["correct"] == (logits.argmax(1) == targets["y"]).sum()


def test_a_step_follows_the_slope_of_the_loss() -> None:
    inputs, targets = batch(8)
    session = RUNTIME.train(WATCH, START, {"lr": 1.0})
    session.step(inputs, targets)
    gradient = START - session.weights()

    def loss(weights: Weights) -> float:
        return RUNTIME.evaluate(WATCH, weights)(inputs, targets)["loss"] / 8

    direction = gradient.scaled(1 / gradient.norm())
    slope = (loss(START + direction.scaled(1e-2)) - loss(START - direction.scaled(1e-2))) / 2e-2
    assert slope == pytest.approx(gradient.norm(), rel=0.02)


def test_training_learns_what_it_is_shown_and_leaves_its_start_alone() -> None:
    inputs, targets = batch(14)
    before = START.to_bytes()
    session = RUNTIME.train(WATCH, START)
    losses = [session.step(inputs, targets) for _ in range(60)]
    assert losses[-1] < 0.1 * losses[0]
    assert RUNTIME.evaluate(WATCH, session.weights())(inputs, targets)["correct"] == 14
    assert START.to_bytes() == before


def test_weights_handed_out_do_not_change_with_later_steps() -> None:
    inputs, targets = batch(4)
    session = RUNTIME.train(WATCH, START)
    session.step(inputs, targets)
    handed = session.weights()
    copy = handed.to_bytes()
    session.step(inputs, targets)
    session.step(inputs, targets)
    assert handed.to_bytes() == copy


def test_two_sessions_of_one_runtime_do_not_touch_each_other() -> None:
    (inputs, targets), (others, answers) = batch(8, 1), batch(5, 2)
    alone, first, second = (RUNTIME.train(WATCH, START) for _ in range(3))
    for _ in range(5):
        alone.step(inputs, targets)
    for _ in range(5):
        first.step(inputs, targets)
        second.step(others, answers)
    assert first.weights() == alone.weights()
    assert second.weights() != alone.weights()


def test_a_native_session_serves_every_round_and_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    native = onnxruntime.InferenceSession

    def counting(*args: Any, **kwargs: Any) -> onnxruntime.InferenceSession:
        made.append(args[0])
        return native(*args, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", counting)
    runtime = OnnxRuntime(keep=1)
    for _ in range(3):
        runtime.train(WATCH, START)
    assert len(made) == 1
    runtime.evaluate(WATCH, START)
    runtime.train(WATCH, START)
    assert len(made) == 3


def test_the_anchor_is_where_training_started() -> None:
    slots = RUNTIME.train(WATCH, START).slots()
    assert set(slots) == {"s_anchor_" + name.removeprefix("p_") for name in START}
    assert np.array_equal(slots["s_anchor_head.bias"], START["p_head.bias"])


class StopAndGo(RuleBasedStateMachine):
    """However often training is put away and taken up again, its bits are those of an unbroken run."""

    @initialize()
    def begin(self) -> None:
        self.unbroken = RUNTIME.train(WATCH, START, {"mu": 0.1})
        self.broken = RUNTIME.train(WATCH, START, {"mu": 0.1})

    @rule(size=st.integers(1, 4), seed=st.integers(0, 5))
    def step(self, size: int, seed: int) -> None:
        assert self.unbroken.step(*batch(size, seed)) == self.broken.step(*batch(size, seed))

    @rule()
    def put_away_and_take_up(self) -> None:
        weights, slots = self.broken.weights(), self.broken.slots()
        weights, slots = Weights.from_bytes(weights.to_bytes()), Weights.from_bytes(slots.to_bytes())
        self.broken = OnnxRuntime().train(WATCH, weights, {"mu": 0.1}, slots)

    @rule()
    def spoil_a_step(self) -> None:
        inputs, targets = batch(2)
        with pytest.raises(NotFinite):
            self.broken.step({"x": np.full_like(inputs["x"], np.nan)}, targets)
        with pytest.raises(RuntimeFailure):
            self.broken.step(inputs, {"y": np.array([0, 99])})

    @invariant()
    def both_hold_the_same(self) -> None:
        assert self.unbroken.weights() == self.broken.weights()
        assert self.unbroken.slots() == self.broken.slots()


TestStopAndGo = StopAndGo.TestCase
TestStopAndGo.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)


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
    "no example": ({"x": X[:0]}, {"y": Y[:0]}, "no example"),
    "labels of another dtype": ({"x": X}, {"y": Y.astype(np.int32)}, "target 'y' is int32"),
    "fewer labels": ({"x": X}, {"y": Y[:3]}, "4 examples with targets for 3"),
    "no labels": ({"x": X}, {}, "target 'y' is missing"),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_what_the_model_does_not_take_is_refused_in_words(what: str) -> None:
    inputs, targets, match = MISMATCHES[what]
    session = RUNTIME.train(WATCH, START)
    with pytest.raises(InputMismatch, match=match):
        session.step(inputs, targets)
    assert session.weights() == START
    with pytest.raises(InputMismatch, match=match):
        RUNTIME.evaluate(WATCH, START)(inputs, targets)


def test_inference_checks_its_inputs_too() -> None:
    session = RUNTIME.infer(WATCH, START)
    with pytest.raises(InputMismatch, match="'x' is missing"):
        session({})
    with pytest.raises(InputMismatch, match="float64"):
        session({"x": X.astype(np.float64)})


def test_a_view_that_is_not_contiguous_is_read_rightly() -> None:
    inputs, targets = batch(8)
    every_other = {"x": inputs["x"][::2]}, {"y": targets["y"][::2]}
    copied = {"x": inputs["x"][::2].copy()}, {"y": targets["y"][::2].copy()}
    sessions = [RUNTIME.train(WATCH, START) for _ in range(2)]
    for session, (x, y) in zip(sessions, (every_other, copied), strict=True):
        session.step(x, y)
    assert sessions[0].weights() == sessions[1].weights()


def test_an_unknown_hyper_parameter_is_out_of_bounds() -> None:
    with pytest.raises(OutOfBounds, match=r"\['momentum'\].*\['lr', 'mu'\]"):
        RUNTIME.train(WATCH, START, {"momentum": 0.9})


def test_weights_and_slots_of_another_model_are_refused() -> None:
    other = Weights({"p_a": np.zeros(2, np.float32)})
    for bind in (RUNTIME.infer, RUNTIME.evaluate, RUNTIME.train):
        with pytest.raises(WeightsMismatch):
            bind(WATCH, other)
    with pytest.raises(WeightsMismatch):
        RUNTIME.train(WATCH, START, slots=other)


@pytest.mark.parametrize("settings", [{"threads": 0}, {"keep": 0}])
def test_a_runtime_without_threads_or_memory_is_out_of_bounds(settings: dict[str, int]) -> None:
    with pytest.raises(OutOfBounds):
        OnnxRuntime(**settings)


DEVICE = """
import sys
import numpy as np
from umbel.bundle import Bundle
from umbel.runtime.onnx import OnnxRuntime
from umbel_models.zoo import bundle_path

bundle = Bundle.open(bundle_path("smartwatch"))
session = OnnxRuntime().train(bundle, bundle.weights())
inputs = {"x": np.ones((4, 6, 100), np.float32)}
session.step(inputs, {"y": np.array([0, 1, 2, 3])})
OnnxRuntime().infer(bundle, session.weights())(inputs)
heavy = {"torch", "onnx", "tensorflow", "flwr", "typer"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def test_a_device_trains_without_torch_or_onnx_in_its_process() -> None:
    done = subprocess.run([sys.executable, "-c", DEVICE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_whoever_runs_no_graph_loads_no_runtime() -> None:
    script = "import sys, umbel.bundle, umbel.messages, umbel.runtime; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
