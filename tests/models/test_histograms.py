"""Histograms of a model count what its author named, alike on every runtime, and each example as one."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from torch import Tensor, nn

from umbel.bundle import Bundle
from umbel.errors import CannotCompile, ParityFailed
from umbel.histograms import Histogram
from umbel.manifest import Manifest
from umbel.runtime import EvaluateSession
from umbel.runtime.named import runtime_named
from umbel.update import Metrics, add_metrics
from umbel_models.cache import fingerprint
from umbel_models.compile import compile_model
from umbel_models.histograms import Counting, confidence, edges_of, error, feature, label, predicted
from umbel_models.parity import check_parity
from umbel_models.signatures import State, signatures
from umbel_models.spec import ModelSpec

RUNTIMES = ("onnx", "litert")
ROWS = (slice(None), slice(0, 1), slice(1, None))
EDGES = (-1.0, -0.25, 0.0, 0.5)


class Recorder(nn.Module):
    """Two channels of five values to scores of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.nan_to_num(x).flatten(1))
        return scores


def recorder() -> ModelSpec:
    torch.manual_seed(0)
    return ModelSpec(
        "recorder",
        Recorder(),
        F.cross_entropy,
        {"x": torch.randn(12, 2, 5)},
        {"y": torch.randint(0, 3, (12,))},
        histograms={
            "second": feature("x", 1, EDGES),
            "loudest": Counting(lambda inputs, answers, targets: inputs["x"][:, 0].abs().amax(1), [1.0, 2.0]),
            "class": label("y", 3),
            "says": predicted("logits", 3),
            "sure": confidence("logits", 5),
        },
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compile_model(recorder(), tmp_path_factory.mktemp("recorder"), RUNTIMES).bundle


@pytest.fixture(scope="module")
def judges(compiled: Bundle) -> dict[str, EvaluateSession]:
    return {name: runtime_named(name).evaluate(compiled, compiled.weights()) for name in RUNTIMES}


def counts_of(bundle: Bundle, metrics: Metrics) -> dict[str, NDArray[np.float64]]:
    return {one.name: one.counts(metrics) for one in bundle.manifest.histograms}


def binned(values: NDArray[Any], edges: tuple[float, ...]) -> NDArray[np.float64]:
    """What numpy counts; [N, M] values, each row counting as one."""
    places = np.searchsorted(np.float32(edges), values[~np.isnan(values)])
    return np.bincount(places, minlength=len(edges) + 1) / values.shape[1]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_counts_what_the_author_named(
    compiled: Bundle, judges: dict[str, EvaluateSession], runtime: str
) -> None:
    x = np.random.default_rng(3).standard_normal((33, 2, 5)).astype(np.float32)
    x[0, 1] = EDGES[0], EDGES[1], EDGES[2], EDGES[3], -0.0  # on an edge: the bin below
    x[1, 1] = np.inf, -np.inf, np.finfo(np.float32).max, 1e-45, -1e-45
    x[2, 1, 0] = np.nan  # in no bin
    y = np.arange(33) % 3
    y[30:] = -100  # no class
    found = counts_of(compiled, judges[runtime]({"x": x}, {"y": y}))
    scores = runtime_named(runtime).infer(compiled, compiled.weights())({"x": x})["logits"].astype(np.float64)
    np.testing.assert_allclose(found["second"], binned(x[:, 1], EDGES), atol=1e-5)
    assert found["second"].sum() == pytest.approx(33 - 1 / 5)
    np.testing.assert_array_equal(found["loudest"], binned(np.abs(x[:, 0]).max(1, keepdims=True), (1.0, 2.0)))
    np.testing.assert_array_equal(found["class"], [10, 10, 10])
    np.testing.assert_array_equal(found["says"], np.bincount(scores.argmax(1), minlength=3))
    chances = np.exp(scores - scores.max(1, keepdims=True))
    sure = (chances / chances.sum(1, keepdims=True)).max(1, keepdims=True)
    np.testing.assert_array_equal(found["sure"], binned(sure, (0.2, 0.4, 0.6, 0.8)))


@settings(deadline=None)  # other tests may have the machine
@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 40), st.just(2), st.just(5)),
        elements=st.floats(width=32) | st.sampled_from(EDGES),
    )
)
def test_no_numbers_make_a_count_negative_and_batches_add(
    compiled: Bundle, judges: dict[str, EvaluateSession], x: NDArray[np.float32]
) -> None:
    """A coordinator refuses a report with a negative count; a tiny one would do."""
    y = np.zeros(len(x), np.int64)
    whole, *parts = (judges["onnx"]({"x": x[rows]}, {"y": y[rows]}) for rows in ROWS if len(x[rows]))
    added = counts_of(compiled, reduce(add_metrics, parts))
    for name, counts in counts_of(compiled, whole).items():
        assert (counts >= 0).all() and counts.sum() <= len(x) * (1 + 1e-6)
        if name in ("second", "class"):  # where a largest number lies among NaN, hangs on the size of a batch
            np.testing.assert_allclose(added[name], counts, atol=1e-4)


