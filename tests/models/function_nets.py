"""More nets of the matrix: functions of torch that are put together from others."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.models.nets import Apply, Beside, dense, images, series


def angles(x: Tensor) -> Tensor:
    return x.asin() + x.acos() * x + x.atan() - x.tan()


def middle(x: Tensor) -> Tensor:
    return x.median(1, keepdim=True)[0] + x.kthvalue(3)[0][:, None] - x.quantile(0.4, 1, keepdim=True) + x.topk(3, 1)[0]


class Twice(nn.Module):
    """A module of two inputs, given one twice."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.body(x, x)
        return mixed


class ByKeywords(nn.Module):
    """Calls functions by the names that torch gives their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.head = nn.Parameter(torch.randn(6, 2, 3, 3) / 4), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(input=x, weight=self.kernel, stride=2, groups=2)
        x = F.pad(input=F.dropout(input=x, p=0.0), pad=(0, 0, 1, 1), mode="replicate")
        x = F.adaptive_max_pool2d(F.interpolate(input=x, size=(8, 8)), output_size=2)
        logits: Tensor = F.linear(input=x.flatten(1), weight=self.head.weight, bias=self.head.bias)
        return logits


FUNCTIONS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "functions of a number": (
        (6,),
        lambda: dense(
            Beside(
                Apply(lambda x: (x.exp() + 1).log() + (x * x + 1).sqrt()),
                Apply(lambda x: x.abs().clamp(0.1, 1.0) + (x.clamp(min=0) + 1) ** 3),
                Apply(lambda x: torch.where(x > 0.1, x * 2, x - 0.5)),
                Apply(lambda x: torch.div(x, 0.3, rounding_mode="floor") * x),
            )
        ),
    ),
    "rarer functions of a number": (
        (6,),
        lambda: dense(
            Beside(
                Apply(lambda x: x.frac() + x.fmod(0.7) - x * torch.trunc(3 * x)),
                Apply(lambda x: torch.exp2(x) + torch.log2(x * x + 1) + torch.log10(x * x + 2) + torch.hypot(x, x + 1)),
                Apply(
                    lambda x: x.asinh() + (x * x + 2).acosh() + (0.6 * x.tanh()).atanh() + (0.3 * x).sinh() * x.cosh()
                ),
                Apply(lambda x: torch.erf(x) * x + torch.erfc(x) + torch.copysign(x, x - 0.3) * x.sgn()),
                Apply(lambda x: x.clamp(-x * x, x.exp()) + torch.ldexp(x, torch.ones(1))),
            )
        ),
    ),
    "angles": (
        (6,),
        lambda: dense(Apply(lambda x: angles(0.6 * torch.tanh(x)) + torch.atan2(x, 0.5 - x) + torch.atan2(x, x * x))),
    ),
    "norms of any order": (
        (6,),
        lambda: dense(Apply(lambda x: x / (1 + sum(x.norm(p, 1, keepdim=True) for p in (1, 3, float("inf")))))),
    ),
    "sort, topk": (
        (6,),
        lambda: dense(Apply(lambda x: torch.cat([x.sort(1, True)[0], x.topk(3, 1, False)[0] * middle(x)], 1))),
    ),
    "places along a dimension": (
        (6,),
        lambda: dense(Apply(lambda x: x[:, [0, 2, -6]].repeat(1, 2) * x.take_along_dim(x.argsort(1), 1)[:, 2:])),
    ),
    "places along neighbouring dimensions": (
        (4, 12),
        lambda: series(
            nn.Conv1d(4, 4, 1),
            Apply(
                lambda x: (
                    (x @ x.mT / 12)[:, *torch.triu_indices(4, 4, 1)].unsqueeze(1) * x[:, [[0], [-1]], [1, 5, 5]].mean()
                    + x.take_along_dim(x[:, :1].argsort(2), 2)[:, :, :6]
                )
            ),
        ),
    ),
    "diagonals": (
        (4, 9, 9),
        lambda: images(nn.Conv2d(4, 3, 2), Apply(lambda x: torch.diag_embed(x.diagonal(1, 2, 3), -1) + x)),
    ),
    "distances": (
        (4, 12),
        lambda: series(nn.Conv1d(4, 4, 1), Apply(lambda x: torch.cdist(x, 2 * x[:, 1:]) + torch.cdist(x, x[:, 1:], 1))),
    ),
    "local response norm": ((4, 9, 9), lambda: images(nn.Conv2d(4, 5, 3), nn.LocalResponseNorm(3, 0.5))),
    "pooling to a size": (
        (4, 9, 9),
        lambda: images(
            nn.Conv2d(4, 2, 1),
            nn.AdaptiveAvgPool2d((7, 4)),
            nn.AdaptiveMaxPool2d((3, None)),
            nn.Flatten(2),
            nn.AdaptiveAvgPool1d(5),
            nn.AdaptiveMaxPool1d(2),
        ),
    ),
    "resizing": (
        (4, 9, 9),
        lambda: images(
            nn.Conv2d(4, 2, 3),
            nn.Upsample(scale_factor=1.5, mode="bicubic"),
            Apply(lambda x: F.interpolate(x, size=(4, 5), mode="area")),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        ),
    ),
    "bilinear": ((6,), lambda: dense(Twice(nn.Bilinear(8, 8, 4)))),
    "windows as columns": (
        (4, 9, 9),
        lambda: images(nn.Conv2d(4, 2, 1), nn.Unfold(3, stride=2), Apply(torch.tanh), nn.Fold((9, 9), 3, stride=2)),
    ),
    "pooling over three dimensions": (
        (4, 9, 9),
        lambda: images(
            nn.Conv2d(4, 4, 1),
            nn.Unflatten(1, (1, 4)),
            nn.MaxPool3d((2, 2, 3), 1),
            nn.AvgPool3d((1, 3, 2), padding=(0, 1, 0)),
        ),
    ),
    "functions called by keywords": ((4, 9, 9), ByKeywords),
}
