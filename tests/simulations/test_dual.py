"""A layer has a dual form only where all that becomes of its weight stays within the span of the examples."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tests.simulations import tiny
from umbel.manifest import Manifest
from umbel_models.optimizers import SGD, Proximal
from umbel_simulations.cohort.dual import DualStep, HasNone, in_dual_form

OUT, IN = 6, tiny.FEATURES
W, NEXT, ANCHOR = "p_hidden.weight", "next_p_hidden.weight", "s_anchor_hidden.weight"
ANSWER = "Transpose W -> turned perm=[1, 0]; Gemm x turned p_hidden.bias -> a; ReduceSum a -> loss keepdims=0"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Of a net whose first layer has an anchor."""
    return tiny.compiled(tmp_path_factory.mktemp("bundle"), Proximal(SGD(lr=0.1), mu=0.5)).manifest


def step(told: str) -> ModelProto:
    """A training step: `operator inputs -> output attributes; ...`, with W for the weight."""
    nodes = [_node(line.strip()) for line in told.split(";")]
    shapes: dict[str, list[str | int]] = {
        "x": ["batch", IN], W: [OUT, IN], ANCHOR: [OUT, IN], "p_hidden.bias": [OUT], "lr": []
    }  # fmt: skip
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    outputs = [helper.make_tensor_value_info(NEXT, TensorProto.FLOAT, [OUT, IN])]
    outputs.append(helper.make_tensor_value_info("loss", TensorProto.FLOAT, []))
    known = {"tenth": np.array(0.1, np.float32), "by_feature": np.ones(IN, np.float32)}
    arrays = [numpy_helper.from_array(array, name) for name, array in known.items()]
    graph = helper.make_graph(nodes, "step", inputs, outputs, arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _node(told: str) -> NodeProto:
    names = {"W": W, "next": NEXT, "anchor": ANCHOR}
    (operator, *inputs), (output, *attributes) = (part.split() for part in told.split(" -> "))
    rest = " ".join(attributes).replace(", ", ",").split()
    given = {name: eval(value) for name, value in (one.split("=") for one in rest)}
    return helper.make_node(operator, [names.get(name, name) for name in inputs], [names.get(output, output)], **given)


def dual(told: str, manifest: Manifest) -> DualStep:
    return in_dual_form(step(f"{ANSWER}; {told}"), manifest)


@pytest.mark.parametrize(
    "told",
    [
        "Gemm a x W -> next alpha=-1.0 transA=1",
        "Sub W anchor -> away; Gemm a x away -> g transA=1; Mul lr g -> move; Sub W move -> next",
        "Sub W anchor -> away; Mul away tenth -> some; Sub W some -> near; Gemm a x near -> next alpha=-1.0 transA=1",
        "Sub anchor W -> home; Mul lr home -> some; Add W some -> near; Gemm a x near -> next alpha=-1.0 transA=1",
    ],
    ids=["plain", "proximal", "moved home first", "towards home"],
)
def test_sums_differences_and_factors_stay_within_the_span(told: str, manifest: Manifest) -> None:
    found = dual(told, manifest)
    assert (found.weight, found.taken, found.reads_input) == (W, "x", True)
    assert {value.name for value in found.model.graph.input} >= {"@first", "@gram", "@picked", W}
    assert not {"x", ANCHOR} & {value.name for value in found.model.graph.input}


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ("Mul W tenth -> some; Sub W some -> less; Gemm a x less -> next alpha=-1.0 transA=1", "shrinks"),
        ("Mul W W -> square; Sub W square -> less; Gemm a x less -> next alpha=-1.0 transA=1", "shrinks"),
        ("Sub W anchor -> away; Gemm a x away -> next alpha=-1.0 transA=1", "sums and factors"),
        ("Gemm a x W -> moved alpha=-1.0 transA=1; Identity moved -> next", "Identity of the weight"),
        ("Sub W anchor -> away; Mul by_feature away -> some; Sub W some -> b; Gemm a x b -> next transA=1", "number"),
        (
            "Sub W anchor -> away; Transpose away -> t perm=[1, 0]; Gemm x t -> b; Add a b -> g; "
            "Gemm g x W -> next alpha=-1.0 transA=1",
            "beside the weight",
        ),
        ("Gemm a x anchor -> next alpha=-1.0 transA=1", "descent"),
        ("Gemm a x W -> next alpha=-0.5 transA=1", "product"),
        ("Gemm a x W -> next alpha=-1.0 beta=0.5 transA=1", "beta"),
        ("Mul a tenth -> far; Gemm far x W -> b alpha=-1.0 transA=1; Add b by_feature -> next", "something else"),
    ],
)  # fmt: skip
def test_what_leaves_the_span_has_no_dual_form(told: str, why: str, manifest: Manifest) -> None:
    with pytest.raises(HasNone, match=why):
        dual(told, manifest)


def test_who_reads_no_example_has_no_dual_form(manifest: Manifest) -> None:
    told = "Relu x -> r; Transpose W -> turned perm=[1, 0]; Gemm r turned -> a; ReduceSum a -> loss keepdims=0"
    with pytest.raises(HasNone, match="reads the examples"):
        in_dual_form(step(f"{told}; Gemm a r W -> next alpha=-1.0 transA=1"), manifest)


def test_a_layer_for_the_one_place_of_an_example_has_no_dual_form(manifest: Manifest) -> None:
    """Its answers have an axis more."""
    told = "Transpose W -> turned perm=[1, 0]; MatMul x turned -> a; ReduceSum a -> loss keepdims=0"
    model = step(f"{told}; Gemm a x W -> next alpha=-1.0 transA=1")
    (x,) = (value for value in model.graph.input if value.name == "x")
    x.CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, IN]))
    with pytest.raises(HasNone, match="reads the examples"):
        in_dual_form(model, manifest)