def test_the_manifest_tells_the_edges_as_the_graphs_have_them(compiled: Bundle) -> None:
    manifest = Manifest.from_bytes(compiled.manifest.to_bytes())
    told = {one.name: one for one in manifest.histograms}
    assert list(told) == ["second", "loudest", "class", "says", "sure"]
    assert told["second"] == Histogram("second", EDGES)
    assert [name for name, one in told.items() if one.of_answers] == ["says", "sure"]
    assert told["sure"].edges == tuple(np.float32([0.2, 0.4, 0.6, 0.8]).tolist())
    assert manifest.metrics[:2] == ("loss", "correct") and manifest.metrics[-1] == "examples"
    assert manifest.metrics[2:7] == tuple(f"second[{place}]" for place in range(5))


def test_an_error_is_counted_with_its_sign(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = ModelSpec(
        "line",
        nn.Linear(1, 1),
        F.mse_loss,
        {"x": torch.linspace(-2, 2, 9).unsqueeze(1)},
        {"y": torch.zeros(9, 1)},
        outputs=("answer",),
        metrics={},
        histograms={"off": error("answer", "y", (-0.5, 0.5))},
    )
    bundle = compile_model(spec, tmp_path).bundle
    with torch.no_grad():
        off = (spec.module(spec.inputs["x"]) - spec.targets["y"]).numpy()
    judge = runtime_named("onnx").evaluate(bundle, bundle.weights())
    found = judge({"x": spec.inputs["x"].numpy()}, {"y": spec.targets["y"].numpy()})
    np.testing.assert_array_equal(bundle.manifest.histograms[0].counts(found), binned(off, (-0.5, 0.5)))


def test_a_graph_that_counts_otherwise_than_its_spec_does_not_pass(compiled: Bundle) -> None:
    others = {**recorder().histograms, "second": feature("x", 0, EDGES)}
    with pytest.raises(ParityFailed, match="histogram 'second'"):
        check_parity(replace(recorder(), histograms=others), compiled, runtime_named("onnx"))


def test_other_edges_are_another_model_to_the_cache() -> None:
    def key(edge: float) -> str:
        spec = replace(recorder(), histograms={"second": feature("x", 1, (edge,))})
        state = State(spec)
        return fingerprint(spec, state, signatures(spec, state, 13))

    assert key(0.0) == key(0.0) != key(0.25)


REFUSED: dict[str, tuple[Any, str]] = {
    "no edges": (lambda: Counting(lambda x, a, y: x["x"], ()), "one edge or more"),
    "edges that descend": (lambda: feature("x", 0, (1.0, 0.0)), "ascend"),
    "edges that are one as float32": (lambda: feature("x", 0, (1.0, 1.0 + 1e-12)), "ascend"),
    "an edge at infinity": (lambda: feature("x", 0, (float("inf"),)), "finite"),
    "words for edges": (lambda: feature("x", 0, "0123"), "give numbers"),
    "one class": (lambda: label("y", 1), "two or more"),
    "edges of one value": (lambda: edges_of(torch.ones(9)), "no edges"),
    "edges of no value": (lambda: edges_of([float("nan")]), "no edges"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_histogram_that_could_not_tell_anything_is_refused(what: str) -> None:
    make, match = REFUSED[what]
    with pytest.raises(CannotCompile, match=match):
        make()


REFUSED_SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "a number of the whole batch": ({"a": Counting(lambda x, a, y: x["x"].mean(), (0.0,))}, "for each example"),
    "a number for each channel of each example": (
        {"a": Counting(lambda x, a, y: x["x"].flatten(0, 1), (0.0,))},
        r"shape \[24, 5\]",
    ),
    "a number that hangs on the others": (
        {"a": Counting(lambda x, a, y: x["x"].flatten(1).sum(1) + x["x"].sum(), (0.0,))},
        "hangs on the others",
    ),
    "an input that isn't there": ({"a": feature("z", 0, (0.0,))}, "histogram 'a' fails"),
    "a place that isn't there": ({"a": feature("x", 9, (0.0,))}, "histogram 'a' fails"),
    "a name that no metric may have": ({"a b": feature("x", 0, (0.0,))}, "'a b'"),
    "more bins than a report holds": ({"a": feature("x", 0, range(300))}, "a report holds"),
}


@pytest.mark.parametrize("what", REFUSED_SPECS)
def test_a_spec_with_a_histogram_that_cannot_be_is_refused(what: str, tmp_path: Path) -> None:
    histograms, match = REFUSED_SPECS[what]
    with pytest.raises(CannotCompile, match=match):
        compile_model(replace(recorder(), histograms=histograms), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_metric_named_like_a_bin_is_refused() -> None:
    with pytest.raises(CannotCompile, match="rename it"):
        replace(recorder(), metrics={"age[3]": lambda output, target: output.sum()})


@settings(deadline=None)  # other tests may have the machine
@given(arrays.arrays(np.float32, st.integers(2, 200), elements=st.integers(-5, 5)), st.integers(2, 20))
def test_edges_of_values_leave_none_of_their_bins_empty(values: NDArray[np.float32], bins: int) -> None:
    if values.min() == values.max():
        return
    edges = edges_of(torch.tensor(values), bins)
    assert len(edges) < bins and list(edges) == sorted(set(edges))
    assert (binned(values[:, None], edges) > 0).all()


def test_edges_part_values_evenly_whatever_their_distribution() -> None:
    values = torch.exp(3 * torch.randn(10_000, generator=torch.Generator().manual_seed(1)))
    counts = binned(values.numpy()[:, None], edges_of(values, 16))
    assert len(counts) == 16 and counts.min() > 600 and counts.max() < 650
