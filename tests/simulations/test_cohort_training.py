"""What the cohort engine trains is what devices train: the same plan, the same graph, the same sums."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom

from tests.simulations import tiny
from umbel.bundle import Bundle
from umbel.clock import SystemClock
from umbel.errors import BadInput, InputMismatch, NotFinite, OutOfBounds, RuntimeFailure
from umbel.plan import Plan
from umbel.runtime.onnx import OnnxRuntime
from umbel.update import Aggregate, Update
from umbel.weights import Weights
from umbel_client import trainer
from umbel_client.examples import Examples, Split
from umbel_client.trainer import Job
from umbel_models.accumulation import Accumulated
from umbel_models.compile import compile_model
from umbel_models.optimizers import SGD, Adam, Proximal
from umbel_models.zoo import bundle_path
from umbel_server import flower
from umbel_server.aggregation import Presummed
from umbel_simulations.cohort import rounds
from umbel_simulations.cohort.clients import Count, Share, Start, Trained, Vector, one_by_one
from umbel_simulations.cohort.pool import Pool
from umbel_simulations.cohort.resident import OnnxBackend
from umbel_simulations.data import ClientData
from umbel_simulations.smartwatch import load_wearers

RUNTIME = OnnxRuntime()
PLANS = {
    "whole batches": Plan(batch_size=5),
    "a smaller last batch": Plan(batch_size=4, epochs=3),
    "one batch larger than all": Plan(batch_size=64, epochs=2),
    "stopped before it has seen all": Plan(batch_size=3, max_steps=2),
    "stopped by steps": Plan(batch_size=3, epochs=4, max_steps=7),
    "newest examples only, clipped": Plan(batch_size=3, max_examples=7, clip_norm=0.01, max_weight=4.0),
}


def device_update(bundle: Bundle, job: Job, client: ClientData) -> Update:
    return trainer.run(job, bundle, Split(client.training, client.held_back), RUNTIME, SystemClock())


def assert_near(found: Weights, wanted: Weights, within: float = 1e-6) -> None:
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=within, err_msg=name)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_client_reports_what_a_device_reports(tiny_bundle: Bundle, plan: Plan) -> None:
    client = tiny.setting(tiny_bundle).federation.clients[10]
    call, base = rounds.Call(plan, "task", 3), tiny_bundle.shared_weights()
    wanted = device_update(tiny_bundle, call.job(client), client)
    report = rounds.report_of(OnnxBackend(tiny_bundle).worker(), call.share(client), Start(base))
    assert report is not None
    assert_near(Weights.from_vector(report.delta, base.shapes), wanted.delta)
    assert report.weight == wanted.weight
    assert report.count.examples == wanted.metrics[trainer.TRAIN_EXAMPLES]
    assert report.count.loss == pytest.approx(wanted.metrics[trainer.TRAIN_LOSS], rel=1e-5)


@pytest.mark.parametrize(
    "optimizer", [SGD(momentum=0.9), Adam(), Proximal(SGD(), mu=0.5)], ids=lambda one: str(one)[:4]
)
def test_optimisers_with_a_memory_start_it_afresh_for_each_client(tmp_path: Path, optimizer: SGD) -> None:
    bundle = tiny.compiled(tmp_path, optimizer)
    clients = tiny.setting(bundle).federation.clients
    call, base = rounds.Call(Plan(batch_size=4, epochs=2), "task", 1), bundle.shared_weights()
    worker, start = OnnxBackend(bundle).worker(), Start(base)
    for client in clients[:3]:
        report = rounds.report_of(worker, call.share(client), start)
        assert report is not None
        wanted = device_update(bundle, call.job(client), client)
        assert_near(Weights.from_vector(report.delta, base.shapes), wanted.delta)


@pytest.mark.parametrize("plan", [Plan(batch_size=2, epochs=2), Plan(batch_size=4, epochs=3, max_steps=7)], ids=str)
def test_batches_that_are_left_over_make_a_smaller_step_as_on_a_device(tmp_path: Path, plan: Plan) -> None:
    bundle = tiny.compiled(tmp_path, Accumulated(SGD(momentum=0.9), every=4))
    call, base = rounds.Call(plan, "task", 1), bundle.shared_weights()
    worker, start = OnnxBackend(bundle).worker(), Start(base)
    for client in tiny.setting(bundle).federation.clients:
        report = rounds.report_of(worker, call.share(client), start)
        assert report is not None
        assert_near(
            Weights.from_vector(report.delta, base.shapes), device_update(bundle, call.job(client), client).delta
        )


def test_gradients_clipped_by_example_follow_the_weights_from_step_to_step(tmp_path: Path) -> None:
    """The loop over examples stands inside the loop over steps, and must see its weights, not those at the start."""
    bundle = compile_model(replace(tiny.spec(SGD(lr=0.1)), clip_examples=0.5), tmp_path).bundle
    call, base = rounds.Call(Plan(batch_size=2), "task", 1), bundle.shared_weights()
    worker, start = OnnxBackend(bundle).worker(), Start(base)
    for client in tiny.setting(bundle).federation.clients[:3]:
        report = rounds.report_of(worker, call.share(client), start)
        assert report is not None
        assert_near(
            Weights.from_vector(report.delta, base.shapes), device_update(bundle, call.job(client), client).delta
        )


def test_dropout_draws_for_each_client_what_its_device_would_draw(tmp_path: Path) -> None:
    bundle = tiny.compiled(tmp_path, dropout=0.5)
    clients = tiny.setting(bundle).federation.clients
    call, base = rounds.Call(Plan(batch_size=4, epochs=2), "task", 1), bundle.shared_weights()
    worker, start = OnnxBackend(bundle, with_drift=True).worker(), Start(base, Weights.zeros(base.shapes).arrays)
    for client in clients[:3]:
        report = rounds.report_of(worker, call.share(client), start)
        assert report is not None
        wanted = device_update(bundle, call.job(client), client)
        assert_near(Weights.from_vector(report.delta, base.shapes), wanted.delta)


def test_a_round_of_real_people_ends_at_the_weights_of_a_round_of_devices() -> None:
    bundle = Bundle.open(bundle_path("smartwatch"))
    base = bundle.shared_weights()
    clients = [
        ClientData(one.name, Examples({"x": one.training.x[:50]}, {"y": one.training.y[:50]}, 50), Examples({}, {}, 0))
        for one in load_wearers()[:3]
    ]
    call = rounds.Call(Plan(hyperparameters={"lr": 0.1, "mu": 0.1}), "watch", 1)
    total = Aggregate.zero(base.shapes)
    for client in clients:
        total.accumulate(device_update(bundle, call.job(client), client))
    wanted, _ = flower.apply(flower.StrategySpec(), b"", base, Presummed(total), 1)
    backend = OnnxBackend(bundle)
    with Pool(backend, 2) as pool:
        found = rounds.train(pool, clients, call, Start(base)).collected()
    weights, _ = flower.apply(flower.StrategySpec(), b"", base, found, 1)
    assert_near(weights, wanted, within=1e-5)
    assert (found.count, found.weight) == (total.count, total.weight)


def test_any_number_of_workers_gives_the_same_bits(tiny_bundle: Bundle) -> None:
    setting, backend = tiny.setting(tiny_bundle, users=30), OnnxBackend(tiny_bundle)
    call, start = rounds.Call(Plan(batch_size=4), "task", 1), Start(tiny_bundle.shared_weights())
    totals = []
    for workers in (1, 2, 5):
        with Pool(backend, workers) as pool:
            cohort = rounds.train(pool, setting.federation.clients, call, start)
            totals.append((cohort.total.tobytes(), cohort.loss, cohort.weight))
    assert totals[0] == totals[1] == totals[2]


@pytest.mark.parametrize("count", [0, 1, 257, 700])
def test_pieces_that_are_judged_side_by_side_come_to_the_whole(tiny_bundle: Bundle, count: int) -> None:
    backend, weights, examples = OnnxBackend(tiny_bundle), tiny_bundle.shared_weights(), tiny.examples(count, 1)
    with Pool(backend, 2) as pool:
        found = rounds.evaluate(pool, backend, weights, examples)
    assert found == pytest.approx(backend.evaluate(weights, examples), rel=1e-5)
    assert found.get("examples", 0.0) == count


def test_robust_strategies_get_every_update(tiny_bundle: Bundle) -> None:
    setting, backend = tiny.setting(tiny_bundle, users=30), OnnxBackend(tiny_bundle)
    call, start = rounds.Call(Plan(batch_size=4), "task", 1), Start(tiny_bundle.shared_weights())
    with Pool(backend, 2) as pool:
        found = rounds.train(pool, setting.federation.clients, call, start, wants_singles=True).collected()
    counts = [client.training.count for client in setting.federation.clients]
    assert sorted(update.weight for update in found) == sorted(counts)  # type: ignore[union-attr]


def test_only_what_may_move_moves(tiny_bundle: Bundle) -> None:
    client, base = tiny.setting(tiny_bundle).federation.clients[5], tiny_bundle.shared_weights()
    head = ["p_head.bias", "p_head.weight"]
    worker = OnnxBackend(tiny_bundle, moving=head).worker()
    report = rounds.report_of(worker, rounds.Call(Plan(batch_size=4), "task", 1).share(client), Start(base))
    assert report is not None
    delta = Weights.from_vector(report.delta, base.shapes)
    assert {name for name in delta if delta[name].any()} == set(head)


def test_a_drift_is_a_correction_of_each_gradient(tiny_bundle: Bundle) -> None:
    client, base = tiny.setting(tiny_bundle).federation.clients[5], tiny_bundle.shared_weights()
    call, drift = rounds.Call(Plan(batch_size=64), "task", 1), base.scaled(0.1)
    plain = rounds.report_of(OnnxBackend(tiny_bundle).worker(), call.share(client), Start(base))
    corrected = OnnxBackend(tiny_bundle, with_drift=True).worker()
    moved = rounds.report_of(corrected, call.share(client), Start(base, drift.arrays))
    assert plain is not None
    assert moved is not None
    np.testing.assert_allclose(moved.delta, plain.delta - drift.to_vector(), atol=1e-6)


def test_a_correction_past_an_optimisers_memory_is_refused(tmp_path: Path) -> None:
    bundle = tiny.compiled(tmp_path, Adam())
    with pytest.raises(BadInput, match="plain SGD"):
        OnnxBackend(bundle, with_drift=True)


def test_an_unknown_weight_to_move_is_refused_with_the_known_ones(tiny_bundle: Bundle) -> None:
    with pytest.raises(BadInput, match=r"p_tail.*p_head\.weight"):
        OnnxBackend(tiny_bundle, moving=["p_tail"])


@pytest.mark.parametrize("count", [3, 30])
def test_a_client_that_goes_to_nan_reports_nothing_and_harms_nobody(tiny_bundle: Bundle, count: int) -> None:
    clients = list(tiny.setting(tiny_bundle, users=count).federation.clients)
    call, start, backend = rounds.Call(Plan(), "task", 1), Start(tiny_bundle.shared_weights()), OnnxBackend(tiny_bundle)
    bad = replace(clients[1], training=tiny.examples(6, 1))
    bad.training.inputs["x"][0] = np.nan
    with Pool(backend, 1) as pool:
        with_bad = rounds.train(pool, [clients[0], bad, *clients[2:]], call, start)
        without = rounds.train(pool, [clients[0], *clients[2:]], call, start)
    assert (with_bad.silent, with_bad.count) == (1, count - 1)
    assert (with_bad.weight, with_bad.examples) == (without.weight, without.examples)
    np.testing.assert_allclose(with_bad.total, without.total, atol=1e-5)


@pytest.mark.parametrize("optimizer", [SGD(momentum=0.9), Accumulated(SGD(), every=4)], ids=["momentum", "gathered"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_clients_trained_one_after_the_other_come_to_the_sum_of_each_alone(
    tmp_path: Path, optimizer: SGD, dropout: float
) -> None:
    """Of unlike sizes, so that their steps, batches and chances differ; to the bit, as nothing is added otherwise."""
    bundle = tiny.compiled(tmp_path, optimizer, dropout=dropout)
    clients = tiny.setting(bundle).federation.clients[:5]
    assert len({client.training.count for client in clients}) > 2
    call, start = rounds.Call(Plan(batch_size=4, epochs=2), "task", 1), Start(bundle.shared_weights())
    worker = OnnxBackend(bundle, abreast=False).worker()
    alone = rounds.Cohort(start)
    shares = [call.share(client) for client in clients]
    for share in shares:
        alone.take(rounds.report_of(worker, share, start))
    together = rounds.part_of(worker, shares, start)
    assert np.array_equal(together.total, alone.total)
    assert (together.weight, together.count, together.examples) == (alone.weight, alone.count, alone.examples)
    assert together.loss == pytest.approx(alone.loss, rel=1e-12)


@pytest.mark.parametrize("count", [0, 1, 7, 50, 1000])
def test_every_client_is_in_one_part_and_the_last_parts_are_short(count: int) -> None:
    parts = rounds.in_parts(range(count))
    assert [client for part in parts for client in part] == list(range(count))
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size <= 16 for size in sizes)
    assert sizes[-3:] in ([1, 1, 1], sizes[:3])


def test_updates_that_overflow_only_when_they_are_added_up_are_not_silent(tiny_bundle: Bundle) -> None:
    """What is wrong then is the sum, which is refused with the candidate, and not a client."""
    clients = tiny.setting(tiny_bundle).federation.clients[:4]
    start = Start(tiny_bundle.shared_weights())

    class Far:
        def train(self, shares: list[Share], start: Start, *, weighed: bool = True) -> tuple[Vector, list[Count]]:
            if len(shares) > 1:
                raise NotFinite("the sum")
            return np.full_like(start.vector, 2e37), [Count(1, 1.0, 1)]

        def train_each(self, shares: list[Share], start: Start) -> Iterable[Trained | None]:
            return one_by_one(self, shares, start)

    shares = [rounds.Call(Plan(), "task", 1).share(client) for client in clients]
    with np.errstate(over="ignore"):
        part = rounds.part_of(Far(), shares, start)
    assert (part.count, part.silent) == (4, 0)
    assert np.isinf(part.total).all()


def test_a_plan_that_clips_clips_each_client_before_it_is_added_up(tiny_bundle: Bundle) -> None:
    clients, start = tiny.setting(tiny_bundle, users=30).federation.clients, Start(tiny_bundle.shared_weights())
    call = rounds.Call(Plan(batch_size=4, clip_norm=0.01), "task", 1)
    with Pool(OnnxBackend(tiny_bundle), 2) as pool:
        clipped = rounds.train(pool, clients, call, start)
    assert 0 < np.linalg.norm(clipped.total) <= 0.01 * clipped.weight * (1 + 1e-5)


def test_a_loss_that_overflowed_is_no_report_though_the_weights_are_finite(tmp_path: Path) -> None:
    spec = replace(tiny.spec(SGD(lr=1e-30)), loss=F.mse_loss, metrics={}, targets={"y": torch.randn(8, tiny.CLASSES)})
    backend = OnnxBackend(compile_model(spec, tmp_path).bundle)
    start = Start(backend.bundle.shared_weights())
    far = Examples({"x": np.ones((6, tiny.FEATURES), np.float32)}, {"y": np.full((6, 3), 1e25, np.float32)}, 6)
    with np.errstate(over="ignore"):
        share = rounds.Call(Plan(), "task", 1).share(ClientData("far", far, far))
        assert rounds.report_of(backend.worker(), share, start) is None


def test_weights_that_overflowed_after_a_finite_loss_are_no_report(tiny_bundle: Bundle) -> None:
    client = tiny.setting(tiny_bundle).federation.clients[0]
    client = replace(client, training=tiny.examples(6, 1))
    client.training.inputs["x"][:] *= 100
    call = rounds.Call(Plan(batch_size=64, hyperparameters={"lr": 3e38}), "task", 1)
    backend, start = OnnxBackend(tiny_bundle), Start(tiny_bundle.shared_weights())
    assert math.isfinite(backend.evaluate(start.weights, client.training)["loss"])
    with np.errstate(over="ignore", invalid="ignore"):
        assert rounds.report_of(backend.worker(), call.share(client), start) is None


def test_examples_of_another_model_are_refused(tiny_bundle: Bundle) -> None:
    strange = ClientData(
        "one", Examples({"x": np.zeros((4, 9), np.float32)}, {"y": np.zeros(4, np.int64)}, 4), tiny.examples(1, 1)
    )
    call, start = rounds.Call(Plan(), "task", 1), Start(tiny_bundle.shared_weights())
    with pytest.raises(InputMismatch), Pool(OnnxBackend(tiny_bundle), 2) as pool:
        rounds.train(pool, [strange], call, start)


def test_hyperparameters_that_the_model_lacks_are_refused(tiny_bundle: Bundle) -> None:
    clients = tiny.setting(tiny_bundle).federation.clients
    call = rounds.Call(Plan(hyperparameters={"mu": 1.0}), "task", 1)
    with pytest.raises(OutOfBounds, match="mu"), Pool(OnnxBackend(tiny_bundle), 1) as pool:
        rounds.train(pool, clients, call, Start(tiny_bundle.shared_weights()))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("count", [1, 14])
def test_batches_are_those_that_a_device_takes(plan: Plan, count: int) -> None:
    job = Job(plan, "task", 1, "device")
    wanted = [list(rows) for rows in trainer._batches(job, count, skip=0)]
    share = Share.of(job, tiny.examples(count, 1))
    bounds = zip(share.begins.ravel(), share.ends.ravel(), strict=True)
    assert [list(share.rows[begin:end]) for begin, end in bounds] == wanted
    assert len(share.rows) == sum(map(len, wanted))


def test_what_the_training_graph_refuses_is_told_with_its_user(tiny_bundle: Bundle) -> None:
    """Rows that aren't there stand for whatever an embedding doesn't have."""
    client = tiny.setting(tiny_bundle).federation.clients[0]
    share = rounds.Call(Plan(), "task", 1).share(client)
    with pytest.raises(RuntimeFailure, match=f"for {client.name}: .*out of data bounds"):
        OnnxBackend(tiny_bundle).worker().train(
            [replace(share, rows=share.rows + 1_000)], Start(tiny_bundle.shared_weights())
        )
