"""Clients that train abreast come to what each comes to alone, whatever they train and however much of it they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.simulations import tiny
from umbel.bundle import Bundle
from umbel.errors import InputMismatch, RuntimeFailure
from umbel.plan import Plan
from umbel.weights import Weights
from umbel_client.examples import Examples
from umbel_client.trainer import Job
from umbel_models.accumulation import Accumulated
from umbel_models.compile import compile_model
from umbel_models.optimizers import SGD, Adam, Optimizer, Proximal
from umbel_models.spec import ModelSpec
from umbel_models.trainable import Head
from umbel_simulations.cohort import dual_layer, rounds, step_graph
from umbel_simulations.cohort.abreast import TOGETHER, AbreastWorker, waves
from umbel_simulations.cohort.clients import Share, Start, Trained, Worker
from umbel_simulations.cohort.dual_layer import Products
from umbel_simulations.cohort.resident import OnnxBackend

PLANS = {
    "whole batches": Plan(batch_size=2, epochs=2),
    "smaller last batches": Plan(batch_size=4, epochs=3),
    "stopped by steps": Plan(batch_size=3, epochs=4, max_steps=5),
    "one batch": Plan(batch_size=64),
}


class Lookup(nn.Module):
    """A table, a norm, two inputs; its first dense layer reads no input as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 2)

    def forward(self, kind: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(torch.cat([self.table(kind), torch.tanh(x)], 1)))
        return out


class Scaled(nn.Module):
    """Images, scaled and made flat before a layer without a bias reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(12, 5, bias=False)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.sigmoid(self.norm(self.hidden(((x - 1) / 2).flatten(1)))))
        return out


class Places(nn.Module):
    """A dense layer reads each place of an example by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.relu(self.hidden(x)).mean(1))
        return out


