"""Dropout is a function of a seed and a step: told again it is the same everywhere, and answers know nothing of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from umbel.bundle import Bundle
from umbel.clock import SystemClock
from umbel.plan import Plan
from umbel.runtime.named import runtime_named
from umbel_client.examples import NONE, Examples, Split
from umbel_client.trainer import Job, Stopped, run
from umbel_models.compile import compile_model
from umbel_models.dropout import drawing, keep_mask
from umbel_models.optimizers import SGD
from umbel_models.spec import ModelSpec

RUNTIMES = ("onnx", "litert")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    x, y = {"x": torch.randn(12, 6)}, {"y": torch.arange(12) % 3}
    spec = ModelSpec("dropping", module, F.cross_entropy, x, y, optimizer=SGD(0.1, momentum=0.9))
    return compile_model(spec, tmp_path_factory.mktemp("dropout"), RUNTIMES).bundle


def masks(
    shape: tuple[int, ...], keep: float, seeds: int, steps: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    found = []
    for seed in range(0, 2**24, 2**24 // seeds):
        for step in range(steps):
            with drawing(torch.tensor(float(seed)), torch.tensor(float(step))):
                found += [keep_mask(shape, keep).numpy(), keep_mask(shape, keep).numpy()]
    return np.array(found)


def test_masks_keep_their_share_and_hang_neither_on_neighbours_nor_on_each_other() -> None:
    drawn = masks((16, 60), 0.8, 5, 10)
    assert abs(drawn.mean() - 0.8) < 4 * np.sqrt(0.16 / drawn.size)
    normal = (drawn - 0.8) / 0.4
    for one, other in (
        (normal[:, 1:], normal[:, :-1]),
        (normal[:, :, 1:], normal[:, :, :-1]),
        (normal[1:], normal[:-1]),
        (normal[2:], normal[:-2]),
    ):
        assert abs((one * other).mean()) < 4 / np.sqrt(one.size)
    # No two masks, and no two columns of them, are more alike than chance lets them be.
    between = np.corrcoef(normal.reshape(len(normal), -1))[np.triu_indices(len(normal), 1)]
    assert abs(between.std() * np.sqrt(drawn[0].size) - 1) < 0.1
    assert len({mask.tobytes() for mask in drawn}) == len(drawn)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_seed_tells_a_training_run_again_and_another_seed_tells_another(bundle: Bundle, runtime: str) -> None:
    inputs, targets = {"x": np.ones((5, 6), np.float32)}, {"y": np.arange(5) % 3}

    def trained(seed: float) -> bytes:
        session = runtime_named(runtime).train(bundle, bundle.weights(), {"seed": seed})
        losses = [session.step(inputs, targets) for _ in range(4)]
        assert len(set(losses)) == 4
        return session.weights().to_bytes()

    assert trained(5.0) == trained(5.0)
    assert trained(5.0) != trained(6.0)


def test_all_runtimes_drop_the_same_units(bundle: Bundle) -> None:
    inputs, targets = {"x": np.ones((7, 6), np.float32)}, {"y": np.arange(7) % 3}
    moved = []
    for name in RUNTIMES:
        session = runtime_named(name).train(bundle, bundle.weights(), {"seed": 9.0, "lr": 1.0})
        session.step(inputs, targets)
        moved.append((session.weights() - bundle.shared_weights())["p_3.weight"])
    np.testing.assert_allclose(moved[0], moved[1], atol=1e-6)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_answers_and_judgements_drop_nothing(bundle: Bundle, runtime: str) -> None:
    inputs, targets = {"x": np.ones((5, 6), np.float32)}, {"y": np.arange(5) % 3}
    answer = runtime_named(runtime).infer(bundle, bundle.weights())
    judge = runtime_named(runtime).evaluate(bundle, bundle.weights())
    assert len({answer(inputs)["logits"].tobytes() for _ in range(3)}) == 1
    assert len({judge(inputs, targets)["loss"] for _ in range(3)}) == 1


def device_split() -> Split:
    rng = np.random.default_rng(0)
    return Split(Examples({"x": rng.normal(size=(24, 6)).astype(np.float32)}, {"y": np.arange(24) % 3}, 24), NONE)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_stopped_run_goes_on_with_the_masks_it_would_have_had(bundle: Bundle, runtime: str) -> None:
    job = Job(Plan(epochs=2, batch_size=5, seed=3), "learn", 1, "d")
    seeds = [
        Job(job.plan, "learn", *who).hyperparameters(bundle.manifest)["seed"] for who in ((1, "d"), (2, "d"), (1, "e"))
    ]
    assert len(set(seeds)) == 3
    unbroken = run(job, bundle, device_split(), runtime_named(runtime), SystemClock())
    asked = iter(range(100))
    with pytest.raises(Stopped) as stopped:
        run(job, bundle, device_split(), runtime_named(runtime), SystemClock(), lambda: ("busy",) * (next(asked) >= 3))
    rest = run(job, bundle, device_split(), runtime_named(runtime), SystemClock(), progress=stopped.value.progress)
    assert rest.delta == unbroken.delta


def test_a_seed_that_the_plan_names_stays(bundle: Bundle) -> None:
    plan = Plan(hyperparameters={"seed": 4.0, "lr": 0.2})
    assert Job(plan, "learn", 1, "d").hyperparameters(bundle.manifest) == {"seed": 4.0, "lr": 0.2}
