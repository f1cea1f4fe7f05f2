"""Group norm as a layer norm of groups: torch's answers and torch's gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from umbel_models.group_norm import group_norm


@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 5), (2, 6, 4, 3)])
@pytest.mark.parametrize(("has_weight", "has_bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_its_gradient_is_that_of_torch(shape: tuple[int, ...], has_weight: bool, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, pull = (torch.randn(shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(6, generator=generator) if has else None for has in (has_weight, has_bias))
    given = [tensor.requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    # Torch itself fails on the gradient of a bias without a weight.
    expected = F.group_norm(x, 2, torch.ones(6) if weight is None else weight, bias, eps=1e-3)
    found = group_norm(x, 2, weight, bias, eps=1e-3)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad((expected * pull).sum(), given)
    for ours, theirs in zip(torch.autograd.grad((found * pull).sum(), given), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
