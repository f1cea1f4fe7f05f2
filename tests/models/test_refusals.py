"""What can't be compiled is refused by name, says what to change, and leaves nothing behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from umbel.bundle import Bundle
from umbel.errors import CannotCompile, OperatorNotSupported, ParityFailed, RuntimeFailure
from umbel.runtime import InferSession
from umbel.runtime.onnx import OnnxRuntime
from umbel.weights import Weights
from umbel_models import optimizers, parity
from umbel_models.compile import compile_model
from umbel_models.spec import ModelSpec
from umbel_models.trainable import Head
from umbel_models.zoo import digits


class Fancy(nn.Module):
    """Holds a function in a module of its own, to be found by path."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.odd = Odd(function)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.odd(self.first(x)))
        return logits


class Odd(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def spec_of(module: nn.Module, **changes: Any) -> ModelSpec:
    torch.manual_seed(0)
    spec = ModelSpec("odd", module, F.cross_entropy, {"x": torch.randn(12, 6)}, {"y": torch.arange(12) % 3})
    return replace(spec, **changes)


def refuse(spec: ModelSpec, error: type[CannotCompile], match: str, folder: Path) -> None:
    with pytest.raises(error, match=match):
        compile_model(spec, folder / "bundle")
    assert not (folder / "bundle").exists()


def test_an_operator_without_translation_is_named_with_its_module(tmp_path: Path) -> None:
    refuse(spec_of(Fancy(torch.special.i0)), OperatorNotSupported, "i0.*module 'odd'", tmp_path)


def test_a_batch_size_read_as_a_number_is_refused(tmp_path: Path) -> None:
    def loop(x: Tensor) -> Tensor:
        return torch.stack([row * 2 for row in x])

    refuse(spec_of(Fancy(loop)), CannotCompile, "batch", tmp_path)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda x: F.rrelu(x, training=True), "rrelu, which draws.*leaky_relu"),
        (lambda x: F.dropout(x, 0.5), "random outside of training"),
        (lambda x: F.gumbel_softmax(x), "gumbel_softmax, which draws"),
    ],
)
def test_chance_that_no_seed_could_tell_again_is_refused(
    function: Callable[[Tensor], Tensor], match: str, tmp_path: Path
) -> None:
    refuse(spec_of(Fancy(function)), OperatorNotSupported, match, tmp_path)


def test_randomness_in_a_forward_is_refused(tmp_path: Path) -> None:
    refuse(spec_of(Fancy(lambda x: x + torch.randn_like(x))), CannotCompile, "randn|rand", tmp_path)


def written_through_a_view(x: Tensor) -> Tensor:
    x = x * 1
    x.view(-1, 2, 3)[:, 0] = 2.0
    return x


@pytest.mark.parametrize(
    ("function", "error", "match"),
    [
        (lambda x: x * x.mode(1, True)[0], OperatorNotSupported, r"aten.mode.*module 'odd'.*torch.sort"),
        (lambda x: x * x.cumprod(1), OperatorNotSupported, r"aten.cumprod.*module 'odd'.*cumsum of logarithms"),
        (torch.special.i1, OperatorNotSupported, r"i1.*module 'odd'.*what-compiles.md, or give what it comes to"),
        (lambda x: x.sort(0)[0], OperatorNotSupported, r"sort along another dimension.*module 'odd'"),
        (lambda x: x.roll(1, 0), OperatorNotSupported, r"roll another dimension.*module 'odd'"),
        (written_through_a_view, OperatorNotSupported, r"module 'odd'.*writing into a part.*torch.cat"),
        (lambda x: x if x.sum() > 0 else -x, CannotCompile, r"what number a tensor holds.*torch.where.*module 'odd'"),
        (lambda x: x * int(x.sum()), CannotCompile, r"what number a tensor holds.*torch.where.*module 'odd'"),
        (lambda x: F.interpolate(x[:, None, None, None], (1, 1, 6)).flatten(1), OperatorNotSupported, r"5 dim.*'odd'"),
    ],
)
def test_a_refusal_names_the_module_and_what_to_use_instead(
    function: Callable[[Tensor], Tensor], error: type[CannotCompile], match: str, tmp_path: Path
) -> None:
    refuse(spec_of(Fancy(function)), error, match, tmp_path)


