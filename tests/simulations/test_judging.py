"""Models on their way are judged on a sample of what is held back, the last one on all."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.simulations import fleets, tiny
from umbel.bundle import Bundle
from umbel.runtime.onnx import OnnxRuntime
from umbel_client import trainer
from umbel_client.examples import Examples
from umbel_simulations import judging


@pytest.mark.parametrize(("count", "left"), [(0, 0), (1, 1), (10, 10), (11, 6), (20, 10), (25, 9), (1_000, 10)])
def test_a_sample_is_evenly_spread_and_no_larger_than_told(
    count: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "SAMPLE", 10)
    numbers = np.arange(count)
    rows = judging.sample(Examples({"x": numbers}, {"y": numbers}, count)).inputs["x"]
    assert len(rows) == left
    assert len({*np.diff(rows)}) <= 1


def test_it_comes_to_what_a_device_comes_to(tiny_bundle: Bundle) -> None:
    examples, weights = tiny.examples(300, 1), tiny_bundle.weights()
    found = judging.evaluate(tiny_bundle, weights, examples, OnnxRuntime())
    assert found == pytest.approx(trainer.evaluate(tiny_bundle, weights, examples, OnnxRuntime()), rel=1e-6)
    assert found["examples"] == 300


def test_a_fleets_versions_are_judged_on_a_sample_and_the_last_one_on_all(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "SAMPLE", 10)
    told = fleets.scenario(fleets.home_of(tiny_bundle))
    outcome = fleets.played(replace(told, task=replace(told.task, rounds=3)), tmp_path)
    *before, last = [one for one in outcome.rounds if one.verdict == "accepted"]
    assert len(before) == 2
    assert (last.accuracy, last.loss) == (outcome.accuracy, outcome.loss)
    tens = [10 * one.accuracy for one in before if one.accuracy is not None]
    assert tens == pytest.approx([round(ten) for ten in tens]), "of 48 examples, ten"
    whole = [48 * share for share in (outcome.accuracy, outcome.first_accuracy) if share is not None]
    assert whole == pytest.approx([round(count) for count in whole])
