"""Functions of numbers, norms and picks in terms of operators that every runtime has.

Autograd has gone over them already: what it makes of a gradient is put together in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from umbel.errors import OperatorNotSupported

aten = torch.ops.aten


# Rounding and remainders.


def _trunc(x: Tensor) -> Tensor:
    return torch.sign(x) * torch.floor(x.abs())


def _divided(x: Tensor, y: Any, *, rounding_mode: str) -> Tensor:
    if not torch.result_type(x, y).is_floating_point:
        raise OperatorNotSupported("whole numbers divided by whole numbers; convert them to float32 before")
    quotient = torch.div(x, y)
    return torch.floor(quotient) if rounding_mode == "floor" else _trunc(quotient)


def _fmod(x: Tensor, y: Any) -> Tensor:
    """The remainder with the sign of x, as in C."""
    return torch.sub(x, _trunc(torch.div(x, y)) * y)


# Powers, logarithms, angles.


def _hypot(x: Tensor, y: Tensor) -> Tensor:
    return torch.sqrt(x * x + y * y)


def _asinh(x: Tensor) -> Tensor:
    size = x.abs()
    return torch.sign(x) * torch.log(size + torch.sqrt(size * size + 1))


def _acosh(x: Tensor) -> Tensor:
    return torch.log(x + torch.sqrt(x * x - 1))


def _atanh(x: Tensor) -> Tensor:
    return 0.5 * torch.log((1 + x) / (1 - x))


def _atan2(y: Tensor, x: Tensor) -> Tensor:
    """The angle of (x, y), from -pi to pi; 0 at the origin. A zero counts as positive, whatever sign it has."""
    turn = torch.where(y < 0, -math.pi, math.pi) * (x < 0).to(x.dtype)
    return torch.atan(y / torch.where(x == 0, (y == 0).to(x.dtype), x)) + turn


def _logaddexp2(x: Tensor, y: Tensor) -> Tensor:
    return torch.logaddexp(x * math.log(2), y * math.log(2)) / math.log(2)


# Signs and bounds.


def _copysign(x: Tensor, y: Any) -> Tensor:
    """The size of x with the sign of y; a zero counts as positive, whatever sign it has."""
    size = x.abs()
    return torch.where(torch.as_tensor(y) < 0, -size, size)


def _clamped(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


# Norms.


def _vector_norm(
    x: Tensor, order: float = 2, dims: list[int] | None = None, keepdim: bool = False, dtype: Any = None
) -> Tensor:
    """(sum |x|^p)^(1/p), or what that comes near to for an infinite p."""
    if dtype not in (None, x.dtype):
        raise OperatorNotSupported("a vector norm in a dtype of its own; convert the tensor before")
    chosen = list(range(x.dim())) if dims is None else dims
    if order == 2:
        return torch.sqrt((x * x).sum(chosen, keepdim))
    size = x.abs()
    if order == 1:
        return size.sum(chosen, keepdim)
    if order == 0:
        return (size > 0).to(x.dtype).sum(chosen, keepdim)
    if math.isinf(order):
        return size.amax(chosen, keepdim) if order > 0 else size.amin(chosen, keepdim)
    total: Tensor = (size**order).sum(chosen, keepdim)
    return torch.pow(total, 1 / order)


# Places.


def joined(x: Tensor, places: Sequence[Tensor | None]) -> tuple[Tensor, int, Tensor] | None:
    """A tensor, a dimension and places along it that mean the same: neighbouring dimensions become one.

    None for places that aren't along neighbours, or are yes or no.
    """
    given = [(dim, index) for dim, index in enumerate(places) if index is not None]
    first, last = given[0][0], given[-1][0]
    if last - first + 1 != len(given) or any(index.dtype == torch.bool for _, index in given):
        return None
    if first == last:
        return x, first, given[0][1]
    flat = torch.zeros([], dtype=torch.int64)
    for dim, index in given:
        flat = flat * x.shape[dim] + _looked_up(index, x.shape[dim])
    return x.reshape([*x.shape[:first], -1, *x.shape[last + 1 :]]), first, flat


def _looked_up(index: Tensor, size: Any) -> Tensor:
    """Places that count from the front, each of which a runtime has found: one beyond its dimension would be another
    row's.
    """
    from_front = torch.where(index < 0, index + size, index)
    found: Tensor = aten.index_select(torch.arange(size), 0, from_front.reshape(-1))
    return found.reshape(index.shape)


def index(x: Tensor, places: Sequence[Tensor | None]) -> Tensor:
    """`aten.index` along neighbouring dimensions."""
    found = joined(x, places)
    if found is None or found[0] is x:
        return NotImplemented  # type: ignore[no-any-return] # this is how a decomposition says "keep it"
    return aten.index(found[0], [*([None] * found[1]), found[2]])  # type: ignore[no-any-return]


def put(x: Tensor, places: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """`aten.index_put` along one dimension or neighbours: first ones as they are, others turned and laid flat."""
    found = joined(x, places)
    if found is None:
        return NotImplemented  # type: ignore[no-any-return]
    whole, dim, index = found
    if whole is x and dim == 0 and index.dim() == 1:
        return NotImplemented  # type: ignore[no-any-return]
    before, after = whole.shape[:dim], whole.shape[dim + 1 :]
    flat = values.expand([*before, *index.shape, *after]).reshape([*before, -1, *after])
    rows, turned = whole.transpose(0, dim), flat.transpose(0, dim)
    return aten.index_put(rows, [index.reshape(-1)], turned, accumulate).transpose(0, dim).reshape(x.shape)  # type: ignore[no-any-return]


def _sort(x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """As many of the largest, or smallest, as there are; of equal ones the first comes first."""
    size = x.shape[dim]
    if not isinstance(size, int):
        raise OperatorNotSupported("sorting the examples of a batch; sort along another dimension")
    return aten.topk(x, size, dim, descending)  # type: ignore[no-any-return]


def _sort_stable(
    x: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    del stable
    return _sort(x, dim, descending)


def _kth(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The k-th smallest, and where it is."""
    found = tuple(part.narrow(dim, k - 1, 1) for part in _sort(x, dim))
    values, places = found if keepdim else (part.squeeze(dim) for part in found)
    return values, places


