"""A convolution over a few positions becomes one matrix product, with the same answers and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from umbel_models.dense_convolution import convolve


class PlainConvolution(Exception):
    pass


def never(*_: Any) -> Tensor:
    raise PlainConvolution


@pytest.mark.parametrize(
    ("plain", "shape", "kernel", "settings"),
    [
        (F.conv2d, (3, 5, 2, 2), (4, 5, 3, 3), (1, 1)),
        (F.conv2d, (3, 5, 2, 3), (4, 5, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
        (F.conv2d, (3, 5, 3, 3), (2, 5, 3, 3), ((2, 1), (1, 1))),
        (F.conv2d, (3, 5, 4, 4), (2, 5, 4, 4), ()),
        (F.conv1d, (3, 5, 4), (4, 5, 3), (2, 1)),
        (F.conv1d, (3, 5, 4), (4, 5, 3), ((1,), (1,))),
    ],
)
def test_it_is_a_convolution(
    plain: Callable[..., Tensor], shape: tuple[int, ...], kernel: tuple[int, ...], settings: tuple[Any, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator).requires_grad_() for size in (shape, kernel))
    bias = torch.randn(kernel[0], generator=generator).requires_grad_()
    expected = plain(x, weight, bias, *settings)
    found = convolve(never, x, weight, bias, *settings)
    torch.testing.assert_close(found, expected)
    pull = torch.randn(expected.shape, generator=generator)
    wanted = torch.autograd.grad((expected * pull).sum(), (x, weight, bias))
    for ours, theirs in zip(torch.autograd.grad((found * pull).sum(), (x, weight, bias)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "kernel", "settings"),
    [
        ((3, 4, 8, 8), (4, 4, 3, 3), (1, 1)),  # many positions
        ((3, 4, 4, 4), (4, 4, 1, 1), ()),  # each output sees one
        ((3, 4, 2, 2), (4, 1, 3, 3), (1, 1, 1, 4)),  # depth-wise
        ((3, 4, 2, 2), (4, 4, 3, 3), (1, "same")),
    ],
)
def test_others_stay_what_they_are(shape: tuple[int, ...], kernel: tuple[int, ...], settings: tuple[Any, ...]) -> None:
    with pytest.raises(PlainConvolution):
        convolve(never, torch.ones(shape), torch.ones(kernel), None, *settings)
