"""Devices in JavaScript and in Python take part in the same rounds of a real coordinator and a real helper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.client.recordings import recordings
from tests.javascript.devices import HELD_BACK, MODEL, TRAINING, Parties
from umbel.bundle import Bundle
from umbel.runtime.onnx import OnnxRuntime
from umbel_models.zoo import bundle_path

pytestmark = pytest.mark.slow  # npm fetches packages for it, and the quick tests need pip alone
CLIP = 1.0


def mean_of(updates: list[tuple[NDArray[np.float64], float]]) -> NDArray[np.float64]:
    """The weighted mean of deltas."""
    total = sum(weight for _, weight in updates)
    return np.asarray(sum(delta * (weight / total) for delta, weight in updates))


def of_javascript(update: dict[str, Any], weight: float) -> tuple[NDArray[np.float64], float]:
    return np.array(update["delta"]), weight


def trained_in_python(home: str, steps: int) -> NDArray[np.float32]:
    """What a device's delta is, where each step sees all of its examples, so that their order makes no difference."""
    bundle = Bundle.open(bundle_path(MODEL))
    base = bundle.shared_weights()
    session = OnnxRuntime().train(bundle, base, {"lr": 0.03, "mu": 0.01})
    x, y = recordings(TRAINING + HELD_BACK, home)
    for _ in range(steps):
        session.step({"x": x[:TRAINING]}, {"y": y[:TRAINING]})
    return (session.weights() - base).clipped(CLIP).to_vector()


def test_a_public_round_comes_to_the_mean_of_both_updates(real: Parties, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(update: Any) -> bytes:
        seen.append((update.delta.to_vector().astype(np.float64), update.weight))
        return encode(update)

    from umbel_client import assignment

    encode = assignment.update_to_bytes
    monkeypatch.setattr(assignment, "update_to_bytes", watched)
    real.task("public", batch_size=TRAINING)
    javascript, python = real.javascript("public"), real.python("public")
    python.contribute()
    javascript.contribute()
    found = real.round("public")
    update = javascript.update()
    assert update["examples"] == TRAINING
    assert (found["reports"], found["failed"]) == (2, 0)
    assert found["metrics"]["examples"] == 2 * HELD_BACK
    assert found["metrics"]["train_examples"] == 4 * TRAINING + 80
    expected = mean_of([of_javascript(update, TRAINING), *seen])
    np.testing.assert_allclose(real.step("public"), expected, atol=1e-6)
    np.testing.assert_allclose(update["delta"], trained_in_python(javascript.home.name, 4), atol=1e-5)


@pytest.mark.parametrize("bits", [pytest.param(32, id="32 bits"), pytest.param(16, id="16 bits, rotated")])
def test_a_private_round_comes_to_the_mean_of_both_updates(
    real: Parties, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    seen = []

    def watched(descriptor: Any, delta: Any, weight: int, *rest: Any) -> Any:
        seen.append((descriptor, delta.astype(np.float64), weight))
        return encode(descriptor, delta, weight, *rest)

    from umbel_client import private

    encode = private.encode_update
    monkeypatch.setattr(private, "encode_update", watched)
    name = f"private-{bits}"
    # Where all weigh 1, a ring of 16 bits is fine enough to tell a sum from another one.
    real.task(name, private=True, ring_bits=bits, max_weight=1.0 if bits == 16 else 1000.0)
    javascript, python = real.javascript(name, private=True), real.python(name, private=True)
    python.contribute()
    javascript.contribute()
    found = real.round(name)
    assert (found["reports"], found["failed"], found["state"]) == (2, 0, "completed")
    update = javascript.update()
    ((descriptor, delta, weight),) = seen
    assert (descriptor.ring_bits, descriptor.rotated) == (bits, bits == 16)
    assert found["metrics"]["loss"] > update["metrics"]["loss"]
    assert found["metrics"]["examples"] == 2 * HELD_BACK
    assert update["metrics"]["train_examples"] == 16 + 16 + 8 + 16
    expected = mean_of([of_javascript(update, 1 if bits == 16 else TRAINING), (delta, weight)])
    error = np.linalg.norm(real.step(name) - expected)
    # Rounding to whole units of the ring moves each number by less than one.
    assert error < 2 * np.sqrt(delta.size) / descriptor.scale
    assert error < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("private", [False, True], ids=["public", "private"])
def test_an_evaluation_adds_up_what_both_measured(real: Parties, private: bool) -> None:
    name = f"evaluation-{'private' if private else 'public'}"
    real.task(name, private=private, kind="evaluate")
    javascript, python = real.javascript(name, private=private), real.python(name, private=private)
    python.contribute()
    javascript.contribute()
    found, update = real.round(name), javascript.update()
    assert (found["reports"], found["failed"]) == (2, 0)
    assert found["metrics"]["examples"] == 2 * HELD_BACK
    assert found["metrics"]["loss"] > update["metrics"]["loss"] > 0
    assert update["delta"] == []


def test_a_round_with_noise_and_a_moving_clip_is_summed(real: Parties) -> None:
    privacy = {"noise_multiplier": 0.3, "metric_bound": 50.0, "clip_quantile": 0.5, "clip_vote_noise": 0.5}
    real.task("noise", private=True, max_weight=1.0, **privacy)
    javascript, python = real.javascript("noise", private=True), real.python("noise", private=True)
    python.contribute()
    javascript.contribute()
    found = real.round("noise")
    assert (found["reports"], found["failed"], found["state"]) == (2, 0, "completed")
