"""A convolution over so few positions that each output sees most of them: one matrix product over all.

Runtimes work a convolution out image by image, as a product with one column for each position; with four of them
most of a processor's width idles. Over 2 x 2 positions a kernel of 3 x 3 meets every pair of input and output anyway: a
dense layer with the same weights costs no more products, and does all images at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from umbel_models.convolution import per_dimension

MOST_PAIRS: Final = 64
"""Of input and output positions; each is a matrix of weights in memory."""


def convolve(
    plain: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """`plain`, which is F.conv1d or F.conv2d, or the same as one matrix product where that is less work."""
    taps = None
    if groups == 1 and not isinstance(padding, str) and x.dim() == weight.dim():
        count = weight.dim() - 2
        settings = [per_dimension(s, count) for s in (stride, padding, dilation)]
        taps = _taps([int(size) for size in x.shape[2:]], list(weight.shape[2:]), *settings)
    if taps is None:
        return plain(x, weight, bias, stride, padding, dilation, groups)
    table, sizes = taps
    inputs, outputs = weight.shape[1], weight.shape[0]
    seen, given = math.prod(x.shape[2:]), math.prod(sizes)
    channels_last = [0, *range(2, count + 2), 1]
    # Written so that nothing but whole rows of inputs moves: transposes at either end of a product cost nothing.
    by_tap = weight.reshape(outputs * inputs, -1).t()
    pairs = torch.mm(torch.from_numpy(table), by_tap).reshape(seen, given, outputs, inputs)
    dense = pairs.permute(1, 2, 0, 3).reshape(given * outputs, seen * inputs)
    y = torch.mm(x.permute(channels_last).reshape(-1, seen * inputs), dense.t()).reshape([-1, *sizes, outputs])
    y = y if bias is None else y + bias
    # No view: what writes into it, as nn.ReLU(inplace=True) does, would be traced as writing into a part.
    return y.permute([0, count + 1, *range(1, count + 1)]).clone()


def _taps(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], list[int]] | None:
    """For each pair of input and output position the tap that joins them [pairs, taps], and the output's sizes.

    None where there are too many pairs, or fewer than half of them are joined.
    """
    reached = [
        (size + 2 * pad - gap * (taps - 1) - 1) // step + 1
        for size, taps, step, pad, gap in zip(sizes, kernel, stride, padding, dilation, strict=True)
    ]
    pairs = math.prod(sizes) * math.prod(reached)
    if math.prod(kernel) == 1 or not 0 < pairs <= MOST_PAIRS:
        return None
    table = np.zeros([*sizes, *reached, *kernel], np.float32)
    for out, tap in itertools.product(np.ndindex(*reached), np.ndindex(*kernel)):
        place = tuple(o * s - p + t * g for o, s, p, t, g in zip(out, stride, padding, tap, dilation, strict=True))
        if all(0 <= at < size for at, size in zip(place, sizes, strict=True)):
            table[(*place, *out, *tap)] = 1.0
    return (table.reshape(pairs, -1), reached) if 2 * table.sum() >= pairs else None