class Filters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv1d(1, 2, 3)
        self.head = nn.Linear(2 * (tiny.FEATURES - 2), 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(F.relu(self.filters(x.unsqueeze(1))).flatten(1))
        return out


def lookup() -> ModelSpec:
    inputs = {"kind": torch.arange(8) % 5, "x": torch.randn(8, 4)}
    targets = {"y": torch.randn(8, 2)}
    return ModelSpec("lookup", Lookup(), F.mse_loss, inputs, targets, metrics={}, optimizer=SGD(lr=0.1))


def scaled() -> ModelSpec:
    inputs, targets = {"x": torch.randn(8, 3, 4)}, {"y": torch.arange(8) % 3}
    optimizer = SGD(lr=0.05, momentum=0.5)
    return ModelSpec("scaled", Scaled(), F.cross_entropy, inputs, targets, optimizer=optimizer)


def places(count: int) -> ModelSpec:
    inputs, targets = {"x": torch.randn(8, count, 4)}, {"y": torch.arange(8) % 3}
    return ModelSpec("places", Places(), F.cross_entropy, inputs, targets, optimizer=SGD(lr=0.1))


def dense(optimizer: Optimizer, dropout: float = 0.0) -> ModelSpec:
    return tiny.spec(optimizer, dropout)


SPECS = {
    "plain": lambda: dense(SGD(lr=0.1)),
    "momentum": lambda: dense(SGD(lr=0.1, momentum=0.9)),
    "proximal": lambda: dense(Proximal(SGD(lr=0.1), mu=0.3)),
    "proximal momentum": lambda: dense(Proximal(SGD(lr=0.1, momentum=0.5), mu=0.3)),
    "Adam": lambda: dense(Adam(lr=0.01)),
    "dropout": lambda: dense(SGD(lr=0.1), dropout=0.5),
    "gathered": lambda: dense(Accumulated(SGD(lr=0.1), every=3)),
    "frozen body": lambda: replace(dense(SGD(lr=0.1, momentum=0.5)), trainable=Head()),
    "table": lookup,
    "images": scaled,
    "places": lambda: places(3),
    "one place": lambda: places(1),
}
IN_DUAL_FORM = {"plain", "momentum", "proximal", "proximal momentum", "dropout", "images", "one place"}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Compiled once for all tests."""
    made = {}
    for name, spec in SPECS.items():
        torch.manual_seed(0)
        made[name] = compile_model(spec(), tmp_path_factory.mktemp("bundle")).bundle
    return made


def examples_of(bundle: Bundle, count: int, seed: int) -> Examples:
    """As many examples as one likes of what a model takes."""
    rng = np.random.default_rng(seed)

    def some(spec: object) -> np.ndarray[tuple[int, ...], np.dtype[np.float32 | np.int64]]:
        shape = (count, *spec.shape[1:])  # type: ignore[attr-defined]
        whole = spec.dtype == "int64"  # type: ignore[attr-defined]
        return rng.integers(0, 3, shape) if whole else rng.normal(size=shape).astype(np.float32)

    manifest = bundle.manifest
    inputs, targets = ({spec.name: some(spec) for spec in specs} for specs in (manifest.inputs, manifest.targets))
    return Examples(inputs, targets, count)


def shares_of(bundle: Bundle, plan: Plan, counts: Sequence[int], seed: int = 0) -> list[Share]:
    return [
        Share.of(Job(plan, "task", 1, f"user{at}"), examples_of(bundle, count, seed + at))
        for at, count in enumerate(counts)
    ]


def each_of(worker: Worker, shares: Sequence[Share], start: Start) -> list[Trained]:
    found = list(worker.train_each(shares, start))
    assert all(found)
    return [one for one in found if one]


def assert_same(found: Sequence[Trained], wanted: Sequence[Trained]) -> None:
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.delta, other.delta, rtol=1e-4, atol=2e-5)
        assert (one.count.steps, one.count.examples) == (other.count.steps, other.count.examples)
        assert one.count.loss == pytest.approx(other.count.loss, rel=1e-4)


class Nobody:
    """A worker that must not be asked."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError("another form was asked")


def abreast_in(bundle: Bundle, *, dual: bool = False, moving: Sequence[str] | None = None) -> Worker:
    """A worker that trains abreast in just one form, or not at all."""
    worker = OnnxBackend(bundle, moving=moving).worker()
    assert isinstance(worker, AbreastWorker)
    if not dual and worker._graph.dual:
        worker = worker._otherwise
        assert isinstance(worker, AbreastWorker)
    worker._otherwise = Nobody()  # type: ignore[assignment]
    return worker


def always_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the dual form of models that are too small for it, too."""
    monkeypatch.setattr(dual_layer, "_BEGINNING", -(10**9))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(
    ("name", "dual"), [(name, dual) for name in SPECS for dual in (False, True) if not dual or name in IN_DUAL_FORM]
)
def test_each_client_comes_to_what_it_comes_to_alone(
    bundles: dict[str, Bundle], name: str, plan: Plan, dual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundles[name]
    if dual:
        always_pays(monkeypatch)
    # The same size twice, one example, more than one batch, less than one.
    shares, start = shares_of(bundle, plan, (5, 9, 1, 9, 4, 6, 2)), Start(bundle.shared_weights())
    alone = OnnxBackend(bundle, abreast=False).worker()
    abreast = abreast_in(bundle, dual=dual)
    wanted = each_of(alone, shares, start)
    assert_same(each_of(abreast, shares, start), wanted)
    total, counts = abreast.train(shares, start)
    sums = sum(np.float32(share.weight) * one.delta for share, one in zip(shares, wanted, strict=True))
    np.testing.assert_allclose(total, sums, rtol=1e-4, atol=2e-4)
    assert [count.examples for count in counts] == [one.count.examples for one in wanted]
    unweighed, _counts = abreast.train(shares, start, weighed=False)
    np.testing.assert_allclose(unweighed, sum(one.delta for one in wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SPECS)
def test_the_first_layer_is_in_dual_form_where_its_optimiser_only_adds_and_scales(
    bundles: dict[str, Bundle], name: str
) -> None:
    forms = OnnxBackend(bundles[name])._forms
    assert [bool(form.dual) for form in forms] == ([True, False] if name in IN_DUAL_FORM else [False])


def test_clients_with_a_correction_of_their_own_train_one_after_the_other(bundles: dict[str, Bundle]) -> None:
    bundle, backend = bundles["plain"], OnnxBackend(bundles["plain"], with_drift=True)
    assert backend.together == 1
    weights = bundle.shared_weights()
    drift = {name: np.full_like(array, 0.01) for name, array in weights.arrays.items()}
    shares = shares_of(bundle, Plan(batch_size=4), (5, 6))
    corrected = each_of(backend.worker(), shares, Start(weights, drift))
    for one, plain in zip(corrected, each_of(OnnxBackend(bundle).worker(), shares, Start(weights)), strict=True):
        assert np.abs(one.delta - plain.delta).max() > 0.01


@pytest.mark.parametrize(("most", "forms"), [(75, [True, False]), (74, [True]), (27, [True]), (26, [])])
def test_states_that_are_too_large_for_many_are_not_held_for_many(
    bundles: dict[str, Bundle], most: int, forms: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """75 weights, of which 48 are the first layer's."""
    monkeypatch.setattr(step_graph, "_MOST_NUMBERS", most)
    assert [bool(form.dual) for form in OnnxBackend(bundles["plain"])._forms] == forms


def test_what_has_no_rule_for_many_clients_trains_one_after_the_other(tmp_path: Path) -> None:
    bundle = compile_model(replace(tiny.spec(SGD(lr=0.1)), module=Filters()), tmp_path).bundle
    backend = OnnxBackend(bundle)
    assert (backend._forms, backend.together) == ([], 1)
    shares, start = shares_of(bundle, PLANS["smaller last batches"], (5, 6)), Start(bundle.shared_weights())
    assert len(each_of(backend.worker(), shares, start)) == 2


def test_only_what_may_move_moves_abreast(bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    always_pays(monkeypatch)
    bundle = bundles["momentum"]
    start, head = Start(bundle.shared_weights()), ["p_head.weight", "p_head.bias"]
    shares = shares_of(bundle, PLANS["smaller last batches"], (5, 9, 6))
    found = each_of(abreast_in(bundle, moving=head), shares, start)
    assert_same(found, each_of(OnnxBackend(bundle, moving=head, abreast=False).worker(), shares, start))
    for one in found:
        moved = Weights.from_vector(one.delta, start.weights.shapes)
        assert {name for name in moved if np.any(moved[name])} == set(head)


@pytest.mark.parametrize("dual", [False, True])
def test_a_worker_keeps_nothing_from_clients_before(
    bundles: dict[str, Bundle], dual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither their weights nor their plan, and not what one with strange examples left behind."""
    if dual:
        always_pays(monkeypatch)
    bundle, plan = bundles["proximal momentum"], PLANS["smaller last batches"]
    spoilt = shares_of(bundle, plan, (8, 8, 8))
    for share in spoilt:
        share.examples.inputs["x"][:] = np.nan
    used, alone = abreast_in(bundle, dual=dual), OnnxBackend(bundle, abreast=False).worker()
    start = Start(bundle.shared_weights())
    used.train(shares_of(bundle, plan, (5, 4, 4), seed=200), start)  # of fewer examples in all
    assert list(used.train_each(spoilt, start)) == [None, None, None]
    used.train(shares_of(bundle, plan, (9, 9, 3), seed=50), start)
    elsewhere = Start(Weights({name: array + np.float32(0.1) for name, array in start.weights.arrays.items()}))
    faster = replace(plan, epochs=2, hyperparameters={"lr": 0.2, "mu": 0.1})
    for other, begun in ((plan, start), (faster, start), (faster, elsewhere), (plan, elsewhere)):
        shares = shares_of(bundle, other, (8, 6, 4), seed=90)
        assert_same(each_of(used, shares, begun), each_of(alone, shares, begun))


def test_what_a_client_with_many_examples_takes_is_bounded(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies ready for its steps would grow with the square of its examples."""
    always_pays(monkeypatch)
    bundle, plan = bundles["plain"], Plan(batch_size=64)
    worker = OnnxBackend(bundle).worker()
    assert isinstance(worker, AbreastWorker)
    assert worker._layer is not None
    assert worker._layer.pays(shares_of(bundle, plan, [256, 2]))
    assert not worker._layer.pays(shares_of(bundle, plan, [257, 2]))


def test_the_dual_form_is_taken_where_features_are_many_and_examples_few(bundles: dict[str, Bundle]) -> None:
    small, plan = bundles["plain"], Plan(batch_size=10)
    worker = OnnxBackend(small).worker()
    assert isinstance(worker, AbreastWorker)
    layer = worker._layer
    assert layer is not None
    assert not layer.pays(shares_of(small, plan, [50, 40])), "of 8 features"
    layer._in, layer._out = 784, 64
    assert layer.pays(shares_of(small, plan, [50, 40]))
    assert not layer.pays(shares_of(small, plan, [500, 400]))


def test_more_clients_than_there_is_room_for_are_trained_all_the_same(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["plain"]
    shares, start = shares_of(bundle, Plan(batch_size=4), [5] * (TOGETHER + 1)), Start(bundle.shared_weights())
    found = each_of(OnnxBackend(bundle).worker(), shares, start)
    assert_same(found, each_of(OnnxBackend(bundle, abreast=False).worker(), shares, start))


@pytest.mark.parametrize("dual", [False, True])
def test_who_goes_to_nan_is_told_from_those_who_train_beside(
    bundles: dict[str, Bundle], dual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dual:
        always_pays(monkeypatch)
    bundle = bundles["plain"]
    shares, start = shares_of(bundle, Plan(batch_size=4), (5, 6, 7)), Start(bundle.shared_weights())
    shares[1].examples.inputs["x"][2] = np.inf
    worker = OnnxBackend(bundle).worker()
    found = list(worker.train_each(shares, start))
    assert [one is None for one in found] == [False, True, False]
    part = rounds.part_of(worker, shares, start)
    assert (part.count, part.silent) == (2, 1)


def test_who_fails_beside_others_is_told_by_name(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["table"]
    shares, start = shares_of(bundle, Plan(batch_size=4), (5, 6, 7)), Start(bundle.shared_weights())
    shares[1].examples.inputs["kind"][0] = 7
    for train in (OnnxBackend(bundle).worker().train, OnnxBackend(bundle).worker().train_each):
        with pytest.raises(RuntimeFailure, match="for user1: "):
            list(train(shares, start))


def test_examples_of_another_model_are_refused_beside_others(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["plain"]
    shares, start = shares_of(bundle, Plan(batch_size=4), (5, 6)), Start(bundle.shared_weights())
    strange = Examples({"x": np.zeros((6, 9), np.float32)}, {"y": np.zeros(6, np.int64)}, 6)
    with pytest.raises(InputMismatch):
        OnnxBackend(bundle).worker().train([shares[0], replace(shares[1], examples=strange)], start)


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    batch=st.integers(1, 12),
    epochs=st.integers(1, 3),
    most=st.integers(0, 9),
)
def test_every_client_takes_each_of_its_batches_in_its_order(
    counts: list[int], batch: int, epochs: int, most: int
) -> None:
    plan = Plan(batch_size=batch, epochs=epochs, max_steps=most)
    longest_first = sorted(counts, reverse=True)
    shares = [Share.of(Job(plan, "task", 1, "user"), tiny.examples(count, 1)) for count in longest_first]
    taken: list[list[int]] = [[] for _ in shares]
    for wave in waves(shares):
        assert len(set(wave.who)) == len(wave.who) == len(wave.steps)
        for at, step in zip(wave.who, wave.steps, strict=True):
            taken[at].append(step)
            assert int(shares[at].ends[step, 0] - shares[at].begins[step, 0]) == wave.size
    assert taken == [list(range(len(share.begins))) for share in shares]


def test_clients_with_batches_of_one_size_left_over_take_them_at_once() -> None:
    plan = Plan(batch_size=4)
    shares = [Share.of(Job(plan, "task", 1, "user"), tiny.examples(count, 1)) for count in (9, 8, 5, 5, 3)]
    assert [(list(wave.who), wave.size) for wave in waves(shares)] == [
        ([0, 1, 2, 3], 4),
        ([0, 1], 4),
        ([0, 2, 3], 1),
        ([4], 3),
    ]


def test_a_runtime_that_gives_up_at_a_layers_end_is_told_as_that(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    always_pays(monkeypatch)
    bundle = bundles["plain"]
    worker = abreast_in(bundle, dual=True)
    assert isinstance(worker, AbreastWorker)
    assert worker._layer is not None
    worker._layer._end = worker._layer._gram  # which doesn't take what it is given
    with pytest.raises(RuntimeFailure, match="dual form"):
        worker.train(shares_of(bundle, Plan(batch_size=4), (5, 6)), Start(bundle.shared_weights()))


def test_products_are_worked_out_once_for_examples_that_stay_where_they_are() -> None:
    products, asked = Products(), []

    def of(examples: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> float:
        def work_out() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            asked.append(len(examples))
            return examples @ examples.T

        return float(products.of(examples, work_out)[0, 0])

    one = np.full((4, 2), 1.0, np.float32)
    assert [of(one), of(one[:]), of(one[:3]), of(one[1:])] == [2.0] * 4
    assert asked == [4, 3, 3]
    table = np.arange(20, dtype=np.float32).reshape(10, 2) + 1
    assert [of(table[:5]), of(table[::2][:5]), of(table[:, ::-1][:5])] == [5.0, 5.0, 5.0]
    assert asked[3:] == [5, 5, 5], "other rows begin at the same place"
    # What is kept keeps its examples: nothing else comes to lie in their place.
    assert [of(np.full((5, 2), value, np.float32)) for value in range(50)] == [2.0 * value**2 for value in range(50)]


def test_products_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual_layer, "_MOST_KEPT", 20)
    products = Products()
    first, second = np.ones((4, 2), np.float32), np.ones((3, 2), np.float32)
    for examples in (first, second):
        products.of(examples, lambda examples=examples: examples @ examples.T)  # type: ignore[misc]
    assert np.array_equal(products.of(first, lambda: np.zeros((4, 4))), np.full((4, 4), 2.0))
    assert np.array_equal(products.of(second, lambda: np.zeros((3, 3))), np.zeros((3, 3)))


@pytest.mark.parametrize("cores", [1, 2, 16])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 33, 50, 1000])
def test_parts_for_clients_abreast_are_alike_and_keep_all_processors_busy(
    count: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "_CORES", cores)
    parts = rounds.in_parts(range(count), TOGETHER)
    assert [client for part in parts for client in part] == list(range(count))
    sizes = {len(part) for part in parts}
    assert max(sizes, default=0) <= TOGETHER
    assert len(sizes) < 3
    assert len(parts) >= min(cores, count // 4)
