"""Gradients and normalisations in terms of operators that every inference runtime has.

After tracing with this table no `…_backward` operator is left, except the one that becomes a MaxUnpool. What torch's
own table does well is taken from there; what it lacks, or does in a way that runs slowly, is written here, in
`convolution.py` and in `normalisation.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch._decomp import decomposition_table as torch_table

from umbel.errors import OperatorNotSupported
from umbel_models.convolution import convolution_backward, input_gradient, per_dimension
from umbel_models.dropout import DECOMPOSITIONS as DROPOUT
from umbel_models.elementary import ELEMENTARY
from umbel_models.normalisation import (
    batch_norm,
    batch_norm_backward,
    batch_norm_frozen,
    batch_norm_untracked,
    layer_norm_backward,
)

aten = torch.ops.aten

KEPT: Final = {aten.max_pool2d_with_indices_backward.default}
"""Backward operators that a translator knows."""

# Those of torch's own decompositions that its core table leaves out.
_FROM_TORCH: Final = (
    "_log_softmax_backward_data",
    "_softmax_backward_data",
    "elu_backward",
    "hardsigmoid_backward",
    "huber_loss_backward",
    "leaky_relu_backward",
    "mse_loss",
    "mse_loss_backward",
    "native_dropout_backward",
    "new_zeros",
    "select_backward",
    "sigmoid_backward",
    "slice_backward",
    "smooth_l1_loss",
    "smooth_l1_loss_backward",
    "softplus_backward",
    "tanh_backward",
)


# Pooling.


def _max_pool2d_backward(
    gradient: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Windows that neither overlap nor hang over: kept, for one MaxUnpool. Others: add where the maxima were."""
    window = per_dimension(kernel, 2)
    apart = per_dimension(stride or kernel, 2) == window and set(dilation) == {1}
    if apart and not any(padding) and not ceil_mode:
        return NotImplemented  # type: ignore[no-any-return] # this is how a decomposition says "keep it"
    batch, channels, height, width = x.shape
    flat = torch.zeros([batch, channels, height * width], dtype=gradient.dtype)
    places = indices.reshape(batch, channels, -1)
    return aten.scatter_add(flat, 2, places, gradient.reshape(batch, channels, -1)).reshape(x.shape)  # type: ignore[no-any-return]


