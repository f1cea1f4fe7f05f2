"""Functions of torch that are replaced while tracing: composites whose own code reads sizes as numbers, or draws.

The replacements are written in functions that trace well. Those that draw do it by `torch.native_dropout`, which
`umbel_models.dropout` then turns into a mask worked out from a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, Final, NoReturn

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor
from torch.overrides import TorchFunctionMode

from umbel.errors import OperatorNotSupported
from umbel_models import composites, recurrent, resizing
from umbel_models.assigning import PURE, Parts
from umbel_models.attention import attend
from umbel_models.class_loss import class_loss
from umbel_models.constants import constants
from umbel_models.dense_convolution import convolve
from umbel_models.group_norm import group_norm


class Rewrites(TorchFunctionMode):
    """While it is entered, the functions of `REPLACED` are ours."""

    def __init__(self) -> None:
        super().__init__()
        self._parts = Parts()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            return (self._parts.cut if func is Tensor.__getitem__ else self._parts.put)(*args)
        own, given, named = REPLACED.get(func), self._parts.current(args), self._parts.current(dict(kwargs or {}))
        if func in PURE and self._parts.write(args[0], lambda: PURE[func](*given, **named)):
            return self._parts.current(args[0])
        if own is None:
            return func(*given, **named)
        # Torch calls the first one so nearly everywhere; ours have no name in common.
        first = [named.pop(name) for name in ("input", "tensor") if not args and name in named]
        return own(*first, *given, **named)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.dim() <= 2:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, weight.shape[1])
    product = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return product.reshape([*x.shape[:-1], weight.shape[0]])


# Dropout.


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    del inplace
    return torch.native_dropout(x, p, True)[0] if training and p else x


def _feature_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Whole channels at a time."""
    del inplace
    ones = torch.ones([*x.shape[:2], *([1] * (x.dim() - 2))])
    return x * torch.native_dropout(ones, p, True)[0] if training and p else x


