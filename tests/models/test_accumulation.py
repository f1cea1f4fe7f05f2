"""Several small batches move the weights once, exactly as one large batch would, and none of them is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from umbel.bundle import Bundle
from umbel.clock import SystemClock
from umbel.plan import Plan
from umbel.runtime.named import runtime_named
from umbel_client.examples import NONE, Examples, Split
from umbel_client.trainer import Job, Stopped, run
from umbel_models.accumulation import Accumulated
from umbel_models.compile import compile_model
from umbel_models.optimizers import SGD, Adam, Proximal
from umbel_models.zoo import digits

RUNTIMES = ("onnx", "litert")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    spec = replace(digits.mlp(), optimizer=Accumulated(Proximal(SGD(0.1, momentum=0.9)), 3))
    return compile_model(spec, tmp_path_factory.mktemp("accumulated"), RUNTIMES).bundle


def examples(count: int) -> Examples:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 17, (count, 64)).astype(np.float32)
    return Examples({"x": x}, {"y": np.arange(count) % 10}, count)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_small_batches_move_the_weights_as_one_large_batch_does(bundle: Bundle, runtime: str) -> None:
    given = examples(21)
    small = runtime_named(runtime).train(bundle, bundle.weights(), {"accumulate": 3.0})
    large = runtime_named(runtime).train(bundle, bundle.weights(), {"accumulate": 1.0})
    for _ in range(3):
        for rows in (slice(0, 10), slice(10, 20), slice(20, 21)):
            before = small.weights()
            batch = given.take(rows)
            small.step(batch.inputs, batch.targets)
        assert small.weights() != before
        large.step(given.inputs, given.targets)
        for name, array in large.weights().arrays.items():
            np.testing.assert_allclose(small.weights()[name], array, atol=2e-6)


def shares(output: Tensor, y: Tensor, share: Tensor) -> Tensor:
    return (F.cross_entropy(output, y, reduction="none") * share).sum() / share.sum().clamp(min=1e-6)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_batches_that_count_for_less_than_one_example_together_move_weights_as_far(
    runtime: str, tmp_path: Path
) -> None:
    """Examples with shares, of which a device may have few; those of none at all move nothing."""
    spec = digits.mlp()
    spec = replace(
        spec,
        targets={**spec.targets, "share": torch.full((16,), 0.01)},
        loss=shares,
        metrics={},
        count=lambda output, y, share: share.sum(),
        optimizer=Accumulated(SGD(0.1), 2),
    )
    bundle = compile_model(spec, tmp_path, (runtime,)).bundle
    given, moved = examples(10), []
    for share in (0.01, 1.0, 0.0):
        session = runtime_named(runtime).train(bundle, bundle.weights())
        for rows in (slice(0, 5), slice(5, 10)):
            batch = given.take(rows)
            session.step(batch.inputs, {**batch.targets, "share": np.full(5, share, np.float32)})
        moved.append((session.weights() - bundle.shared_weights()).to_vector())
    np.testing.assert_allclose(moved[0], moved[1], atol=1e-6)
    assert np.abs(moved[1]).max() > 1e-3
    assert not moved[2].any()


def test_an_optimizer_that_counts_its_steps_counts_those_it_takes(tmp_path: Path) -> None:
    spec = replace(digits.mlp(), optimizer=Accumulated(Adam(1e-3), 4))
    compiled = compile_model(spec, tmp_path, RUNTIMES)
    assert all(found.train_short < 2e-5 for found in compiled.parity.values())
    session = runtime_named("onnx").train(compiled.bundle, compiled.bundle.weights())
    for _ in range(9):
        session.step(examples(5).inputs, examples(5).targets)
    assert session.slots()["s_steps"] == 2
    assert session.slots()["s_gathered_batches"] == 1


@pytest.mark.parametrize(("epochs", "max_steps"), [(1, 0), (2, 0), (3, 4), (1, 2)])
def test_the_last_batches_of_a_run_make_a_smaller_step(bundle: Bundle, epochs: int, max_steps: int) -> None:
    # 30 examples by 8 are four batches an epoch, in steps of three.
    job = Job(Plan(epochs=epochs, batch_size=8, max_steps=max_steps, seed=1), "learn", 1, "d")
    given, runtime = examples(30), runtime_named("onnx")
    done = run(job, bundle, Split(given, NONE), runtime, SystemClock())
    order = [rows for epoch in range(epochs) for rows in np.split(job.order(epoch, 30), [8, 16, 24])]
    order = order[:max_steps] if max_steps else order
    plain = runtime.train(bundle, bundle.weights(), {"accumulate": 1.0})
    for start in range(0, len(order), 3):
        batch = given.take(np.concatenate(order[start : start + 3]))
        plain.step(batch.inputs, batch.targets)
    expected = plain.weights() - bundle.shared_weights()
    for name, array in expected.arrays.items():
        np.testing.assert_allclose(done.delta[name], array, atol=3e-6)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("stop", [1, 3, 7])
def test_a_run_stopped_between_batches_goes_on_bit_equal(bundle: Bundle, stop: int, runtime: str) -> None:
    job = Job(Plan(epochs=2, batch_size=8, seed=1), "learn", 1, "d")
    split, native = Split(examples(30), NONE), runtime_named(runtime)
    unbroken = run(job, bundle, split, native, SystemClock())
    asked = iter(range(100))
    with pytest.raises(Stopped) as stopped:
        run(job, bundle, split, native, SystemClock(), lambda: ("busy",) * (next(asked) >= stop))
    rest = run(job, bundle, split, native, SystemClock(), progress=stopped.value.progress)
    assert rest.delta == unbroken.delta