def _avg_pool2d_backward(
    gradient: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    """Each input's share of the windows it was in: a depth-wise transposed convolution with a constant kernel."""
    window, padding = per_dimension(kernel, 2), per_dimension(padding, 2)
    steps = per_dimension(stride or kernel, 2)
    if ceil_mode or (any(padding) and not count_include_pad):
        raise OperatorNotSupported("average pooling with ceil_mode or uncounted padding; call F.avg_pool2d")
    area = divisor or window[0] * window[1]
    batch, channels, height, width = x.shape
    rows, columns = gradient.shape[2:]
    if steps == window and not any(padding) and (height, width) == (rows * window[0], columns * window[1]):
        spread = (gradient / area).reshape(batch, channels, rows, 1, columns, 1)
        return spread.expand(-1, -1, -1, window[0], -1, window[1]).reshape(x.shape)
    share = torch.full([channels, 1, *window], 1.0 / area)
    return input_gradient(gradient, share, [height, width], steps, padding, [1, 1], channels)


def _adaptive_avg_pool2d(x: Tensor, size: Sequence[int]) -> Tensor:
    window = _even_window(x, per_dimension(size, 2))
    if per_dimension(size, 2) == [1, 1]:
        return x.mean([-2, -1], keepdim=True)
    return aten.avg_pool2d(x, window)  # type: ignore[no-any-return]


def _adaptive_avg_pool2d_backward(gradient: Tensor, x: Tensor) -> Tensor:
    window = _even_window(x, list(gradient.shape[-2:]))
    if gradient.shape[-2:] == (1, 1):
        return (gradient / (window[0] * window[1])).expand(x.shape)
    return _avg_pool2d_backward(gradient, x, window, [], [0], False, True, None)


def _even_window(x: Tensor, size: Sequence[int]) -> list[int]:
    if x.shape[-2] % size[0] or x.shape[-1] % size[1]:
        raise OperatorNotSupported(
            f"adaptive pooling of {tuple(x.shape[-2:])} to {tuple(size)}; choose a size that divides evenly"
        )
    return [x.shape[-2] // size[0], x.shape[-1] // size[1]]


# Losses and embeddings.


def _nll_loss_forward(
    scores: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    share, safe = _class_shares(scores, target, weight, ignore_index)
    losses = -aten.gather(scores, 1, safe.unsqueeze(1)).squeeze(1) * share
    total = share.sum()
    if reduction == 0:
        return losses, total
    return (losses.sum() / total if reduction == 1 else losses.sum()), total


def _nll_loss_backward(
    gradient: Tensor,
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    total: Tensor,
) -> Tensor:
    share, safe = _class_shares(scores, target, weight, ignore_index)
    scale = (gradient / total if reduction == 1 else gradient) * share
    classes = torch.arange(scores.shape[1], dtype=target.dtype).unsqueeze(0)
    return torch.where(classes == safe.unsqueeze(1), -scale.unsqueeze(1), 0.0)


def _class_shares(scores: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """How much each example counts, and a class for each that may be looked up."""
    if scores.dim() != 2:
        raise OperatorNotSupported("a class loss over more than [examples, classes]; flatten positions into examples")
    counts = target != ignore_index
    safe = torch.where(counts, target, torch.zeros((), dtype=target.dtype))
    share = counts.to(scores.dtype)
    return (share if weight is None else share * aten.index_select(weight, 0, safe)), safe


def _embedding_backward(
    gradient: Tensor, indices: Tensor, count: int, padding_idx: int, scale_by_frequency: bool
) -> Tensor:
    if scale_by_frequency:
        raise OperatorNotSupported("embedding with scale_grad_by_freq; leave it out")
    width = gradient.shape[-1]
    rows, places = gradient.reshape(-1, width), indices.reshape(-1)
    if padding_idx >= 0:
        rows = torch.where((places == padding_idx).unsqueeze(1), 0.0, rows)
    return aten.index_put(torch.zeros([count, width]), [places], rows, True)  # type: ignore[no-any-return]


# Pointwise.


def _threshold_backward(gradient: Tensor, x: Tensor, threshold: float) -> Tensor:
    # A product with a mask of ones and zeros runs faster than a choice between two tensors.
    return gradient * (x > threshold).to(gradient.dtype)


def _hardtanh_backward(gradient: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    return gradient * ((x > low) & (x < high)).to(gradient.dtype)


def _hardswish_backward(gradient: Tensor, x: Tensor) -> Tensor:
    # x (x + 3) / 6 has the slope x / 3 + 1 / 2, between nothing and x itself.
    between = ((x > -3) & (x < 3)).to(gradient.dtype)
    return gradient * ((x / 3 + 0.5) * between + (x >= 3).to(gradient.dtype))


def _gelu_backward(gradient: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "none":
        exact: Tensor = torch_table[aten.gelu_backward.default](gradient, x, approximate=approximate)
        return exact
    # y = x sigmoid(u) is x (1 + tanh(u / 2)) / 2; here u = x (a x^2 + b). Its slope is gate + u' y (1 - gate).
    b = 2 * math.sqrt(2 / math.pi)
    inner = 0.044715 * b * (x * x) + b
    gate, y = torch.sigmoid(x * inner), torch.nn.functional.gelu(x, approximate="tanh")
    return gradient * (gate + (3 * inner - 2 * b) * y * (1 - gate))


def _silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gradient * gate * (1 + x * (1 - gate))


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _mish(x: Tensor) -> Tensor:
    return x * torch.tanh(torch.nn.functional.softplus(x))


def _mish_backward(gradient: Tensor, x: Tensor) -> Tensor:
    gate = torch.tanh(torch.nn.functional.softplus(x))
    return gradient * (gate + x * torch.sigmoid(x) * (1 - gate * gate))


def _variance(
    x: Tensor, dims: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> Tensor:
    chosen = list(range(x.dim())) if dims is None else dims
    centred = x - x.mean(chosen, keepdim=True)
    seen = x.numel() if dims is None else math.prod(x.shape[dim] for dim in chosen)
    # As a whole number wherever it is one: how many examples a batch has is a whole number too.
    less = 1 if correction is None else int(correction) if float(correction).is_integer() else correction
    return (centred * centred).sum(chosen, keepdim=keepdim) / (seen - less)


def _any(x: Tensor, dims: int | Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
    chosen = [dims] if isinstance(dims, int) else list(dims or range(x.dim()))
    return (x != 0).to(torch.float32).amax(chosen, keepdim) > 0


def _min_along(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    largest, places = aten.max.dim(-x, dim, keepdim)
    return -largest, places


def _safe_softmax(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    """A row that is masked everywhere gives zeros."""
    del dtype
    some = (x.amax([dim], keepdim=True) > -3.4e38).to(x.dtype)
    return aten._softmax.default(x.clamp(min=-3.4e38), dim, False) * some  # type: ignore[no-any-return]


def _as_strided(x: Tensor, sizes: Sequence[Any], strides: Sequence[Any], offset: int | None = None) -> Tensor:
    """Autograd's word for a view that was written into; here only of a whole tensor, in its own order."""
    steps = [math.prod(sizes[at + 1 :]) for at in range(len(sizes))]
    whole = x.is_contiguous() and not offset and list(strides) == steps and math.prod(sizes) == x.numel()
    return x.reshape(sizes) if whole else NotImplemented


_OWN: Final[dict[Any, Callable[..., Any]]] = {
    aten._adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_avg_pool2d_backward,
    aten._native_batch_norm_legit.default: batch_norm,
    aten._native_batch_norm_legit.no_stats: batch_norm_untracked,
    aten._native_batch_norm_legit_no_training.default: batch_norm_frozen,
    aten._safe_softmax.default: _safe_softmax,
    aten.any.default: _any,
    aten.any.dim: _any,
    aten.any.dims: _any,
    aten.as_strided.default: _as_strided,
    aten.avg_pool2d_backward.default: _avg_pool2d_backward,
    aten.convolution_backward.default: convolution_backward,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.gelu_backward.default: _gelu_backward,
    aten.hardswish_backward.default: _hardswish_backward,
    aten.hardtanh_backward.default: _hardtanh_backward,
    aten.isnan.default: lambda x: x != x,
    aten.max_pool2d_with_indices_backward.default: _max_pool2d_backward,
    aten.min.dim: _min_along,
    aten.mish.default: _mish,
    aten.mish_backward.default: _mish_backward,
    aten.native_batch_norm.default: batch_norm,
    aten.native_batch_norm_backward.default: batch_norm_backward,
    aten.native_layer_norm_backward.default: layer_norm_backward,
    aten.new_empty_strided.default: lambda x, sizes, strides, **settings: x.new_empty(sizes, **settings),
    aten.nll_loss_backward.default: _nll_loss_backward,
    aten.nll_loss_forward.default: _nll_loss_forward,
    aten.silu.default: _silu,
    aten.silu_backward.default: _silu_backward,
    aten.var.correction: _variance,
    aten.threshold_backward.default: _threshold_backward,
}


@cache
def decomposition_table() -> Mapping[Any, Callable[..., Any]]:
    """Torch's core decompositions, those of its others that are needed, and ours over both.

    Made once: torch looks through all of its operators to tell which are core, as long as a small trace takes.
    """
    table: dict[Any, Callable[..., Any]] = dict(core_aten_decompositions())
    for name in _FROM_TORCH:
        operator = getattr(aten, name).default
        table[operator] = torch_table[operator]
    table[aten.split.Tensor] = torch_table[aten.split.Tensor]
    return MappingProxyType(table | ELEMENTARY | _OWN | DROPOUT)
