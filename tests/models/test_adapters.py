"""What is trained is what was chosen: the head, names, or low-rank adapters that alone travel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from umbel.bundle import Bundle
from umbel.errors import CannotCompile
from umbel.runtime.named import runtime_named
from umbel.successor import successor
from umbel_models.adapters import resolved
from umbel_models.compile import compile_model
from umbel_models.optimizers import SGD, Adam
from umbel_models.spec import ModelSpec
from umbel_models.trainable import Head, LoRA, Named, Trainable, every_weight
from umbel_models.zoo import digits, shakespeare, smartwatch

RUNTIMES = ("onnx", "litert")


class Net(nn.Module):
    """Layers under names that attention uses, over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(6, 5, bias=False), nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)
        # Registered last, run first.
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        logits: Tensor = self.head(torch.tanh(self.q(x)) * self.v(x)).mean(1)
        return logits


def spec_of(trainable: Any) -> ModelSpec:
    torch.manual_seed(0)
    x, y = {"x": torch.randn(12, 4, 6)}, {"y": torch.arange(12) % 3}
    return ModelSpec("net", Net(), F.cross_entropy, x, y, trainable=trainable, optimizer=Adam(0.01))


def test_only_adapters_travel_and_they_train_as_in_torch(tmp_path: Path) -> None:
    spec = spec_of(LoRA(2, ("q", "v"), alpha=4.0))
    compiled = compile_model(spec, tmp_path, RUNTIMES)
    assert compiled.bundle.manifest.shared_shapes == {
        "p_q.lora_a": (2, 6),
        "p_q.lora_b": (5, 2),
        "p_v.lora_a": (2, 6),
        "p_v.lora_b": (5, 2),
    }
    assert {"f_q.weight", "f_v.weight", "f_v.bias", "f_head.weight"} <= set(compiled.bundle.manifest.weight_shapes)
    assert all(found.train_short < 2e-5 for found in compiled.parity.values())
    # The author's module has not been touched, and the model begins as it was.
    assert set(dict(spec.module.named_parameters())) == set(dict(Net().named_parameters()))
    with torch.no_grad():
        expected = spec.module.eval()(spec.inputs["x"][:8]).numpy()
    np.testing.assert_allclose(compiled.bundle.golden().outputs["logits"], expected, atol=1e-6)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    spec = spec_of(LoRA(2, ("q", "v"), also=("head",)))
    return compile_model(spec, tmp_path_factory.mktemp("adapted"), RUNTIMES).bundle


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_trained_adapters_answer_alike_merged_and_beside(runtime: str, adapted: Bundle) -> None:
    bundle = adapted
    inputs, targets = ({n: t.numpy() for n, t in part.items()} for part in spec_of(every_weight).batch(12))
    session = runtime_named(runtime).train(bundle, bundle.weights(), {"lr": 0.05})
    losses = [session.step(inputs, targets) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    # Judging takes the two small matrices; answering on ONNX Runtime takes their product with the frozen one.
    logits = torch.from_numpy(runtime_named(runtime).infer(bundle, session.weights())(inputs)["logits"])
    judged = runtime_named(runtime).evaluate(bundle, session.weights())(inputs, targets)
    assert judged["loss"] == pytest.approx(
        F.cross_entropy(logits, torch.from_numpy(targets["y"])).item() * 12, rel=1e-4
    )
    _, files = successor(bundle, session.weights(), runtime_named(runtime))
    assert len(files["weights.safetensors"]) == bundle.manifest.files["weights.safetensors"].size


def test_onnx_runtime_answers_with_one_matrix_and_litert_with_two_small_ones(tmp_path: Path) -> None:
    bundle = compile_model(spec_of(LoRA(2, ("q",))), tmp_path).bundle
    graph = onnx.load(str(bundle.graph_path("onnx", "infer")), load_external_data=False).graph
    made_of_weights = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul" and set(node.input) <= made_of_weights]
    assert len(products) == 1


def test_the_head_is_what_runs_last(tmp_path: Path) -> None:
    bundle = compile_model(spec_of(Head()), tmp_path).bundle
    assert set(bundle.manifest.shared_shapes) == {"p_head.weight", "p_head.bias"}
    for spec in (digits.cnn(), smartwatch.spec()):
        assert trained_in(replace(spec, trainable=Head())) == {"head.weight", "head.bias"}
    assert trained_in(replace(shakespeare.spec(), trainable=Head())) == {"embedding.weight"}, "they are tied"


def trained_in(spec: ModelSpec) -> set[str]:
    made = resolved(spec)
    return {name for name, _ in made.module.named_parameters() if made.trains(name)}


class Tied(nn.Module):
    """The head shares the embedding's weights, and one layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.head.weight = self.embedding.weight
        twice = nn.Linear(4, 4)
        self.body = nn.Sequential(twice, nn.Tanh(), twice)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.embedding(x)).mean(1))
        return logits


@pytest.mark.parametrize("chosen", [Head(), Named(("head",)), Named(("head.weight", "head.bias"))])
def test_a_tied_weight_is_trained_by_any_of_its_names(chosen: Trainable) -> None:
    assert trained_in(tied(chosen)) == {"embedding.weight", "head.bias"}


def tied(chosen: Trainable) -> ModelSpec:
    torch.manual_seed(0)
    inputs, targets = torch.randint(0, 7, (12, 5)), torch.arange(12) % 7
    return ModelSpec("tied", Tied(), F.cross_entropy, {"x": inputs}, {"y": targets}, trainable=chosen)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["body.0", "body.2"])
def test_a_layer_that_runs_twice_has_its_adapter_both_times(path: str, tmp_path: Path) -> None:
    spec = tied(LoRA(2, (path,)))
    assert trained_in(spec) == {"body.0.lora_a", "body.0.lora_b"}
    module = resolved(spec).module
    assert module.get_submodule("body.2") is module.get_submodule("body.0")
    before = {name: parameter.clone() for name, parameter in spec.module.named_parameters()}
    compile_model(spec, tmp_path, ("onnx", "litert"))
    assert all(torch.equal(parameter, before[name]) for name, parameter in spec.module.named_parameters())
    assert all(type(parameter) is nn.Parameter for parameter in spec.module.parameters())


@pytest.mark.parametrize(
    ("chosen", "trained"),
    [
        (("v",), {"v.weight", "v.bias"}),
        (("*.bias", "q.weight"), {"v.bias", "head.bias", "norm.bias", "q.weight"}),
    ],
)
def test_names_choose_weights_and_whole_modules(chosen: tuple[str, ...], trained: set[str]) -> None:
    spec = resolved(spec_of(Named(chosen)))
    assert {name for name, _ in spec.module.named_parameters() if spec.trains(name)} == trained


def test_what_its_author_froze_stays_frozen_unless_it_is_chosen_by_name() -> None:
    spec = spec_of(every_weight)
    assert len(trained_in(spec)) == 7
    spec.module.get_submodule("v").requires_grad_(False)
    assert trained_in(spec) == {"q.weight", "head.weight", "head.bias", "norm.weight", "norm.bias"}
    assert trained_in(replace(spec, trainable=Named(("v",)))) == {"v.weight", "v.bias"}


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_alpha_that_would_let_adapters_do_nothing_is_refused(alpha: float) -> None:
    with pytest.raises(CannotCompile, match="alpha of"):
        LoRA(2, ("q",), alpha=alpha)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.attention(x, x, x)[0].mean(1)
        return mixed


@pytest.mark.parametrize(
    ("trainable", "match"),
    [
        (LoRA(2, ("nowhere",)), "no layer goes by.*q, v, head"),
        (LoRA(2, ("norm",)), "'norm' is a LayerNorm, and LoRA goes into nn.Linear"),
        (Named(("headd",)), "no weight goes by 'headd'"),
        (LoRA(2, ("q",), also=("headd",)), "no weight goes by 'headd'"),
    ],
)
def test_a_choice_that_fits_nothing_is_refused(trainable: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(CannotCompile, match=match):
        compile_model(spec_of(trainable), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_lora_in_a_layer_that_would_never_be_called_is_refused() -> None:
    spec = replace(spec_of(LoRA(2, ("out_proj",))), module=Attending(), optimizer=SGD())
    with pytest.raises(CannotCompile, match=r"out_proj.*NonDynamicallyQuantizableLinear"):
        resolved(spec)
