"""Enlarging, shrinking, pooling to a size and padding by what stands at the edges, in slices, joins and products.

Whatever keeps the rows and columns of an image apart is a matrix for each of them: what torch makes of the unit
vectors tells its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor

from umbel.errors import OperatorNotSupported
from umbel_models.constants import constants
from umbel_models.convolution import per_dimension

_SEPARABLE: Final = ("nearest", "nearest-exact", "linear", "bilinear", "bicubic", "area")


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
        raise OperatorNotSupported(f"interpolation by {mode!r} of {x.dim()} dimensions; use one of {_SEPARABLE}")
    sizes = list(x.shape[2:])
    wanted = per_dimension(size, len(sizes)) if size is not None else [None] * len(sizes)
    scales = per_dimension(scale_factor, len(sizes)) if size is None else [None] * len(sizes)
    settings: Any = {"align_corners": align_corners, "recompute_scale_factor": recompute_scale_factor}
    settings["mode"] = {"linear": "bilinear"}.get(mode, mode)
    for dim, (length, to, scale) in enumerate(zip(sizes, wanted, scales, strict=True), start=2):
        by: Any = {"size": (to, 1)} if scale is None else {"scale_factor": (scale, 1.0)}
        x = _along(x, dim, _matrix(length, partial(F.interpolate, **settings, **by)))
    return x


def adaptive_avg_pool(count: int, x: Tensor, output_size: Any) -> Tensor:
    """F.adaptive_avg_pool1d or 2d, over `count` dimensions: means over windows of nearly one size."""
    wanted = _wanted(count, x, output_size)
    if set(wanted) == {1}:
        # Torch's own would lay out its result by hand where its input was turned (channels last).
        return x.mean(list(range(-count, 0)), keepdim=True)
    if not _uneven(count, x, wanted):
        pool: Any = F.adaptive_avg_pool1d if count == 1 else F.adaptive_avg_pool2d
        return pool(x, wanted)  # type: ignore[no-any-return]
    for dim, to in enumerate(wanted, start=x.dim() - count):
        x = _along(x, dim, _matrix(int(x.shape[dim]), partial(F.adaptive_avg_pool2d, output_size=(to, 1))))
    return x


def adaptive_max_pool(count: int, x: Tensor, output_size: Any, return_indices: bool = False) -> Tensor:
    """F.adaptive_max_pool1d or 2d, likewise."""
    if return_indices:
        raise OperatorNotSupported("adaptive pooling with indices; leave them out")
    wanted = _wanted(count, x, output_size)
    if not _uneven(count, x, wanted):
        window = [old // new for old, new in zip(x.shape[-count:], wanted, strict=True)]
        return (F.max_pool1d if count == 1 else F.max_pool2d)(x, window)
    for dim, to in enumerate(wanted, start=x.dim() - count):
        length = int(x.shape[dim])
        # From the floor of where a share begins to the ceiling of where it ends.
        windows = [(at * length // to, -((at + 1) * length // -to)) for at in range(to)]
        x = torch.stack([x.narrow(dim, begin, end - begin).amax(dim) for begin, end in windows], dim)
    return x


def _wanted(count: int, x: Tensor, size: Any) -> list[int]:
    return [
        int(old) if new is None else new for new, old in zip(per_dimension(size, count), x.shape[-count:], strict=True)
    ]


def _uneven(count: int, x: Tensor, wanted: list[int]) -> bool:
    return any(old % new for old, new in zip(x.shape[-count:], wanted, strict=True))


def _along(x: Tensor, dim: int, matrix: Tensor) -> Tensor:
    """A dimension times a matrix [length, new length]."""
    moved = x.transpose(dim, -1)
    flat = torch.mm(moved.reshape(-1, matrix.shape[0]), matrix)
    return flat.reshape([*moved.shape[:-1], matrix.shape[1]]).transpose(dim, -1)


def _matrix(length: int, resized: Callable[[Tensor], Tensor]) -> Tensor:
    """What `resized`, which takes [N, C, H, W], makes of a column of this length: [length, new length]."""
    with constants():
        units = torch.eye(length).reshape(length, 1, length, 1)
        return resized(units).reshape(length, -1)


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
    for shift, dim in zip(per_dimension(shifts, 1), per_dimension(dims, 1), strict=True):
        length = x.shape[dim]
        if not isinstance(length, int):
            raise OperatorNotSupported("rolling the examples of a batch; roll another dimension")
        at = -shift % length
        x = torch.cat([x.narrow(dim, at, length - at), x.narrow(dim, 0, at)], dim) if at else x
    return x
