"""Losses and metrics count what is there: padding weighs nothing, and sums add over batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from umbel.runtime.named import runtime_named
from umbel.update import add_metrics
from umbel_models import losses
from umbel_models.compile import compile_model
from umbel_models.optimizers import SGD
from umbel_models.spec import ModelSpec

RUNTIMES = ("onnx", "litert")


class Tagger(nn.Module):
    """Six tokens to a score for each of five, at each place."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.embedding(x))
        return scores


def tagger() -> ModelSpec:
    torch.manual_seed(0)
    x, y = torch.randint(0, 6, (12, 7)), torch.randint(1, 5, (12, 7))
    y[::2, 3:] = losses.PADDING
    return ModelSpec(
        "tagger",
        Tagger(),
        losses.token_cross_entropy,
        {"x": x},
        {"y": y},
        metrics={"correct": losses.token_correct},
        count=losses.token_count,
        optimizer=SGD(0.1),
    )


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_padding_counts_neither_in_the_loss_nor_in_the_metrics(runtime: str, tmp_path: Path) -> None:
    spec = tagger()
    bundle = compile_model(spec, tmp_path, (runtime,)).bundle
    x, y = spec.inputs["x"].numpy(), spec.targets["y"].numpy()
    judge = runtime_named(runtime).evaluate(bundle, bundle.weights())
    whole = judge({"x": x}, {"y": y})
    assert whole["examples"] == np.count_nonzero(y)
    # Batches with unequal padding still add up to the whole.
    parts = add_metrics(judge({"x": x[:1]}, {"y": y[:1]}), judge({"x": x[1:]}, {"y": y[1:]}))
    assert parts == pytest.approx(whole, rel=1e-5)
    expected = F.cross_entropy(
        spec.module(spec.inputs["x"]).flatten(0, 1), spec.targets["y"].flatten(), ignore_index=0, reduction="sum"
    )
    assert whole["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_batch_of_nothing_but_padding_moves_nothing(runtime: str, tmp_path: Path) -> None:
    bundle = compile_model(tagger(), tmp_path, (runtime,)).bundle
    session = runtime_named(runtime).train(bundle, bundle.weights())
    assert session.step({"x": np.ones((2, 7), np.int64)}, {"y": np.zeros((2, 7), np.int64)}) == 0.0
    assert session.weights() == bundle.shared_weights()


def test_metric_sums_are_those_of_numpy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    y = torch.randn(12, 3)
    metrics = {"absolute": losses.absolute_error, "squared": losses.squared_error}
    spec = ModelSpec("levels", nn.Linear(6, 3), F.mse_loss, {"x": torch.randn(12, 6)}, {"y": y}, metrics=metrics)
    yes = replace(
        spec,
        loss=F.binary_cross_entropy_with_logits,
        targets={"y": (y > 0).to(torch.float32)},
        metrics={"correct": losses.binary_correct},
    )
    output = spec.module(spec.inputs["x"]).detach()
    for each, expected in (
        (spec, {"absolute": (output - y).abs().mean(1).sum(), "squared": (output - y).square().mean(1).sum()}),
        (yes, {"correct": ((output > 0) == (y > 0)).sum()}),
    ):
        bundle = compile_model(each, tmp_path, RUNTIMES).bundle
        for runtime in map(runtime_named, RUNTIMES):
            inputs, targets = ({n: t.numpy() for n, t in part.items()} for part in each.batch(12))
            found = runtime.evaluate(bundle, bundle.weights())(inputs, targets)
            assert {n: found[n] for n in expected} == pytest.approx(
                {n: float(v) for n, v in expected.items()}, rel=1e-5
            )
