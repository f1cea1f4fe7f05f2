"""Torch as a back end: for models that can't be lowered, and equal to the resident session for those that can."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import nn

from tests.simulations import tiny
from umbel.bundle import Bundle
from umbel.errors import BadInput, CannotCompile, NotFinite, RuntimeFailure
from umbel.plan import Plan
from umbel.runtime.onnx import OnnxRuntime
from umbel.self_check import verify_golden
from umbel_models.accumulation import Accumulated
from umbel_models.compile import compile_model
from umbel_models.eager import EagerRuntime, write_uncompiled
from umbel_models.optimizers import SGD, Adam, Proximal
from umbel_models.spec import ModelSpec
from umbel_models.trainable import Head
from umbel_simulations.cohort import rounds
from umbel_simulations.cohort.algorithm import Stage
from umbel_simulations.cohort.clients import Backend, Start
from umbel_simulations.cohort.engine import backend_of, play
from umbel_simulations.cohort.personal import head_of
from umbel_simulations.cohort.pool import Pool
from umbel_simulations.cohort.resident import OnnxBackend
from umbel_simulations.cohort.scaffold import Scaffold
from umbel_simulations.cohort.torch_backend import TorchBackend
from umbel_simulations.engines import Silent
from umbel_simulations.outcome import Outcome
from umbel_simulations.scenario import Algorithm, Data, PlanPart, Scenario, TaskPart
from umbel_simulations.setting import Setting, prepare

PLAN = Plan(batch_size=4, epochs=2)
SPECS = {
    "momentum": tiny.spec(SGD(lr=0.1, momentum=0.9)),
    "Adam": tiny.spec(Adam(lr=0.01)),
    "proximal": tiny.spec(Proximal(SGD(lr=0.1), mu=0.3)),
    "dropout": tiny.spec(SGD(lr=0.1), dropout=0.5),
    "gathered": tiny.spec(Accumulated(SGD(lr=0.1), every=3)),
    "only the head": replace(tiny.spec(SGD(lr=0.1)), trainable=Head()),
    "clipped by example": replace(tiny.spec(SGD(lr=0.1)), clip_examples=0.5),
}


class Choosy(tiny.Dense):
    """Takes another way for some batches: no graph can be traced of that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def choosy() -> ModelSpec:
    torch.manual_seed(0)
    return replace(tiny.spec(SGD(lr=0.1)), name="choosy", module=Choosy())


def deltas(backend: Backend, bundle: Bundle, plan: Plan = PLAN, start: Start | None = None) -> list[np.ndarray]:
    worker, found = backend.worker(), []
    call = rounds.Call(plan, "task", 1)
    start = start or Start(bundle.shared_weights())
    for client in tiny.setting(bundle).federation.clients[:4]:
        report = rounds.report_of(worker, call.share(client), start)
        assert report is not None
        found.append(report.delta.copy())
    return found


QUICK = ("momentum", "dropout", "clipped by example")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SPECS]
)
def test_torch_trains_as_the_resident_session_does(tmp_path: Path, name: str) -> None:
    spec = SPECS[name]
    compiled = compile_model(spec, tmp_path / "compiled").bundle
    plain = write_uncompiled(spec, tmp_path / "plain")
    assert plain.shared_weights() == compiled.shared_weights()
    wanted, found = deltas(OnnxBackend(compiled), compiled), deltas(TorchBackend(plain, spec), plain)
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_torch_judges_and_answers_as_the_graphs_do(tmp_path: Path) -> None:
    spec = SPECS["dropout"]
    compiled, plain = compile_model(spec, tmp_path / "compiled").bundle, write_uncompiled(spec, tmp_path / "plain")
    many, weights = tiny.examples(100, 1), plain.shared_weights()
    wanted = OnnxBackend(compiled).evaluate(weights, many)
    assert TorchBackend(plain, spec).evaluate(weights, many) == pytest.approx(wanted, rel=1e-5)
    answers = OnnxRuntime().infer(compiled, weights)(many.inputs)["logits"]
    np.testing.assert_allclose(EagerRuntime(spec).infer(plain, weights)(many.inputs)["logits"], answers, atol=1e-5)


