"""A training graph does in few operators what its author wrote, and not a number of it changes."""

from __future__ import annotations

import math
from collections import Counter
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
from umbel.errors import RuntimeFailure
from umbel.runtime.named import runtime_named
from umbel_models.compile import compile_model
from umbel_models.onnx.folding import folded, views_last, written_where_made
from umbel_models.optimizers import SGD, Adam, Optimizer, Proximal
from umbel_models.spec import ModelSpec
from umbel_models.trainable import LoRA

RUNTIMES = ("onnx", "litert")


def dense(loss: Any = F.cross_entropy, optimizer: Optimizer | None = None) -> ModelSpec:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    targets = {"y": torch.tensor([0, 1, 3, 4] * 3)}
    return ModelSpec("dense", net, loss, {"x": torch.randn(12, 6)}, targets, optimizer=optimizer or SGD(0.1))


def operators(bundle: Bundle) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(bundle.graph_path("onnx", "train"))).graph.node)


def moved_by_torch(spec: ModelSpec, y: Tensor) -> tuple[float, list[Tensor]]:
    weights = [p.detach().clone().requires_grad_() for p in spec.module.parameters()]
    named = dict(zip([name for name, _ in spec.module.named_parameters()], weights, strict=True))
    loss = spec.loss(torch.func.functional_call(spec.module, named, tuple(spec.inputs.values())), y)
    gradients = torch.autograd.grad(loss, weights)
    return float(loss.detach()), [
        weight.detach() - 0.1 * slope for weight, slope in zip(weights, gradients, strict=True)
    ]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("reduction", "ignored"),
    [
        ("mean", -100),
        ("sum", 2),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in (("mean", 2), ("sum", -100))),
    ],
)
def test_an_example_without_a_class_weighs_nothing(runtime: str, reduction: str, ignored: int, tmp_path: Path) -> None:
    def of(out: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(out, y, ignore_index=ignored, reduction=reduction)
        return loss / y.shape[0] if reduction == "sum" else loss

    spec = dense(of)
    y = torch.tensor([0, ignored, 1, 4, ignored, 3, 3, ignored, 0, 1, 4, ignored])
    bundle = compile_model(spec, tmp_path, (runtime,)).bundle
    session = runtime_named(runtime).train(bundle, bundle.weights())
    loss, expected = moved_by_torch(spec, y)
    assert session.step({"x": spec.inputs["x"].numpy()}, {"y": y.numpy()}) == pytest.approx(loss, rel=1e-5)
    for (name, _), weight in zip(spec.module.named_parameters(), expected, strict=True):
        np.testing.assert_allclose(session.weights()[f"p_{name}"], weight.numpy(), atol=1e-6)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_target_that_is_no_class_is_an_error_and_moves_nothing(
    runtime: str, smoothing: float, tmp_path: Path
) -> None:
    spec = dense(lambda out, y: F.cross_entropy(out, y, label_smoothing=smoothing))
    bundle = compile_model(spec, tmp_path, (runtime,)).bundle
    session = runtime_named(runtime).train(bundle, bundle.weights())
    judge, x = runtime_named(runtime).evaluate(bundle, bundle.weights()), {"x": spec.inputs["x"].numpy()}
    for wrong in (5, -1, -6, 2**40):
        y = {"y": np.array([0, 1, 3, 4, wrong, *[0] * 7])}
        with pytest.raises(RuntimeFailure, match="train"):
            session.step(x, y)
        with pytest.raises(RuntimeFailure, match="evaluate"):
            judge(x, y)
    assert session.weights() == bundle.shared_weights()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_token_that_is_not_in_the_table_is_an_error(runtime: str, tmp_path: Path) -> None:
    spec = ModelSpec(
        "tokens",
        nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(20, 3)),
        F.cross_entropy,
        {"x": torch.randint(0, 11, (12, 5))},
        {"y": torch.arange(12) % 3},
    )
    bundle = compile_model(spec, tmp_path, (runtime,)).bundle
    answer = runtime_named(runtime).infer(bundle, bundle.weights())
    for wrong in (11, -1, -12):
        with pytest.raises(RuntimeFailure, match="infer"):
            answer({"x": np.array([[0, 1, wrong, 3, 10]])})


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"label_smoothing": 0.1}, marks=pytest.mark.slow),
        {"weight": torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])},
    ],
)
def test_smoothed_labels_and_weighted_classes_are_torchs_own(settings: dict[str, Any], tmp_path: Path) -> None:
    compiled = compile_model(dense(lambda out, y: F.cross_entropy(out, y, **settings)), tmp_path, RUNTIMES)
    assert all(found.train_short < 1e-5 for found in compiled.parity.values())


