"""Looking up and putting down by places along a dimension, as products with ones and zeros: LiteRT has no scatter.

`_marks` holds a one where a place is. Of places that are read, negative ones count from the back only where torch lets
them; all others LiteRT refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor

from umbel.errors import OperatorNotSupported
from umbel_models.elementary import joined, put

aten = torch.ops.aten


def one_hot(places: Tensor, count: int) -> Tensor:
    """Rows of ones and zeros, one for each place."""
    return _marks(places.unsqueeze(1), 1, count)


def _marks(places: Tensor, dim: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A one where each place along a dimension is, zeros elsewhere: [..., size, ...] for one place, [..., K, size, ...]
    for K.

    Looking the places up first lets LiteRT refuse those that aren't there.
    """
    several = places.shape[dim] != 1
    counts = [1] * (places.dim() + several)
    counts[dim + several] = size
    all_places = torch.arange(size, dtype=torch.int32)
    known = aten.index_select(all_places, 0, places.reshape(-1)).reshape(places.shape)
    known = known.unsqueeze(dim + 1) if several else known
    return (known == all_places.reshape(counts)).to(dtype)  # type: ignore[no-any-return]


def _number(dtype: torch.dtype) -> torch.dtype:
    """What ones and zeros have to be to be multiplied by such numbers."""
    return torch.float32 if dtype == torch.bool else dtype


def _alike(x: Tensor, other: Tensor, dim: int) -> bool:
    return not isinstance(x.shape[dim], int) or bool(x.shape[dim] == other.shape[dim])


def _narrowed(x: Tensor, places: Tensor, dim: int | None) -> Tensor:
    """The part of a tensor that places are told for: from the front of each dimension but one."""
    for d in range(x.dim()):
        if d != dim and not _alike(x, places, d):
            x = x.narrow(d, 0, int(places.shape[d]))
    return x


def _gather(x: Tensor, dim: int, places: Tensor, sparse_grad: bool = False) -> Tensor:
    del sparse_grad
    dim = dim % x.dim()
    x = _narrowed(x, places, dim)
    marks = _marks(places, dim, int(x.shape[dim]), _number(x.dtype))
    if places.shape[dim] == 1:
        return (x * marks).sum([dim], keepdim=True).to(x.dtype)
    return (x.unsqueeze(dim) * marks).sum([dim + 1]).to(x.dtype)


def _scatter_add(x: Tensor, dim: int, places: Tensor, source: Tensor) -> Tensor:
    dim = dim % x.dim()
    source = _narrowed(source, places, None)
    added = _placed_at(_marks(places, dim, int(x.shape[dim]), _number(x.dtype)), dim, source)
    missing = [0 if d == dim or _alike(x, added, d) else int(x.shape[d]) - int(added.shape[d]) for d in range(x.dim())]
    return x + F.pad(added, [size for room in reversed(missing) for size in (0, room)]) if any(missing) else x + added


def _scatter(x: Tensor, dim: int, places: Tensor, source: Tensor) -> Tensor:
    """Where two are put at one place the last one stays, as in torch."""
    dim = dim % x.dim()
    source = _narrowed(source, places, None)
    if not all(_alike(x, places, d) for d in range(x.dim()) if d != dim):
        raise OperatorNotSupported(
            "scattering over a part of the other dimensions; cut that part out, and join the rest"
        )
    marks = _marks(places, dim, int(x.shape[dim]), _number(x.dtype))
    if places.shape[dim] == 1:
        return torch.where(marks > 0, source, x)
    later = marks.sum([dim], keepdim=True) - marks.cumsum(dim)
    marks = marks * (later < 0.5).to(marks.dtype)
    return torch.where(marks.sum([dim]) > 0, _placed_at(marks, dim, source).to(x.dtype), x)


def _placed_at(marks: Tensor, dim: int, source: Tensor) -> Tensor:
    """Numbers put where the marks are, zeros elsewhere; added up where two meet."""
    if source.dim() == marks.dim():
        return source * marks
    return (source.unsqueeze(dim + 1) * marks).sum([dim])


def _from_front(index: Tensor, size: Any) -> Tensor:
    return torch.where(index < 0, index + size, index)


def _index(x: Tensor, places: Sequence[Tensor | None]) -> Tensor:
    """Along neighbouring dimensions, where negative places count from the back."""
    found = joined(x, places)
    if found is None:
        return NotImplemented  # type: ignore[no-any-return]
    whole, dim, index = found
    rows = aten.index_select(whole, dim, _from_front(index, whole.shape[dim]).reshape(-1))
    return rows.reshape([*whole.shape[:dim], *index.shape, *whole.shape[dim + 1 :]])  # type: ignore[no-any-return]


def _put(x: Tensor, places: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """Adding to rows is a product with ones where they go; the rest is as for others, or refused."""
    index = places[0]
    if not accumulate or len(places) != 1 or index is None or index.dim() != 1 or index.dtype == torch.bool:
        return put(x, places, values, accumulate)
    marked = one_hot(_from_front(index, x.shape[0]), int(x.shape[0]))
    return x + (marked.t() @ values.reshape(index.shape[0], -1)).reshape(x.shape)


PLACES: Final[dict[Any, Callable[..., Any]]] = {
    aten._unsafe_index_put.default: _put,
    aten.gather.default: _gather,
    aten.index.Tensor: _index,
    aten.index_put.default: _put,
    aten.scatter.src: _scatter,
    aten.scatter_add.default: _scatter_add,
}
"""Over the shared table."""
