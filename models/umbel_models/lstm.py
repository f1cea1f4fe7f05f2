"""A layer of LSTM (Hochreiter and Schmidhuber, 1997) in one direction, with a gradient of its own.

Unrolled, a step costs what its operators cost to start, not what they compute. So whatever hangs on no other step is
worked out for all steps at once: the inputs' part of the gates, the slopes of all gates, the weights' gradients. What
is left is ten small operators a step on the way forth and six on the way back, a third of what autograd would leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import torch
from torch import Tensor

State = tuple[Tensor, ...]
_whole: Final[ContextVar[bool]] = ContextVar("whole", default=False)


@contextmanager
def whole_layers() -> Iterator[None]:
    """While it is entered, a layer is traced as one operator, for runtimes that have one; it has no gradient."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


@torch.library.custom_op("umbel::lstm_layer", mutates_args=())
def lstm_layer(
    x: Tensor, to_input: Tensor, to_state: Tensor, biases: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor]:
    """One direction of a layer for x [T, N, I]: hidden states [T, N, H] and the last cell [N, H].

    Gates come in ONNX's order (input, output, forget, new); `biases` [8H] are those of input and state.
    """
    raise RuntimeError("it stands for an operator of a runtime, and is only traced")


@lstm_layer.register_fake
def _(
    x: Tensor, to_input: Tensor, to_state: Tensor, biases: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty([x.shape[0], x.shape[1], hidden.shape[1]]), torch.empty_like(cell)


def lstm_direction(x: Tensor, state: State, weights: Sequence[Tensor], backwards: bool) -> tuple[Tensor, State]:
    """What one direction of a layer gives for x [N, T, I] at each step, [N, T, H], and its last state.

    Args:
        x: the inputs.
        state: hidden and cell [N, H] to begin with.
        weights: torch's own, [4H, I], [4H, H] and where there are any two biases [4H].
        backwards: from the last step to the first.
    """
    size, steps = state[0].shape[1], x.shape[1]
    if _whole.get():
        return _as_one(x.flip(1) if backwards else x, state, weights, backwards)
    to_input, to_state, *biases = (_sigmoids_first(weight, size) for weight in weights)
    flat = (x.flip(1) if backwards else x).reshape(-1, x.shape[2])
    given = torch.addmm(biases[0] + biases[1], flat, to_input.t()) if biases else torch.mm(flat, to_input.t())
    # Steps side by side in one dimension, so that each is cut out and joined without another operator.
    hidden, cell, *_ = _Sequence.apply(given.reshape(-1, steps * 4 * size), to_state, *state)  # type: ignore[no-untyped-call]
    last = hidden[:, (steps - 1) * size :]
    output = hidden.reshape(-1, steps, size)
    return (output.flip(1) if backwards else output), (last, cell)


def _as_one(x: Tensor, state: State, weights: Sequence[Tensor], backwards: bool) -> tuple[Tensor, State]:
    size = state[0].shape[1]
    ordered = []
    for weight in weights:
        let_in, keep, new, give = torch.split(weight, size)
        ordered.append(torch.cat([let_in, give, keep, new]))
    biases = torch.cat(ordered[2:]) if ordered[2:] else torch.zeros([8 * size])
    hidden, cell = lstm_layer(x.transpose(0, 1), *ordered[:2], biases, *state)
    output = hidden.transpose(0, 1)
    last = output[:, x.shape[1] - 1]
    return (output.flip(1) if backwards else output), (last, cell)


def _sigmoids_first(weight: Tensor, size: int) -> Tensor:
    """From torch's order (input, forget, new, output) to one in which the new cell comes last."""
    first, new, output = torch.split(weight, [2 * size, size, size])
    return torch.cat([first, output, new])


class _Sequence(torch.autograd.Function):
    """All steps [N, T * 4H] to hidden states [N, T * H], the last cell [N, H], and what the way back needs."""

    @staticmethod
    def forward(given: Tensor, recurrent: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
        size, turned = recurrent.shape[1], recurrent.t()
        kept: list[State] = []
        for step in torch.split(given, 4 * size, 1):
            raw, new = torch.split(torch.addmm(step, hidden, turned), [3 * size, size], 1)
            gates, new = torch.sigmoid(raw), torch.tanh(new)
            let_in, keep, give = torch.split(gates, size, 1)
            cell = keep * cell + let_in * new
            squashed = torch.tanh(cell)
            hidden = give * squashed
            kept.append((hidden, gates, new, cell, squashed))
        hiddens, *others = (torch.cat(list(parts), 1) for parts in zip(*kept, strict=True))
        return hiddens, cell, *others

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, recurrent, hidden, cell = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(recurrent, hidden, cell, output[0], *output[2:])

    @staticmethod
    def backward(ctx: Any, to_hidden: Tensor, to_cell: Tensor, *_: Any) -> tuple[Tensor, ...]:
        recurrent, hidden, cell, hiddens, *others = ctx.saved_tensors
        size = recurrent.shape[1]
        slopes, through, keeps = _slopes(cell, size, *others)
        wanted = torch.split(to_hidden, size, 1)
        to_gates: list[Tensor] = []
        now = wanted[-1]
        for at in reversed(range(len(wanted))):
            to_cell = now * through[at] + to_cell
            to_gates.append(torch.cat([to_cell, to_cell, now, to_cell], 1) * slopes[at])
            to_cell = to_cell * keeps[at]
            now = torch.addmm(wanted[at - 1], to_gates[-1], recurrent) if at else torch.mm(to_gates[-1], recurrent)
        every = torch.cat(to_gates[::-1], 1)
        before = torch.cat([hidden, hiddens[:, : hiddens.shape[1] - size]], 1).reshape(-1, size)
        to_recurrent = torch.mm(every.reshape(-1, 4 * size).t(), before)
        return every, to_recurrent, now, to_cell


def _slopes(
    cell: Tensor, size: int, gates: Tensor, new: Tensor, cells: Tensor, squashed: Tensor
) -> tuple[Sequence[Tensor], ...]:
    """Step by step: how gates act on what they move, how the hidden state hangs on the cell, how much a cell keeps."""
    steps = new.shape[1] // size
    gates, new, squashed = (part.reshape(-1, steps, part.shape[1] // steps) for part in (gates, new, squashed))
    before = torch.cat([cell, cells[:, : cells.shape[1] - size]], 1).reshape(-1, steps, size)
    let_in, keep, give = torch.split(gates, size, 2)
    moved = torch.cat([new, before, squashed], 2) * (gates * (1 - gates))
    slopes = torch.cat([moved, let_in * (1 - new * new)], 2).reshape(-1, steps * 4 * size)
    through = (give * (1 - squashed * squashed)).reshape(-1, steps * size)
    keep = keep.reshape(-1, steps * size)
    return torch.split(slopes, 4 * size, 1), torch.split(through, size, 1), torch.split(keep, size, 1)