def _median(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The lower of two, as in torch."""
    return _kth(x, (int(x.shape[dim]) + 1) // 2, dim, keepdim)


def _diagonal(x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    rows, columns = int(x.shape[dim1]), int(x.shape[dim2])
    moved = x.movedim((dim1, dim2), (-2, -1))
    first = max(0, -offset), max(0, offset)
    count = max(0, min(rows - first[0], columns - first[1]))
    places = (first[0] * columns + first[1]) + torch.arange(count) * (columns + 1)
    flat = moved.reshape([*moved.shape[:-2], rows * columns])
    return aten.index_select(flat, flat.dim() - 1, places)  # type: ignore[no-any-return]


def _diagonal_backward(gradient: Tensor, sizes: Sequence[int], offset: int, dim1: int, dim2: int) -> Tensor:
    """The numbers of a diagonal, and zeros around them: a product with a mask of ones."""
    rank = len(sizes)
    rows, columns = int(sizes[dim1]), int(sizes[dim2])
    first = max(0, -offset), max(0, offset)
    places = (torch.arange(rows) - first[0]).clamp(0, max(0, gradient.shape[-1] - 1))
    spread: Tensor = aten.index_select(gradient, gradient.dim() - 1, places).unsqueeze(-1)
    mask = (torch.arange(rows).unsqueeze(1) + offset == torch.arange(columns)).to(gradient.dtype)
    return (spread * mask).movedim((-2, -1), (dim1 % rank, dim2 % rank))


ELEMENTARY: Final[dict[Any, Callable[..., Any]]] = {
    aten._unsafe_index_put.default: put,
    aten.acosh.default: _acosh,
    aten.argmin.default: lambda x, dim=None, keepdim=False: aten.argmax(-x, dim, keepdim),
    aten.asinh.default: _asinh,
    aten.atan2.default: _atan2,
    aten.atanh.default: _atanh,
    aten.clamp.Tensor: _clamped,
    aten.copysign.Scalar: _copysign,
    aten.copysign.Tensor: _copysign,
    aten.diagonal.default: _diagonal,
    aten.diagonal_backward.default: _diagonal_backward,
    aten.div.Scalar_mode: _divided,
    aten.div.Tensor_mode: _divided,
    aten.erfc.default: lambda x: 1 - torch.erf(x),
    aten.exp2.default: lambda x: torch.exp(x * math.log(2)),
    aten.floor_divide.Scalar: lambda x, y: _divided(x, y, rounding_mode="floor"),
    aten.floor_divide.default: lambda x, y: _divided(x, y, rounding_mode="floor"),
    aten.fmod.Scalar: _fmod,
    aten.fmod.Tensor: _fmod,
    aten.frac.default: lambda x: x - _trunc(x),
    aten.hypot.default: _hypot,
    aten.index.Tensor: index,
    aten.index_put.default: put,
    aten.kthvalue.default: _kth,
    aten.ldexp.Tensor: lambda x, y: x * torch.exp(y * math.log(2)),
    aten.linalg_vector_norm.default: _vector_norm,
    aten.log10.default: lambda x: torch.log(x) / math.log(10),
    aten.log2.default: lambda x: torch.log(x) / math.log(2),
    aten.logaddexp2.default: _logaddexp2,
    aten.median.dim: _median,
    aten.sgn.default: torch.sign,
    aten.sort.default: _sort,
    aten.sort.stable: _sort_stable,
    aten.trunc.default: _trunc,
}
"""Over torch's own table."""
