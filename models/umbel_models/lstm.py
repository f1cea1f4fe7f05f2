"""A layer of LSTM (Hochreiter and Schmidhuber, 1997) in one direction, with a gradient of its own.

Unrolled, a step costs what its operators cost to start, not what they compute. So whatever hangs on no other step is
worked out for many steps at once: the inputs' part of the gates, the slopes of all gates, the weights' gradients. What
is left is ten small operators a step on the way forth and six on the way back, a third of what autograd would leave.

Steps lie one after the other, [T * N, ...], so that each is cut out and joined as one piece of memory. A gate s that
lets s v through has the slope v s (1 - s) = s v - s (s v), and s v is what the way forth gave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import torch
from torch import Tensor

State = tuple[Tensor, ...]
_TOGETHER: Final = 20
"""How many steps' slopes are worked out at once: few enough that they stay in a processor's second cache."""
_KEPT: Final = 8
"""What `_slopes` asks for."""
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
    flat = (x.flip(1) if backwards else x).transpose(0, 1).reshape(-1, x.shape[2])
    given = torch.addmm(biases[0] + biases[1], flat, to_input.t()) if biases else torch.mm(flat, to_input.t())
    hidden, cell, *_ = _Sequence.apply(given, to_state, *state, steps)  # type: ignore[no-untyped-call]
    hidden = hidden.reshape(steps, -1, size)
    output = hidden.transpose(0, 1)
    return (output.flip(1) if backwards else output), (hidden[steps - 1], cell)


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
    """All steps [T * N, 4H] to hidden states [T * N, H], the last cell [N, H], and what the way back needs."""

    @staticmethod
    def forward(given: Tensor, recurrent: Tensor, hidden: Tensor, cell: Tensor, steps: int) -> tuple[Tensor, ...]:
        size, turned = recurrent.shape[1], recurrent.t()
        before, keeps, kept, joined = [hidden], [], [], []
        for at, step in enumerate(_by_step(given, hidden, steps)):
            raw, new = torch.split(torch.addmm(step, hidden, turned), [3 * size, size], 1)
            let_in, keep, give = torch.split(torch.sigmoid(raw), size, 1)
            new = torch.tanh(new)
            entered, stayed = let_in * new, keep * cell
            cell = stayed + entered
            squashed = torch.tanh(cell)
            hidden = give * squashed
            before.append(hidden)
            keeps.append(keep)
            kept.append((hidden, let_in, keep, give, new, entered, stayed, squashed))
            if at == steps - 1 or len(kept) == _TOGETHER:
                joined += [torch.cat(parts) for parts in zip(*kept, strict=True)]
                kept = []
        return torch.cat(before[1:]), cell, torch.cat(before[:-1]), *keeps, *joined

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, recurrent, hidden, _, ctx.steps = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(recurrent, hidden, *output[2:])

    @staticmethod
    def backward(ctx: Any, to_hidden: Tensor, to_cell: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        recurrent, hidden, before, *others = ctx.saved_tensors
        steps: int = ctx.steps
        keeps, joined = others[:steps], others[steps:]
        wanted = _by_step(to_hidden, hidden, steps)
        to_gates: list[Tensor] = []
        now = wanted[-1]
        for first in reversed(range(0, steps, _TOGETHER)):
            until = min(first + _TOGETHER, steps)
            kept, joined = joined[-_KEPT:], joined[:-_KEPT]
            slopes, through = (_by_step(part, hidden, until - first) for part in _slopes(*kept))
            for at in reversed(range(first, until)):
                to_cell = now * through[at - first] + to_cell
                to_gates.append(torch.cat([to_cell, to_cell, now, to_cell], 1) * slopes[at - first])
                to_cell = to_cell * keeps[at]
                now = torch.addmm(wanted[at - 1], to_gates[-1], recurrent) if at else torch.mm(to_gates[-1], recurrent)
        every = torch.cat(to_gates[::-1])
        return every, torch.mm(every.t(), before), now, to_cell, None


def _by_step(every: Tensor, one: Tensor, steps: int) -> Sequence[Tensor]:
    """[T * N, ...] cut into T times [N, ...], as many rows as `one` has."""
    return torch.split_with_sizes(every, [one.shape[0]] * steps)


def _slopes(
    hidden: Tensor,
    let_in: Tensor,
    keep: Tensor,
    give: Tensor,
    new: Tensor,
    entered: Tensor,
    stayed: Tensor,
    squashed: Tensor,
) -> tuple[Tensor, Tensor]:
    """How gates act on what they move, [T * N, 4H], and how hidden states hang on cells, [T * N, H]."""
    parts = [entered - entered * let_in, stayed - stayed * keep, hidden - hidden * give, let_in - entered * new]
    return torch.cat(parts, 1), give - hidden * squashed
