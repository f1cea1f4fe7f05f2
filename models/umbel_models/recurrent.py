"""LSTM, GRU and plain recurrent nets, step by step: what torch does in one kernel, in operators that any runtime has.

The inputs of all steps go through one matrix product. The steps are unrolled, so that the length of a sequence is a
number of the graph. Between layers there is dropout, which torch's own decomposition leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from umbel.errors import OperatorNotSupported
from umbel_models.lstm import lstm_direction

State = tuple[Tensor, ...]
"""Hidden state [N, H]; for an LSTM the cell's state too."""
Cell = Callable[[Tensor, Tensor, State], State]
"""(what the input gives [N, gates * H], the recurrent product with its bias, state) -> new state."""

Direction = Callable[[Tensor, State, Sequence[Tensor], bool], tuple[Tensor, State]]
"""(x [N, T, I], state, weights, backwards) -> (what a layer gives at each step [N, T, H], its last state)."""


def _lstm_cell(x: Tensor, recurrent: Tensor, state: State) -> State:
    i, f, g, o = (x + recurrent).chunk(4, 1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _gru_cell(x: Tensor, recurrent: Tensor, state: State) -> State:
    reset_x, update_x, new_x = x.chunk(3, 1)
    reset_h, update_h, new_h = recurrent.chunk(3, 1)
    update = torch.sigmoid(update_x + update_h)
    new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
    return (new + update * (state[0] - new),)


def _plain_cell(x: Tensor, recurrent: Tensor, state: State, activation: Callable[[Tensor], Tensor]) -> State:
    del state
    return (activation(x + recurrent),)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _direction(cell: Cell, x: Tensor, state: State, weights: Sequence[Tensor], backwards: bool) -> tuple[Tensor, State]:
    """One layer in one direction over x [N, T, I]: what it gave at each step [N, T, H], and its last state."""
    to_input, to_state = weights[:2]
    input_bias, state_bias = weights[2:] if len(weights) == 4 else (None, None)
    flat = _affine(x.reshape(-1, x.shape[2]), to_input, input_bias)
    steps = flat.reshape([*x.shape[:2], flat.shape[1]]).unbind(1)
    given = []
    for step in reversed(steps) if backwards else steps:
        state = cell(step, _affine(state[0], to_state, state_bias), state)
        given.append(state[0])
    return torch.stack(given[::-1] if backwards else given, 1), state


def _layers(
    direction: Direction,
    dropout: Callable[..., Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    count: int,
    share: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, list[Tensor]]:
    """All layers; `states` holds [layers * directions, N, H] for each part of the state."""
    directions, each = 2 if bidirectional else 1, 4 if has_biases else 2
    if len(weights) != count * directions * each:
        raise OperatorNotSupported("an LSTM with projections (proj_size); use a Linear after it")
    x = x if batch_first else x.transpose(0, 1)
    starts = [part.unbind(0) for part in states]
    last: list[State] = []
    for layer in range(count):
        if layer and train and share:
            x = dropout(x.transpose(0, 1), share, True).transpose(0, 1)
        outputs = []
        for at in range(layer * directions, (layer + 1) * directions):
            own = weights[at * each : (at + 1) * each]
            output, state = direction(x, tuple(part[at] for part in starts), own, bool(at % directions))
            outputs.append(output)
            last.append(state)
        x = torch.cat(outputs, 2) if bidirectional else outputs[0]
    return x if batch_first else x.transpose(0, 1), [torch.stack(part) for part in zip(*last, strict=True)]


def _refuse_packed(states: Any) -> None:
    if isinstance(states, Tensor) and states.dim() == 1:
        raise OperatorNotSupported("packed sequences, whose sizes depend on the data; pad them and mask the loss")


def lstm(dropout: Callable[..., Tensor], x: Tensor, states: Any, *settings: Any) -> tuple[Tensor, ...]:
    """`torch.lstm`, for `dropout` in training between its layers."""
    _refuse_packed(states)
    output, last = _layers(lstm_direction, dropout, x, states, *settings)
    return output, *last


def _single(cell: Cell, dropout: Callable[..., Tensor], x: Tensor, state: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    _refuse_packed(state)
    output, last = _layers(partial(_direction, cell), dropout, x, [state], *settings)
    return output, *last


gru = partial(_single, _gru_cell)
"""`torch.gru`, as `lstm`."""
rnn_tanh = partial(_single, partial(_plain_cell, activation=torch.tanh))
"""`torch.rnn_tanh`, as `lstm`."""
rnn_relu = partial(_single, partial(_plain_cell, activation=torch.relu))
"""`torch.rnn_relu`, as `lstm`."""


def lstm_cell(x: Tensor, state: State, to_input: Tensor, to_state: Tensor, *biases: Tensor | None) -> State:
    """`torch.lstm_cell`."""
    input_bias, state_bias = biases or (None, None)
    return _lstm_cell(_affine(x, to_input, input_bias), _affine(state[0], to_state, state_bias), state)


def gru_cell(x: Tensor, state: Tensor, to_input: Tensor, to_state: Tensor, *biases: Tensor | None) -> Tensor:
    """`torch.gru_cell`."""
    input_bias, state_bias = biases or (None, None)
    return _gru_cell(_affine(x, to_input, input_bias), _affine(state, to_state, state_bias), (state,))[0]
