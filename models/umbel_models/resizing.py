"""Enlarging, shrinking and padding by what stands at the edges, in slices, joins and matrix products.

Whatever keeps the rows and columns of an image apart is a matrix for each of them: what torch makes of the unit
vectors tells its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from umbel.errors import OperatorNotSupported

_SEPARABLE: Final = {"nearest": "nearest", "nearest-exact": "nearest-exact", "linear": "linear", "bilinear": "linear"}


def interpolate(
    x: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """F.interpolate of [N, C, L] or [N, C, H, W] to sizes that are numbers."""
    if mode not in _SEPARABLE or antialias or x.dim() > 4:
        raise OperatorNotSupported(f"interpolation by {mode!r} of {x.dim()} dimensions; use 'nearest' or 'bilinear'")
    sizes, settings = list(x.shape[2:]), {"align_corners": align_corners}
    wanted = _each(size, len(sizes)) if size is not None else [None] * len(sizes)
    scales = _each(scale_factor, len(sizes)) if size is None else [None] * len(sizes)
    for dim, (length, to, scale) in enumerate(zip(sizes, wanted, scales, strict=True), start=2):
        matrix = _matrix(length, to, scale, _SEPARABLE[mode], recompute_scale_factor, settings)
        moved = x.transpose(dim, -1)
        flat = torch.mm(moved.reshape(-1, length), matrix)
        x = flat.reshape([*moved.shape[:-1], matrix.shape[1]]).transpose(dim, -1)
    return x


def _matrix(length: int, to: Any, scale: Any, mode: str, recompute: bool | None, settings: dict[str, Any]) -> Tensor:
    """What one dimension becomes: [length, new length]."""
    with disable_proxy_modes_tracing(), unset_fake_temporarily(), torch._C.DisableTorchFunction():
        units = torch.eye(length).unsqueeze(1)
        made: Tensor = F.interpolate(units, to, scale, mode, recompute_scale_factor=recompute, **settings)
        return made.squeeze(1)


def _each(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value] * count


def pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """F.pad in all its modes; pairs of sizes count from the last dimension."""
    if mode == "constant":
        return F.pad(x, pad, mode, value)
    for i in range(len(pad) // 2):
        x = _pad_edges(x, x.dim() - 1 - i, pad[2 * i], pad[2 * i + 1], mode)
    return x


def _pad_edges(x: Tensor, dim: int, before: int, after: int, mode: str) -> Tensor:
    length = x.shape[dim]
    if min(before, after) < 0:
        raise OperatorNotSupported(f"padding by {mode!r} with a negative size; cut the tensor before")
    if mode == "circular":
        left, right = x.narrow(dim, length - before, before), x.narrow(dim, 0, after)
    elif mode == "reflect":
        left, right = x.narrow(dim, 1, before).flip(dim), x.narrow(dim, length - 1 - after, after).flip(dim)
    elif mode == "replicate":
        left = torch.cat([x.narrow(dim, 0, 1)] * before, dim) if before else x.narrow(dim, 0, 0)
        right = torch.cat([x.narrow(dim, length - 1, 1)] * after, dim) if after else x.narrow(dim, 0, 0)
    else:
        raise OperatorNotSupported(f"padding by {mode!r}; use 'constant', 'reflect', 'replicate' or 'circular'")
    parts = [part for part, size in ((left, before), (x, 1), (right, after)) if size]
    return torch.cat(parts, dim) if len(parts) > 1 else x


def roll(x: Tensor, shifts: Any, dims: Any = None) -> Tensor:
    """torch.roll along dimensions whose sizes are numbers."""
    if dims is None:
        raise OperatorNotSupported("rolling a flattened tensor; name a dimension")
    for shift, dim in zip(_each(shifts, 1), _each(dims, 1), strict=True):
        length = x.shape[dim]
        if not isinstance(length, int):
            raise OperatorNotSupported("rolling the examples of a batch; roll another dimension")
        at = -shift % length
        x = torch.cat([x.narrow(dim, at, length - at), x.narrow(dim, 0, at)], dim) if at else x
    return x