def test_a_descent_of_a_dense_layer_is_one_operator(tmp_path: Path) -> None:
    found = operators(compile_model(dense(), tmp_path, ("onnx",)).bundle)
    assert (found["Gemm"], found["MatMul"], found["Sub"]) == (4, 1, 2), "two forth, two descents, one back, two biases"
    assert not found["Reshape"], "a bias takes the sum over the batch as it comes"


def test_the_learning_rate_is_multiplied_in_once(tmp_path: Path) -> None:
    bundle = compile_model(dense(optimizer=Proximal(SGD(0.1))), tmp_path, ("onnx",)).bundle
    nodes = onnx.load(str(bundle.graph_path("onnx", "train"))).graph.node
    assert sum("lr" in node.input for node in nodes) == 2, "for the gradients, and for the pull to the anchor"


def test_what_a_step_leaves_behind_is_copied_nowhere(tmp_path: Path) -> None:
    for optimizer in (SGD(0.1, momentum=0.9), Adam(0.01)):
        found = operators(compile_model(dense(optimizer=optimizer), tmp_path / type(optimizer).__name__).bundle)
        assert not found["Identity"], "a velocity, which its weight is moved by too, would take its size once more"


def test_an_output_that_nothing_makes_or_that_stands_in_another_is_a_copy() -> None:
    make = onnx.helper.make_node
    copies = [make("Identity", [source], [to]) for source, to in (("t0", "first"), ("t0", "second"), ("x", "third"))]
    nodes = [make("Relu", ["x"], ["t0"]), make("Neg", ["t0"], ["t1"]), *copies, make("Identity", ["t1"], ["inner"])]
    found = written_where_made(nodes, {"first", "second", "third"})
    assert [(node.op_type, *node.input, *node.output) for node in found] == [
        ("Relu", "x", "first"),
        ("Neg", "first", "t1"),
        ("Identity", "first", "second"),
        ("Identity", "x", "third"),
        ("Identity", "t1", "inner"),
    ]


@pytest.mark.parametrize(
    "optimizer",
    [
        Proximal(Adam(0.01)),
        *(
            pytest.param(other, marks=pytest.mark.slow)
            for other in (SGD(0.1, momentum=0.9), Adam(0.01), Proximal(SGD(0.1), 0.3))
        ),
    ],
)
def test_optimisers_with_a_memory_see_gradients_as_they_are(optimizer: Optimizer, tmp_path: Path) -> None:
    compiled = compile_model(dense(optimizer=optimizer), tmp_path, RUNTIMES)
    assert all(found.train_short < 1e-5 for found in compiled.parity.values())


def test_a_clipped_descent_takes_the_mean_of_what_was_clipped(tmp_path: Path) -> None:
    compiled = compile_model(replace(dense(), clip_examples=0.5), tmp_path, RUNTIMES)
    assert all(found.train_short < 1e-5 for found in compiled.parity.values())


def test_an_adapter_is_added_within_its_second_product(tmp_path: Path) -> None:
    spec = replace(dense(), trainable=LoRA(2, ("0",), also=("2.*",)))
    assert not operators(compile_model(spec, tmp_path, ("onnx",)).bundle)["Add"]


