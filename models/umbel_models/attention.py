"""Scaled dot-product attention with a gradient of its own, two passes over the scores shorter than autograd's.

The sum over a row of gradient times share, which the gradient of softmax asks for, is also the sum over the row of
the output times its gradient (Dao et al., 2022, https://arxiv.org/abs/2205.14135, appendix B.4), a far smaller tensor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, factor: float) -> Tensor:
    """Values [..., S, E] by how well keys [..., S, D] times `factor` match queries [..., T, D], as [..., T, E].

    A mask says which scores are seen (bool), or is added to them; no gradient flows into it.
    """
    if is_causal:
        seen = torch.ones([query.shape[-2], key.shape[-2]], dtype=torch.bool).tril()
        mask = torch.where(seen, 0.0, -math.inf)
    elif mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -math.inf)
    # One head of keys for all heads of queries, or one example for all, as torch broadcasts them.
    key, value = (part.expand([*query.shape[:-2], *part.shape[-2:]]) for part in (key, value))
    # Features before places: so the larger factor of each product on the way back lies as a product wants it. Three
    # dimensions, so that runtimes fold the transpositions that are left into their products.
    flat = [part.transpose(-1, -2).reshape([-1, part.shape[-1], part.shape[-2]]) for part in (query, key, value)]
    leading = list(query.shape[:-2])
    result: tuple[Tensor, Tensor] = _Attention.apply(*flat, mask, is_causal, factor, leading)  # type: ignore[no-untyped-call]
    return result[0].reshape([*query.shape[:-1], value.shape[-1]])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, factor: float, leading: list[int]
    ) -> tuple[Tensor, Tensor]:
        scores = torch.bmm((query * factor).transpose(1, 2), key)
        if mask is not None and mask.dim() == 2:
            scores = scores + mask
        elif mask is not None:
            scores = (scores.reshape([*leading, *scores.shape[1:]]) + mask).reshape(scores.shape)
        # A row whose mask hides everything gives zeros; a causal mask has none.
        shares = torch.softmax(scores, -1) if mask is None or causal else torch._safe_softmax(scores, -1)
        return torch.bmm(shares, value.transpose(1, 2)), shares

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, _, _, ctx.factor, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(query, key, value, *output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        query, key, value, output, shares = ctx.saved_tensors
        along = -(gradient * output).sum(-1, keepdim=True)
        # The sum is taken off within the product, as one more feature: a pass over all scores less.
        pulled, against = torch.cat([gradient, along], 2), torch.cat([value, torch.ones_like(value[:, :1])], 1)
        to_scores = shares * torch.bmm(pulled, against)
        to_query = torch.bmm(key, to_scores.transpose(1, 2)) * ctx.factor
        to_key = torch.bmm(query * ctx.factor, to_scores)
        return to_query, to_key, torch.bmm(gradient.transpose(1, 2), shares), None, None, None, None