class Normed(tiny.Dense):
    """Keeps statistics, which a step moves without a gradient; of one example torch itself knows none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(F.relu(self.hidden(x))))
        return out


def test_scaffold_corrects_weights_and_leaves_statistics_alone_whatever_trains(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = replace(tiny.spec(SGD(lr=0.1)), module=Normed())
    bundles = compile_model(spec, tmp_path / "compiled").bundle, write_uncompiled(spec, tmp_path / "plain")
    ended = []
    for bundle, own in zip(bundles, (None, spec), strict=True):
        setting = Setting(bundle, tiny.setting(bundle).federation, own)
        task = TaskPart(plan=PlanPart(batch_size=4))  # the last batch of some users is one example
        told = Scenario(
            "normed", "normed", Data("smartwatch"), engine="cohort", task=task, algorithm=Algorithm("scaffold")
        )
        backend = backend_of(setting, with_drift=True)
        weights = bundle.shared_weights()
        with Pool(backend, 1) as pool:
            scaffold = Scaffold(Stage.of(told, setting, backend, pool))
            for number in (1, 2, 3):
                weights = scaffold.step(number, weights).weights
        ended.append(weights.to_vector())
    # A batch of one has no variance, and its norm makes 300 times as much of each rounding.
    np.testing.assert_allclose(ended[1], ended[0], atol=3e-4)


class Nested(nn.Module):
    """One layer goes by the end of another's name."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(tiny.FEATURES, 6)
        self.head = nn.ModuleDict({"out_proj": nn.Linear(6, tiny.CLASSES)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head["out_proj"](F.relu(self.proj(x)))
        return out


def test_a_personal_head_keeps_its_momentum_though_its_name_ends_as_anothers_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = replace(tiny.spec(SGD(lr=0.1, momentum=0.9)), module=Nested())
    compiled, plain = compile_model(spec, tmp_path / "compiled").bundle, write_uncompiled(spec, tmp_path / "plain")
    head = head_of(plain)
    wanted = deltas(TorchBackend(plain, spec, moving=head), plain)
    np.testing.assert_allclose(deltas(OnnxBackend(compiled, moving=head), compiled), wanted, atol=2e-6)


def test_some_weights_alone_move_and_a_drift_is_taken_off(tmp_path: Path) -> None:
    spec = tiny.spec(SGD(lr=0.1))
    compiled, plain = compile_model(spec, tmp_path / "compiled").bundle, write_uncompiled(spec, tmp_path / "plain")
    head = ["p_head.bias", "p_head.weight"]
    wanted = deltas(OnnxBackend(compiled, moving=head), compiled)
    np.testing.assert_allclose(deltas(TorchBackend(plain, spec, moving=head), plain), wanted, atol=2e-6)
    base = plain.shared_weights()
    start = Start(base, base.scaled(0.01).arrays)
    wanted = deltas(OnnxBackend(compiled, with_drift=True), compiled, start=start)
    found = deltas(TorchBackend(plain, spec, with_drift=True), plain, start=start)
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_what_a_graph_refuses_torch_refuses(tmp_path: Path) -> None:
    bundle = write_uncompiled(SPECS["Adam"], tmp_path)
    with pytest.raises(BadInput, match="p_tail"):
        TorchBackend(bundle, SPECS["Adam"], moving=["p_tail"])
    with pytest.raises(BadInput, match="plain SGD"):
        TorchBackend(bundle, SPECS["Adam"], with_drift=True)
    worker, base = TorchBackend(bundle, SPECS["Adam"]).worker(), bundle.shared_weights()
    bad = tiny.examples(6, 1)
    bad.inputs["x"][0] = np.nan
    client = replace(tiny.setting(bundle).federation.clients[0], training=bad)
    with pytest.raises(NotFinite):
        worker.train([rounds.Call(PLAN, "task", 1).share(client)], Start(base))


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(tiny.FEATURES, 2, 16, 0.0, batch_first=True)
        self.stack = nn.TransformerEncoder(layer, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.stack(x, src_key_padding_mask=(torch.arange(5) > 2).expand(x.shape[:2]))
        return out


def test_a_model_without_graphs_tells_the_answers_that_it_gives(tmp_path: Path) -> None:
    """Not those of torch's fast path, which leaves out what is padded: a shape of its own."""
    torch.manual_seed(0)
    inputs, targets = {"x": torch.randn(8, 5, tiny.FEATURES)}, {"y": torch.randn(8, 5, tiny.FEATURES)}
    spec = ModelSpec("padded", Padded(), F.mse_loss, inputs, targets, metrics={})
    bundle = write_uncompiled(spec, tmp_path)
    assert [one.shape for one in bundle.manifest.outputs] == [(None, 5, tiny.FEATURES)]
    assert verify_golden(EagerRuntime(spec), bundle) < 1e-5


def test_what_torch_throws_says_where(tmp_path: Path) -> None:
    class Broken(tiny.Dense):
        fails = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.fails:
                raise RuntimeError("no such kernel")
            return super().forward(x)

    spec = replace(tiny.spec(SGD()), module=Broken())
    bundle = write_uncompiled(spec, tmp_path)
    runtime = EagerRuntime(spec)
    runtime._spec.module.fails = True
    many = tiny.examples(5, 1)
    with pytest.raises(RuntimeFailure, match=r"'evaluate' of 'tiny': no such kernel"):
        runtime.evaluate(bundle, bundle.shared_weights())(many.inputs, many.targets)


def test_a_batch_that_torch_refuses_is_told_with_its_user(tmp_path: Path) -> None:
    """Five examples in batches of four leave one."""

    class Paired(tiny.Dense):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x - x.roll(1, 0) if len(x) > 1 else F.instance_norm(x[:, :, None]))

    spec = replace(tiny.spec(SGD(lr=0.1)), module=Paired())
    bundle = write_uncompiled(spec, tmp_path)
    user = tiny.setting(bundle).federation.clients[0]
    share = rounds.Call(PLAN, "task", 1).share(user)
    with pytest.raises(RuntimeFailure, match=r"user00, with 5 examples in batches of 4: .* more than 1 spatial"):
        TorchBackend(bundle, spec).worker().train([share], Start(bundle.shared_weights()))


def played(spec: ModelSpec, bundle: Bundle, folder: Path, algorithm: Algorithm, workers: int) -> Outcome:
    folder.mkdir()
    task = TaskPart(rounds=8, goal=6, minimum=4, plan=PlanPart(batch_size=4, lr=0.2))
    told = Scenario("choosy", "choosy", Data("smartwatch"), engine="cohort", task=task, algorithm=algorithm)
    setting = Setting(bundle, tiny.setting(bundle).federation, spec)
    assert isinstance(backend_of(setting), TorchBackend)
    return play(told, setting, workers=workers, progress=Silent(), folder=folder)


@pytest.mark.parametrize(
    "kind", ["scaffold", *(pytest.param(k, marks=pytest.mark.slow) for k in ("strategy", "fedbuff"))]
)
def test_a_model_that_cant_be_lowered_learns_all_the_same(tmp_path: Path, kind: str) -> None:
    spec = choosy()
    with pytest.raises(CannotCompile):
        compile_model(spec, tmp_path / "compiled")
    bundle = write_uncompiled(spec, tmp_path / "plain")
    algorithm = Algorithm(kind, backend="torch", buffer=4, personalisation="head", personal_epochs=1)  # type: ignore[arg-type]
    outcomes = [played(spec, bundle, tmp_path / f"{count}", algorithm, count) for count in (1, 3)]
    assert outcomes[0].digest() == outcomes[1].digest()
    assert outcomes[0].accuracy is not None
    assert outcomes[0].first_accuracy is not None
    assert outcomes[0].accuracy > outcomes[0].first_accuracy + 0.1


def test_a_scenario_names_a_spec_where_torch_is_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMBEL_CACHE", str(tmp_path))
    data = Data("digits", partition="iid", users=3)
    told = Scenario(
        "cnn", "umbel_models.zoo.digits:cnn", data, engine="cohort", algorithm=Algorithm(backend="torch"), seed=1
    )
    setting = prepare(told)
    assert setting.spec is not None
    assert setting.bundle.manifest.graphs == {}
    with Pool(backend_of(setting), 2) as pool:
        found = rounds.evaluate(pool, backend_of(setting), setting.bundle.shared_weights(), setting.federation.central)
    assert found["examples"] == setting.federation.central.count
    again = prepare(told)
    assert again.bundle.manifest.digest == setting.bundle.manifest.digest