SHAPES = {"a": ["4", "3"], "b": ["3", "2"], "at": ["3", "4"], "bt": ["2", "3"], "p": ["4", "2"], "c": ["4", "2"]}


def test_a_number_that_meets_a_column_is_one_too(tmp_path: Path) -> None:
    """ONNX Runtime takes seven times as long for a column and a number without dimensions."""
    bundle = compile_model(dense(), tmp_path, ("onnx",)).bundle
    model = onnx.shape_inference.infer_shapes(onnx.load(bundle.graph_path("onnx", "train")))
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.value_info}
    numbers = {one.name: one.dims for one in model.graph.initializer if not math.prod(one.dims) > 1}
    (equal,) = (node for node in model.graph.node if node.op_type == "Equal")
    column, number = equal.input
    assert (ranks[column], list(numbers[number])) == (2, [1, 1])


def product_and(kind: str, *operands: str) -> list[onnx.NodeProto]:
    make = onnx.helper.make_node
    return [
        make("Transpose", ["at"], ["a"], perm=[1, 0]),
        make("Transpose", ["bt"], ["b"], perm=[1, 0]),
        make("MatMul", ["a", "b"], ["p"]),
        make(kind, list(operands), ["y"]),
    ]


@pytest.mark.parametrize(("kind", "operands", "sign"), [("Sub", "cp", -1.0), ("Add", "cp", 1.0), ("Add", "pc", 1.0)])
def test_a_product_goes_into_a_sum_with_its_transposes(kind: str, operands: str, sign: float) -> None:
    last = folded(product_and(kind, *operands), SHAPES | {"y": ["4", "2"]})[-1]
    settings = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in last.attribute}
    assert (last.op_type, list(last.input)) == ("Gemm", ["at", "bt", "c"])
    assert settings == {"alpha": sign, "transA": 1, "transB": 1}


def test_a_product_stays_apart_where_a_sum_is_another_thing() -> None:
    taken_off = product_and("Sub", "p", "c")
    broadcast = product_and("Add", "p", "c")
    used_twice = [*product_and("Add", "p", "c"), onnx.helper.make_node("Relu", ["p"], ["z"])]
    for nodes, shapes in ((taken_off, {}), (broadcast, {"c": ["2"]}), (used_twice, {}), (broadcast, {"y": []})):
        assert folded(nodes, SHAPES | {"y": ["4", "2"]} | shapes) == nodes


def seen_in_another_shape(kind: str) -> list[onnx.NodeProto]:
    make = onnx.helper.make_node
    views = [make("Reshape", [name, "sizes"], [f"{name}_seen"]) for name in ("p", "c")]
    return [*product_and("Relu", "c")[:3], *views, make(kind, ["p_seen", "c_seen"], ["y"])]


def test_a_sum_of_views_is_taken_before_them_and_takes_in_a_product() -> None:
    shapes = SHAPES | {"p_seen": ["2", "2", "2"], "c_seen": ["2", "2", "2"], "y": ["2", "2", "2"]}
    *_, total, view = views_last(seen_in_another_shape("Add"), shapes)
    assert (total.op_type, list(total.input), view.op_type) == ("Add", ["p", "c"], "Reshape")
    assert (list(view.input), list(view.output)) == ([*total.output, "sizes"], ["y"])
    kept = [*seen_in_another_shape("Add")[:3], total, view]
    assert [node.op_type for node in folded(kept, shapes)][-2:] == ["Gemm", "Reshape"]


@pytest.mark.parametrize(
    ("kind", "change"), [("Mul", {}), ("Add", {"c": ["2", "4"]}), ("Add", {"p": ["8"], "c": ["8"]})]
)
def test_views_of_other_things_stay_where_they_are(kind: str, change: dict[str, list[str]]) -> None:
    nodes = seen_in_another_shape(kind)
    assert views_last(nodes, SHAPES | {"y": ["2", "2", "2"]} | change) == nodes