def test_packed_sequences_are_refused(tmp_path: Path) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(1, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            lengths = torch.full([x.shape[0]], 6)
            packed = nn.utils.rnn.pack_padded_sequence(x[:, :, None], lengths, batch_first=True)
            last: Tensor = self.lstm(packed)[1][0][0]
            return last

    refuse(spec_of(Packed()), CannotCompile, "pack", tmp_path)


def test_a_module_whose_trace_took_one_branch_fails_parity(tmp_path: Path) -> None:
    calls = []

    def changing(x: Tensor) -> Tensor:
        calls.append(1)
        return x * (1.0 + 0.01 * len(calls))

    refuse(spec_of(Fancy(changing)), ParityFailed, "infer", tmp_path)


def test_a_wrong_optimizer_is_caught_by_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        optimizers.SGD,
        "torch_optimizer",
        lambda self, weights: optimizers.TorchOptimizer(torch.optim.SGD(weights, 1.5 * self.lr)),
    )
    refuse(replace(digits.mlp(), optimizer=optimizers.SGD(0.05)), ParityFailed, r"train \(step 1\): 'p_", tmp_path)


class _GivesUp(OnnxRuntime):
    def infer(self, bundle: Bundle, weights: Weights) -> InferSession:
        raise RuntimeFailure("gave up")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([1.0, math.nan], [1.0, 1.0]),
        ([1.0, 1.0], [1.0, math.nan]),
        ([math.nan], [math.nan]),
        ([1.0, 1.1], [1.0, 1.0]),
        ([110.0, 1.0], [100.0, 1.0]),
        ([1.0], [1.0, 1.0]),
    ],
)
def test_the_gate_lets_no_other_number_through_nor_one_that_is_none(found: list[float], expected: list[float]) -> None:
    with pytest.raises(ParityFailed, match=r"infer: 'y'"):
        parity._compare("infer", "y", np.array(found), np.array(expected), 0.05)
    close = np.array([1.0, 104.0, 3.0])
    assert parity._compare("infer", "y", close, np.array([3.0, 100.0, 3.0]), 0.05) == pytest.approx(0.04)
    assert parity._compare("infer", "y", close, np.array([3.0, 100.0, 3.0]), 0.03, np.array([0.0, 1.0, 0.0])) == 0.03


def test_a_bundle_of_other_weights_fails_parity(tmp_path: Path) -> None:
    bundle = compile_model(digits.mlp(), tmp_path).bundle
    with pytest.raises(ParityFailed, match=r"other numbers in .*torch.manual_seed"):
        parity.check_parity(digits.mlp(seed=1), Bundle.open(tmp_path), OnnxRuntime())
    assert parity.check_parity(digits.mlp(), bundle, OnnxRuntime()).infer < 1e-5
    with pytest.raises(ParityFailed, match="the compiled graphs don't run: gave up"):
        parity.check_parity(digits.mlp(), bundle, _GivesUp())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"targets": {"y": torch.arange(5)}}, "batch dimension"),
        ({"inputs": {}}, "batch dimension"),
        ({"inputs": {"x": torch.tensor(1.0)}, "targets": {"y": torch.tensor(1)}}, "batch dimension"),
        ({"inputs": {"x": torch.randn(1, 6)}, "targets": {"y": torch.zeros(1)}}, "two examples"),
        *(({"clip_examples": norm}, "a number above zero") for norm in (0.0, -1.0, math.inf, math.nan)),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(CannotCompile, match=match):
        spec_of(nn.Linear(6, 3), **changes)


def test_two_examples_are_a_batch() -> None:
    two = {"inputs": {"x": torch.randn(2, 6)}, "targets": {"y": torch.zeros(2)}}
    assert spec_of(nn.Linear(6, 3), **two).example_count == 2


def test_a_choice_that_is_yet_to_be_worked_out_names_no_weight() -> None:
    with pytest.raises(CannotCompile, match="worked out first"):
        spec_of(nn.Linear(6, 3), trainable=Head()).trains("weight")


def counting() -> nn.Module:
    """A weight that is a whole number."""
    module = nn.Linear(6, 3)
    module.register_parameter("steps", nn.Parameter(torch.tensor(3), requires_grad=False))
    return module


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"trainable": lambda name: False}, "no weight is trainable"),
        ({"outputs": ("a", "b")}, "returns 1 tensors"),
        ({"inputs": {"lr": torch.randn(12, 6)}}, "names of inputs"),
        ({"module": nn.Linear(6, 3).double()}, "float64; convert the module"),
        ({"module": counting()}, "int64; keep what doesn't move in a buffer"),
    ],
)
def test_a_spec_that_does_not_fit_its_module_is_refused(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    module = changes.pop("module", nn.Linear(6, 3))
    if "float64" in match:
        changes["inputs"] = {"x": torch.randn(12, 6, dtype=torch.float64)}
    refuse(spec_of(module, **changes), CannotCompile, match, tmp_path)
