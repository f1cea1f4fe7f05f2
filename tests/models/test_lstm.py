"""An LSTM's own gradient, and the operator that ONNX Runtime has for it where no gradient is taken."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from umbel_models.compile import compile_model
from umbel_models.lstm import lstm_direction
from umbel_models.spec import ModelSpec


class Ends(nn.Module):
    """Hangs on all that an LSTM gives: each step, and the last states of both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        output, (hidden, cell) = self.lstm(x)
        ends = torch.cat([hidden, cell]).transpose(0, 1).flatten(1)
        logits: Tensor = self.head(torch.cat([output.mean(1), ends], 1))
        return logits


@pytest.mark.parametrize("steps", [1, 6, 20, 47])
def test_its_gradient_is_that_of_torch_for_every_weight_and_both_ends(steps: int) -> None:
    torch.manual_seed(0)
    x, hidden, cell = torch.randn(3, steps, 5), torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    for biases in (True, False):
        layer = nn.LSTM(5, 4, batch_first=True, bias=biases)
        weights = list(layer.parameters())

        def loss(output: Tensor, last: Tensor, end: Tensor) -> Tensor:
            return (output * torch.arange(4.0)).sum() + 2 * last.sum() + (end * end).sum()

        output, (last, end) = layer(x, (hidden, cell))
        expected = torch.autograd.grad(loss(output, last, end), weights)
        ours, (last, end) = lstm_direction(x, (hidden[0], cell[0]), weights, False)
        torch.testing.assert_close(ours, output)
        for found, wanted in zip(torch.autograd.grad(loss(ours, last, end), weights), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_onnx_runtime_answers_with_its_own_operator_and_trains_without(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = ModelSpec("ends", Ends(), F.cross_entropy, {"x": torch.randn(8, 5, 3)}, {"y": torch.arange(8) % 2})
    compile_model(spec, tmp_path)  # behind the gate: answers, metrics and twenty steps as in torch
    counts = {}
    for signature in ("infer", "evaluate", "train"):
        nodes = onnx.load(str(tmp_path / f"{signature}.onnx"), load_external_data=False).graph.node
        counts[signature] = sum(node.op_type == "LSTM" for node in nodes)
    assert counts == {"infer": 2, "evaluate": 2, "train": 0}