def _alpha_dropout(x: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
    """To the lowest value of SELU, then scaled so that mean and variance stay (Klambauer et al., 2017)."""
    del inplace
    if not training or not p:
        return x
    lowest = 1.7580993408473766
    kept = torch.native_dropout(torch.ones_like(x), p, True)[1].to(x.dtype)
    scale = 1.0 / math.sqrt((lowest * lowest * p + 1) * (1 - p))
    return x * kept * scale + (kept - 1) * (lowest * scale) + lowest * scale * p


# Attention.


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention [..., T, E]; a row whose mask hides everything gives zeros, as in torch."""
    if enable_gqa:
        key, value = (_repeat_heads(part, query) for part in (key, value))
    if not dropout_p and (attn_mask is None or not attn_mask.requires_grad):
        return attend(query, key, value, attn_mask, is_causal, scale or 1.0 / math.sqrt(query.shape[-1]))
    scores = (query * (scale or 1.0 / math.sqrt(query.shape[-1]))) @ key.transpose(-2, -1)
    if is_causal:
        seen = torch.ones([query.shape[-2], key.shape[-2]], dtype=torch.bool).tril()
        weights = torch.softmax(torch.where(seen, scores, -math.inf), -1)
    elif attn_mask is None:
        weights = torch.softmax(scores, -1)
    else:
        hidden = attn_mask.dtype == torch.bool
        masked = torch.where(attn_mask, scores, -math.inf) if hidden else scores + attn_mask
        weights = torch._safe_softmax(masked, -1)
    return _dropout(weights, dropout_p) @ value


def _repeat_heads(x: Tensor, query: Tensor) -> Tensor:
    times = query.shape[-3] // x.shape[-3]
    shared = x.unsqueeze(-3).expand(*x.shape[:-2], times, *x.shape[-2:])
    return shared.reshape([*x.shape[:-3], query.shape[-3], *x.shape[-2:]])


def _multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    """Torch's own Python, with ours for what it calls: nothing inside of it is seen by a function mode."""
    scope: dict[str, Any] = {**vars(F), "has_torch_function": lambda *_: False}
    scope |= {"linear": _linear, "dropout": _dropout, "scaled_dot_product_attention": _attention}
    for name in ("_in_projection_packed", "_in_projection", "multi_head_attention_forward"):
        function = scope[name]
        scope[name] = FunctionType(function.__code__, scope, argdefs=function.__defaults__)
    return scope["multi_head_attention_forward"](*args, **kwargs)


# Normalisation.


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    dims = list(range(2, x.dim()))
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    variance = (centred * centred).mean(dims, keepdim=True)
    if running_mean is not None and running_var is not None:
        seen = math.prod(x.shape[2:])
        for running, now in ((running_mean, mean), (running_var, variance * (seen / (seen - 1)))):
            running.copy_((1 - momentum) * running + momentum * now.detach().mean(0).reshape(-1))
    y = centred * torch.rsqrt(variance + eps)
    channels = [1, -1, *([1] * len(dims))]
    y = y if weight is None else y * weight.reshape(channels)
    return y if bias is None else y + bias.reshape(channels)


# What hangs on no tensor.


def _constant(make: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    with constants():
        return make(*args, **kwargs)


# Losses.


def _cross_entropy(
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Classes of many places [N, C, T, ...] as examples of their own."""
    if scores.dim() > 2 and scores.dim() == target.dim() + 1:
        if reduction == "none":
            flat = scores.movedim(1, -1).reshape(-1, scores.shape[1]), target.reshape(-1)
            settings: Any = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
            return F.cross_entropy(*flat, weight, reduction=reduction, **settings).reshape(target.shape)
        scores, target = scores.movedim(1, -1).reshape(-1, scores.shape[1]), target.reshape(-1)
    plain = weight is None and not label_smoothing and size_average is None and reduce is None
    if plain and reduction in ("mean", "sum") and scores.dim() == 2 and not target.is_floating_point():
        return class_loss(scores, target, ignore_index, reduction == "mean")
    return F.cross_entropy(
        scores, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing=label_smoothing
    )


def _one_hot(places: Tensor, num_classes: int = -1) -> Tensor:
    """Looked up, so that a runtime refuses what is no class, as torch does."""
    if num_classes < 0:
        raise OperatorNotSupported("one_hot of as many classes as there happen to be; say num_classes")
    classes = torch.arange(num_classes)
    marks = (classes.unsqueeze(1) == classes).to(torch.float32)
    return torch.index_select(marks, 0, places.reshape(-1)).reshape([*places.shape, num_classes]).to(torch.int64)


# What can't be told from a seed or done with an open batch, by the name that its author knows.


def _refuse(what: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise OperatorNotSupported(what)

    return refuse


REPLACED: Final[dict[Any, Callable[..., Any]]] = {
    F.linear: _linear,
    F.conv1d: partial(convolve, F.conv1d),
    F.conv2d: partial(convolve, F.conv2d),
    F.dropout: _dropout,
    torch.dropout: _dropout,
    F.dropout1d: _feature_dropout,
    F.dropout2d: _feature_dropout,
    F.dropout3d: _feature_dropout,
    F.alpha_dropout: _alpha_dropout,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    F.group_norm: group_norm,
    torch.group_norm: group_norm,
    F.instance_norm: _instance_norm,
    F.adaptive_avg_pool1d: partial(resizing.adaptive_avg_pool, 1),
    F.adaptive_avg_pool2d: partial(resizing.adaptive_avg_pool, 2),
    F.adaptive_max_pool1d: partial(resizing.adaptive_max_pool, 1),
    F.adaptive_max_pool2d: partial(resizing.adaptive_max_pool, 2),
    F.bilinear: composites.bilinear,
    torch.lstm: partial(recurrent.lstm, _dropout),
    torch.gru: partial(recurrent.gru, _dropout),
    torch.rnn_tanh: partial(recurrent.rnn_tanh, _dropout),
    torch.rnn_relu: partial(recurrent.rnn_relu, _dropout),
    torch.lstm_cell: recurrent.lstm_cell,
    torch.gru_cell: recurrent.gru_cell,
    F.cross_entropy: _cross_entropy,
    F.one_hot: _one_hot,
    F.interpolate: resizing.interpolate,
    F.pad: resizing.pad,
    torch.roll: resizing.roll,
    Tensor.roll: resizing.roll,
    F.avg_pool1d: composites.avg_pool1d,
    F.avg_pool2d: composites.avg_pool2d,
    F.avg_pool3d: composites.avg_pool3d,
    F.max_pool1d: partial(composites.max_pool, 1),
    torch.max_pool1d: partial(composites.max_pool, 1),
    F.max_pool2d: partial(composites.max_pool, 2),
    torch.max_pool2d: partial(composites.max_pool, 2),
    F.max_pool3d: composites.max_pool3d,
    F.fold: composites.fold,
    F.local_response_norm: composites.local_response_norm,
    F.unfold: composites.unfold,
    torch.cdist: composites.cdist,
    torch.max_pool3d: composites.max_pool3d,
    torch.sgn: torch.sign,
    torch.tril_indices: partial(_constant, torch.tril_indices),
    torch.triu_indices: partial(_constant, torch.triu_indices),
    torch.take_along_dim: composites.take_along_dim,
    Tensor.sgn: torch.sign,
    Tensor.take_along_dim: composites.take_along_dim,
    F.embedding_bag: composites.embedding_bag,
    F.gaussian_nll_loss: composites.gaussian_nll_loss,
    F.normalize: composites.normalize,
    torch.prod: composites.prod,
    Tensor.prod: composites.prod,
    Tensor.unfold: composites.windows,
    F.ctc_loss: _refuse("ctc_loss, whose paths hang on the targets; use cross_entropy with a target for each step"),
    F.feature_alpha_dropout: _refuse("feature_alpha_dropout; use dropout2d or alpha_dropout"),
    F.rrelu: _refuse("rrelu, which draws its slopes; use leaky_relu"),
    F.gumbel_softmax: _refuse("gumbel_softmax, which draws; use softmax"),
}
