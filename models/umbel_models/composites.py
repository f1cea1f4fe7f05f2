"""Layers of torch that are put together, while tracing, from others that every runtime has.

Each is a function of torch that has no translation, or whose gradient has none, written in functions that do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor

from umbel.errors import OperatorNotSupported
from umbel_models.constants import constants
from umbel_models.convolution import per_dimension

_Size = int | Sequence[int]


def local_response_norm(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """F.local_response_norm: the mean of squares over neighbouring channels (Krizhevsky et al., 2012)."""
    channels = int(x.shape[1])
    padded = F.pad(x * x, [0, 0] * (x.dim() - 2) + [size // 2, (size - 1) // 2])
    total = padded.narrow(1, 0, channels)
    for at in range(1, size):
        total = total + padded.narrow(1, at, channels)
    return x / (total * (alpha / size) + k) ** beta


# Windows that hang over, or of which only what lies in the image counts: means over an image with zeros around it, each
# times a number that says what it should have been divided by.


def avg_pool1d(
    x: Tensor, kernel_size: _Size, stride: Any = None, padding: _Size = 0, *settings: Any, **named: Any
) -> Tensor:
    """F.avg_pool1d of [N, C, L]."""
    (window,), (pad,) = per_dimension(kernel_size, 1), per_dimension(padding, 1)
    step = per_dimension(stride, 1)[0] if stride else window
    return avg_pool2d(x.unsqueeze(-2), [1, window], [1, step], [0, pad], *settings, **named).squeeze(-2)


def avg_pool2d(
    x: Tensor,
    kernel_size: _Size,
    stride: Any = None,
    padding: _Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """F.avg_pool2d of [N, C, H, W]."""
    window, pads = per_dimension(kernel_size, 2), per_dimension(padding, 2)
    if not ceil_mode and (count_include_pad or not any(pads)):
        return F.avg_pool2d(x, window, stride or window, pads, False, True, divisor_override)
    steps = per_dimension(stride, 2) if stride else window
    sizes = [int(size) for size in x.shape[-2:]]
    with constants():
        ones = torch.ones(1, 1, *sizes)
        wanted = F.avg_pool2d(ones, window, steps, pads, ceil_mode, count_include_pad, divisor_override)
        # How far the last windows reach beyond the image.
        over = [
            max(0, (count - 1) * step + size - length - pad)
            for count, step, size, length, pad in zip(wanted.shape[2:], steps, window, sizes, pads, strict=True)
        ]
        around = [pads[1], over[1], pads[0], over[0]]
        share = wanted / F.avg_pool2d(F.pad(ones, around), window, steps)
    return F.avg_pool2d(F.pad(x, around), window, steps) * share


def max_pool(
    count: int,
    x: Tensor,
    kernel_size: _Size,
    stride: Any = None,
    padding: _Size = 0,
    dilation: _Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """F.max_pool1d of [N, C, L] or F.max_pool2d of [N, C, H, W]; nothing is larger than what windows hang over."""
    del return_indices  # whoever wants them calls another function
    plain: Callable[..., Tensor] = F.max_pool1d if count == 1 else F.max_pool2d
    if not ceil_mode:
        return plain(x, kernel_size, stride, padding, dilation)
    lists = [per_dimension(one, count) for one in (kernel_size, stride or kernel_size, padding, dilation)]
    with constants():
        wanted = plain(torch.zeros(1, 1, *map(int, x.shape[2:])), *lists, ceil_mode=True).shape[2:]
    over = [
        max(0, (places - 1) * step + gap * (size - 1) + 1 - int(length) - 2 * pad)
        for places, length, size, step, pad, gap in zip(wanted, x.shape[2:], *lists, strict=True)
    ]
    around = [room for one in reversed(over) for room in (0, one)]
    return plain(F.pad(x, around, value=torch.finfo(x.dtype).min), *lists)


# Pooling over three dimensions: over two, then over the third. Windows are boxes, so it is the same.


def _pool3d(
    pool: Callable[..., Tensor], x: Tensor, kernel: _Size, stride: _Size | None, padding: _Size, **settings: Any
) -> Tensor:
    window, pads = per_dimension(kernel, 3), per_dimension(padding, 3)
    steps = per_dimension(stride, 3) if stride else window
    channels, depth = int(x.shape[1]), int(x.shape[2])
    flat = pool(x.flatten(1, 2), window[1:], steps[1:], pads[1:], **settings)
    rows, columns = flat.shape[2:]
    deep = flat.reshape(-1, channels, depth, rows * columns)
    deep = pool(deep, [window[0], 1], [steps[0], 1], [pads[0], 0], **settings)
    return deep.reshape(-1, channels, deep.shape[2], rows, columns)


def max_pool3d(
    x: Tensor,
    kernel_size: _Size,
    stride: _Size | None = None,
    padding: _Size = 0,
    dilation: _Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """F.max_pool3d of [N, C, D, H, W]."""
    if set(per_dimension(dilation, 3)) != {1} or ceil_mode or return_indices:
        raise OperatorNotSupported("max-pooling with ceil_mode, dilation or indices; pad with F.pad before it")
    return _pool3d(F.max_pool2d, x, kernel_size, stride, padding)


def avg_pool3d(
    x: Tensor,
    kernel_size: _Size,
    stride: _Size | None = None,
    padding: _Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """F.avg_pool3d of [N, C, D, H, W]."""
    if ceil_mode or divisor_override is not None:
        raise OperatorNotSupported("average pooling with ceil_mode or a divisor; pad with F.pad, scale the result")
    return _pool3d(F.avg_pool2d, x, kernel_size, stride, padding, count_include_pad=count_include_pad)


# Windows of an image, as columns and back: convolutions with a kernel that picks.


def _picks(channels: int, window: Sequence[int]) -> Tensor:
    """[C * K, 1, h, w]: for each channel, K kernels with a one at one place each."""
    places = window[0] * window[1]
    return torch.eye(places).reshape(places, 1, *window).repeat(channels, 1, 1, 1)


def unfold(x: Tensor, kernel_size: _Size, dilation: _Size = 1, padding: _Size = 0, stride: _Size = 1) -> Tensor:
    """F.unfold of [N, C, H, W] to [N, C * K, L]."""
    channels, window = int(x.shape[1]), per_dimension(kernel_size, 2)
    kernel = _picks(channels, window)
    seen = F.conv2d(
        x, kernel, None, per_dimension(stride, 2), per_dimension(padding, 2), per_dimension(dilation, 2), channels
    )
    return seen.flatten(2)


def fold(
    x: Tensor, output_size: _Size, kernel_size: _Size, dilation: _Size = 1, padding: _Size = 0, stride: _Size = 1
) -> Tensor:
    """F.fold of [N, C * K, L] to [N, C, H, W]: what `unfold` has cut, added up where it was."""
    size, window = per_dimension(output_size, 2), per_dimension(kernel_size, 2)
    gaps, pads, steps = per_dimension(dilation, 2), per_dimension(padding, 2), per_dimension(stride, 2)
    settings = list(zip(size, window, gaps, pads, steps, strict=True))
    blocks = [(s + 2 * p - g * (w - 1) - 1) // step + 1 for s, w, g, p, step in settings]
    # How much of the image no window reaches.
    rest = [
        s + 2 * p - g * (w - 1) - 1 - (b - 1) * step for (s, w, g, p, step), b in zip(settings, blocks, strict=True)
    ]
    channels = int(x.shape[1]) // (window[0] * window[1])
    columns = x.reshape(-1, int(x.shape[1]), *blocks)
    return F.conv_transpose2d(columns, _picks(channels, window), None, steps, pads, rest, channels, gaps)


# Bags of looked-up rows.


def embedding_bag(
    places: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """F.embedding_bag of [N, L], each bag as long as the others: rows added up, or their mean."""
    if offsets is not None or places.dim() != 2 or mode == "max" or max_norm is not None:
        raise OperatorNotSupported(
            "embedding_bag by offsets, of the largest, or with max_norm; give [N, L] and mode='sum' or 'mean'"
        )
    rows = F.embedding(places, weight, padding_idx)
    rows = rows if per_sample_weights is None else rows * per_sample_weights.unsqueeze(-1)
    if padding_idx is None:
        return rows.sum(1) if mode == "sum" else rows.mean(1)
    counts = (places != padding_idx % weight.shape[0]).to(rows.dtype).unsqueeze(-1)
    total = (rows * counts).sum(1)
    return total if mode == "sum" else total / counts.sum(1).clamp(min=1)


# Products, distances, picks.


def prod(x: Tensor, dim: int | None = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """torch.prod along a dimension, by halves."""
    if dim is None or dtype not in (None, x.dtype) or x.shape[dim] == 0 or not isinstance(x.shape[dim], int):
        raise OperatorNotSupported("prod of everything, over the batch, or in a dtype of its own; name a dimension")
    while (size := int(x.shape[dim])) > 1:
        half = size // 2
        product = x.narrow(dim, 0, half) * x.narrow(dim, half, half)
        x = product if size % 2 == 0 else torch.cat([product, x.narrow(dim, size - 1, 1)], dim)
    return x if keepdim else x.squeeze(dim)


def windows(x: Tensor, dimension: int, size: int, step: int) -> Tensor:
    """Tensor.unfold: each window of a dimension, whose places come last."""
    dim, length = dimension % x.dim(), x.shape[dimension]
    if not isinstance(length, int):
        raise OperatorNotSupported("windows over the examples of a batch; cut another dimension")
    count = (length - size) // step + 1
    places = torch.arange(count).unsqueeze(1) * step + torch.arange(size)
    picked = torch.index_select(x, dim, places.reshape(-1))
    return picked.reshape([*x.shape[:dim], count, size, *x.shape[dim + 1 :]]).movedim(dim + 1, -1)


def normalize(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None) -> Tensor:
    """F.normalize; what it is to be written into (spectral norm does that) is written as a whole."""
    unit = x / torch.linalg.vector_norm(x, p, dim, keepdim=True).clamp_min(eps).expand_as(x)
    return unit if out is None else out.copy_(unit)


def gaussian_nll_loss(
    mean: Tensor, target: Tensor, var: Any, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    """F.gaussian_nll_loss, which would ask whether a variance is below zero."""
    variance = torch.as_tensor(var, dtype=mean.dtype)
    if variance.dim() == mean.dim() - 1 and variance.dim():
        variance = variance.unsqueeze(-1)
    # Held at least eps, without a gradient that goes through that.
    held = variance + (variance.detach().clamp(min=eps) - variance.detach())
    loss = 0.5 * (torch.log(held) + (mean - target) ** 2 / held) + (0.5 * math.log(2 * math.pi) if full else 0.0)
    whole: Tensor = loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()
    return whole


def bilinear(x1: Tensor, x2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.bilinear: x1 [..., I] and x2 [..., J] by weights [O, I, J]: a dense layer over all their products."""
    pairs = (x1.unsqueeze(-1) * x2.unsqueeze(-2)).flatten(-2)
    return F.linear(pairs, weight.flatten(1), bias)


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """torch.cdist of [..., P, M] and [..., R, M]: how far each row is from each, [..., P, R]."""
    del compute_mode
    far: Tensor = torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)
    return far


def take_along_dim(x: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """torch.take_along_dim, along a dimension; elsewhere sizes of 1 stretch."""
    if dim is None:
        raise OperatorNotSupported("take_along_dim of a flattened tensor; name a dimension")
    sizes = [_stretched(had, asked) for had, asked in zip(x.shape, indices.shape, strict=True)]
    held, taken = list(sizes), list(sizes)
    held[dim], taken[dim] = x.shape[dim], indices.shape[dim]
    return torch.gather(x.expand(held), dim, indices.expand(taken))


def _stretched(one: Any, other: Any) -> Any:
    """The larger of two sizes that meet; how many examples a batch has isn't asked."""
    return other if isinstance(one, int) and one == 1 else one
